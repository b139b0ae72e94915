"""What a user gets who installs a wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.cold


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_carries_patches_recipes_and_demo_data(wheel: Path) -> None:
    """Built by way of the source distribution, so that one holds them too."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (("patches", "*"), ("src/ambersafe_cli/recipes", "*"), ("src/ambersafe_cli/demo_data", "*")):
        for path in (ROOT / folder).glob(pattern):
            assert f"ambersafe_cli/{Path(folder).name}/{path.name}" in names
    assert {"ambersafe_cli/py.typed", "ambersafe_cli/report.html"} <= names
    assert not [name for name in names if name.startswith(("tests", "scripts"))]


@pytest.mark.slow
def test_wheel_works_in_a_fresh_environment_with_no_checkout_near(
    wheel: Path, tmp_path: Path, upstream_url: str
) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    constraints = ROOT / "scripts/constraints.txt"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--constraint", constraints, wheel], check=True, capture_output=True
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    work = tmp_path / "work"
    work.mkdir()

    def ambersafe(*arguments: str) -> subprocess.CompletedProcess[str]:
        command: list[str | Path] = [tmp_path / "env" / "bin" / "ambersafe", *arguments]
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)

    done = ambersafe("setup")
    assert done.returncode == 0, done.stderr
    assert ambersafe("recipes", "tiny").returncode == 0
    assert "applied" in ambersafe("status").stdout
    # Trains with another interpreter, the one that runs this test; this environment has no torch.
    refused = ambersafe("demo")
    assert refused.returncode == 73
    assert "lacks torch" in refused.stderr
    trained = ambersafe("demo", "--python", sys.executable)
    assert trained.returncode == 0, trained.stderr
    assert "reward accuracy" in trained.stdout

"""What the tests share: the command, small repositories in upstream's place, and the real upstream where it answers."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import browser
import faults
import pytest
import warm

from ambersafe_cli import metrics, patches, upstream

os.environ["HF_HUB_OFFLINE"] = "1"  # here, as huggingface_hub reads it when it is imported, by whatever test

ROOT = Path(__file__).resolve().parent.parent
FAKE_TRAIN = Path(__file__).with_name("fake_train.py")

Ambersafe = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def surroundings_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the user's Hugging Face cache out of the tests, and the network, on which none of them may depend."""
    # In the background of a shell Ctrl-C and Ctrl-\ are ignored, and a child would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and under nohup this one
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf_home"))
    for variable in ("AMBERSAFE_UPSTREAM_DIR", "SAFERLHF_DATASET", "SAFERLHF_REVISION", "CUDA_VISIBLE_DEVICES"):
        os.environ.pop(variable, None)
    os.environ["AMBERSAFE_PYTHON"] = str(warm.make(tmp_path_factory.mktemp("warm") / "bin", os.getpid()))


@pytest.fixture(autouse=True)
def real_interpreter_where_it_matters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is marked cold, or is of such a module, starts a Python for everything; see warm.py."""
    if request.node.get_closest_marker("cold"):
        monkeypatch.delenv("AMBERSAFE_PYTHON")


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """Take back what a test's own process came to have in its environment, as pushing sets variables of the hub there.

    Every later test would inherit that, and warm.py would have no interpreter that was started with it.
    """
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if name != "PYTEST_CURRENT_TEST"})


@pytest.fixture
def ambersafe(tmp_path: Path) -> Ambersafe:
    """Run the command in a working folder of its own, `tmp_path / "work"`, and return what it printed."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return lambda *arguments, **options: run_ambersafe(*arguments, **{"cwd": work, **options})


def run_ambersafe(
    *arguments: object, cwd: Path, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ambersafe_cli", *map(str, arguments)]
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=timeout)
    # Not text=True, which would make a line feed of every carriage return.
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def interpreter() -> str:
    """What trains: an interpreter that has the imports behind it, or in a cold test the one that runs the tests."""
    return os.environ.get("AMBERSAFE_PYTHON", sys.executable)


def run_python(script: Path, *arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a script as training is run, and return what it printed."""
    command = [interpreter(), str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})})
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_code(code: str, *arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run code as training is run, and return what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "code.py"
        script.write_text(code)
        return run_python(script, *arguments, env=env, cwd=cwd)


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder with an identity, and return what it printed."""
    identity = ["-c", "user.name=Someone", "-c", "user.email=someone@example.org", "-c", "commit.gpgSign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def make_repository(folder: Path, files: dict[str, str]) -> str:
    """Make a git repository with one commit of these files, and return its id."""
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet", "--initial-branch=main")
    return commit(folder, files, "Initial commit")


def commit(folder: Path, files: dict[str, str], message: str) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)
    return git(folder, "rev-parse", "HEAD")


def make_series(repository: Path, base: str, folder: Path) -> tuple[patches.Patch, ...]:
    """Export the commits base..HEAD of a repository as a series that `patches.read_series` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    names = git(
        repository, "format-patch", "--zero-commit", "--no-signature", "-o", str(folder), f"{base}..HEAD"
    ).split()
    commits = git(repository, "rev-list", "--reverse", f"{base}..HEAD").split()
    lines = [f"{Path(name).name} {each}" for name, each in zip(names, commits, strict=True)]
    (folder / "series").write_text("\n".join(lines) + "\n")
    return patches.read_series(folder)


@pytest.fixture
def fake_clone(tmp_path: Path) -> Path:
    """A clone whose train.py is tests/fake_train.py, and which has commits by the names of all our patches."""
    folder = tmp_path / "work" / "direct-preference-optimization"
    base = make_repository(folder, {"train.py": "print('not patched')\n"})
    for number, patch in enumerate(patches.read_series()):
        commit(folder, {"train.py": FAKE_TRAIN.read_text() + f"# {number}\n"}, patch.subject)
    git(folder, "update-ref", upstream.BASE_REF, base)
    return folder


def only_run(work: Path, name: str) -> Path:
    """The one run of this exp_name in a working folder."""
    (found,) = (work / ".cache").glob(f"*/{name}_*")
    return found


def records_of(run: Path) -> list[metrics.Record]:
    """Every step and evaluation of a run, by its log."""
    return [each for each in metrics.read(run / "train.log") if isinstance(each, metrics.Record)]


def numbers(run: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    """Every record of a run by its kind and step, as printed but for the speed, the last where there are two."""
    found: dict[tuple[str, int], tuple[Any, ...]] = {}
    for record in records_of(run):
        values = {k: v for k, v in record.values.items() if k != "examples_per_second"}
        found[record.kind, record.examples] = tuple(sorted(values.items()))
    return found


def load(path: Path) -> Any:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.fixture(scope="session")
def upstream_url() -> str:
    """Upstream's public URL. Where it cannot be reached the test is skipped, or fails if that was asked for."""
    asked = ["git", "ls-remote", upstream.UPSTREAM_URL, "HEAD"]
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=30, env=environment)
        why = "" if answer.returncode == 0 else answer.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    if why and os.environ.get("AMBERSAFE_REQUIRE_UPSTREAM") == "1":
        pytest.fail(f"AMBERSAFE_REQUIRE_UPSTREAM=1, but {upstream.UPSTREAM_URL} cannot be reached: {why}")
    if why:
        pytest.skip(f"{upstream.UPSTREAM_URL} cannot be reached: {why}")
    return upstream.UPSTREAM_URL


@pytest.fixture(scope="session")
def patched(upstream_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real upstream, as `ambersafe setup` makes it."""
    folder = tmp_path_factory.mktemp("patched")
    done = run_ambersafe("setup", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "direct-preference-optimization"


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium or Chrome. Where there is none the test is skipped, or fails if that was asked for."""
    path = browser.find()
    if path is None and os.environ.get("AMBERSAFE_REQUIRE_CHROMIUM") == "1":
        pytest.fail("AMBERSAFE_REQUIRE_CHROMIUM=1, but there is no chromium and no google-chrome on PATH")
    if path is None:
        pytest.skip("there is no chromium and no google-chrome on PATH")
    return path


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """A test that needs the real upstream says so by its fixtures; the mark follows from that."""
    for item in items:
        if {"upstream_url", "patched"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.upstream)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Called where workers run the tests (pytest-xdist), for each at its end: what it noted goes into one table."""
    faults.add(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = faults.as_plain()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if faults.TABLE:
        terminalreporter.write_sep("=", "faults that were injected")
        terminalreporter.write_line("\n".join(faults.table()))
    skipped = [str(report.longrepr) for report in terminalreporter.getreports("skipped")]
    if no_upstream := [why for why in skipped if "cannot be reached" in why]:
        terminalreporter.write_sep("!", f"{len(no_upstream)} TESTS AGAINST THE REAL UPSTREAM WERE SKIPPED", red=True)
        terminalreporter.write_line(no_upstream[0])
    if no_hosts := [why for why in skipped if "no hosts of our own" in why]:
        terminalreporter.write_sep("!", f"{len(no_hosts)} TESTS WITH SEVERAL MACHINES WERE SKIPPED", red=True)
        terminalreporter.write_line(no_hosts[0])
    if no_slurm := [why for why in skipped if "Slurm cannot be started" in why]:
        terminalreporter.write_sep("!", f"{len(no_slurm)} TESTS WITH A REAL SLURM WERE SKIPPED", red=True)
        terminalreporter.write_line(f"{no_slurm[0]}; scripts/test --slurm installs it")
    if no_chromium := [why for why in skipped if "no google-chrome" in why]:
        terminalreporter.write_sep("!", f"{len(no_chromium)} TESTS IN A REAL BROWSER WERE SKIPPED", red=True)
        terminalreporter.write_line("There is no chromium and no google-chrome on PATH: `apt-get install chromium`.")

"""Collecting what a GPU check needs where there is no network: which wheels, how large, and can they be used."""

import base64
import csv
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from conftest import run_ambersafe
from gpu_check import collect, wheels
from hypothesis import given
from hypothesis import strategies as st
from packaging import tags, utils
from packaging.requirements import Requirement

from ambersafe_cli import patches, upstream
from ambersafe_cli.errors import TrainingEnvironmentError, UsageError

FREEZE = """\
Python 3.12.3
accelerate==1.15.0
annotated-doc==0.0.4
anyio==4.12.0
certifi==2025.11.12
charset-normalizer==3.4.4
click==8.3.1
contourpy==1.3.3
cycler==0.12.1
filelock==3.20.0
fonttools==4.61.0
fsspec==2025.10.0
h11==0.16.0
hf-xet==1.2.0
httpcore==1.0.9
httpx==0.28.1
huggingface_hub==1.2.0
idna==3.11
Jinja2==3.1.6
kiwisolver==1.4.9
markdown-it-py==4.0.0
MarkupSafe==3.0.3
matplotlib==3.10.8
mdurl==0.1.2
mpmath==1.3.0
networkx==3.6
numpy==2.4.0
nvidia-cublas==13.1.0.3
nvidia-cudnn-cu13==9.15.1.9
packaging==25.0
pandas==3.0.0
peft==0.21.0
pillow==12.0.0
psutil==7.1.3
pyarrow==24.0.0
Pygments==2.19.2
pyparsing==3.2.5
python-dateutil==2.9.0.post0
PyYAML==6.0.3
regex==2025.11.3
requests==2.32.5
rich==14.2.0
safetensors==0.7.0
setuptools==80.9.0
shellingham==1.5.4
six==1.17.0
sympy==1.14.0
tokenizers==0.22.1
torch==2.11.0+cu130
tqdm==4.67.1
transformers==5.17.0
triton==3.6.0
typer==0.29.0
typing_extensions==4.15.0
urllib3==2.6.0
"""
WANTED = {"ambersafe-cli", "datasets", "gitpython", "hydra-core", "omegaconf", "beautifulsoup4", "pydantic", "wandb"}
WANTED |= {"antlr4-python3-runtime", "trl", "bitsandbytes"}


def without_network(**more: str) -> dict[str, str]:
    """An environment in which git has no configuration of the user's, and finds nothing behind a URL."""
    nowhere = "http://127.0.0.1:9"
    proxies = {"http_proxy": nowhere, "https_proxy": nowhere, "no_proxy": ""}
    return {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", **proxies, **more}


def make_wheel(
    folder: Path,
    name: str,
    files: Mapping[str, bytes] | None = None,
    requires: Sequence[str] = (),
    extras: Sequence[str] = (),
    version: str = "1.0",
) -> Path:
    """A wheel of these files, with a RECORD as it should be."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
        *(f"Provides-Extra: {each}" for each in extras),
    ]
    metadata += [f"Requires-Dist: {each}" for each in requires]
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content = {
        **(files or {}),
        f"{info}/METADATA": "\n".join(metadata).encode() + b"\n",
        f"{info}/WHEEL": wheel.encode(),
    }
    rows = [f"{path},{digest(data)},{len(data)}" for path, data in content.items()]
    content[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for each, data in content.items():
            archive.writestr(each, data)
    return path


def digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def files_of(wheel: Path) -> list[str]:
    """The files of a wheel, after a look at whether its RECORD names just these, with their hashes and sizes."""
    with zipfile.ZipFile(wheel) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        rows = {row[0]: row[1:] for row in csv.reader(archive.read(record).decode().splitlines())}
        assert sorted(rows) == sorted(name for name in archive.namelist() if not name.endswith("/"))
        for name, (hashed, size) in rows.items():
            if name != record:
                data = archive.read(name)
                assert (hashed, int(size)) == (digest(data), len(data)), name
    return list(rows)


# The freeze


NAMES = st.from_regex(r"[a-z0-9]{1,6}(-[a-z0-9]{1,6}){0,3}", fullmatch=True)
VERSIONS = st.from_regex(r"[0-9]{1,4}(\.[0-9]{1,4}){0,3}(rc1|\.post2)?(\+cu[0-9]{3})?", fullmatch=True)
NOISE = st.sampled_from(["", "   ", "# a comment", "## FILES", "-e /somewhere/else", "--find-links /wheels"])


@st.composite
def freeze_lines(draw: st.DrawFn, name: str, version: str | None) -> str:
    """A line that says that this package is there, in any of the ways of `pip freeze`, and any spelling of the name."""
    parts = [part.upper() if draw(st.booleans()) else part for part in name.split("-")]
    spelled = parts[0] + "".join(draw(st.sampled_from(["-", "_", ".", "__", "-."])) + part for part in parts[1:])
    if version is None:
        where = draw(
            st.sampled_from(["@ file:///tmp/a-1.0.whl", "@ git+https://example.org/a.git@1234", "@file:///a b"])
        )
        return draw(st.sampled_from([f"{spelled} {where}", f"-e git+https://example.org/a.git@1234#egg={spelled}"]))
    ways = [f"{spelled}=={version}", f"{spelled}==={version}", f"{spelled}=={version} ; python_version > '3'"]
    return draw(st.sampled_from([*ways, f"# Editable Git install with no remote ({spelled}=={version})"]))


@given(data=st.data(), packages=st.dictionaries(NAMES, st.none() | VERSIONS, max_size=8))
def test_a_freeze_is_read_however_pip_writes_its_lines(data: st.DataObject, packages: dict[str, str | None]) -> None:
    lines = [data.draw(freeze_lines(*each)) for each in packages.items()] + data.draw(st.lists(NOISE, max_size=4))
    lines = data.draw(st.permutations([*lines, "Python 3.12.3"]))
    text = data.draw(st.sampled_from(["", "\ufeff"])) + data.draw(st.sampled_from(["\n", "\r\n"])).join(lines)
    assert wheels.parse_freeze(text, "FREEZE.txt") == wheels.Freeze("3.12.3", packages)


@given(st.text() | st.lists(st.text("aZ1-=@#;. \\", max_size=9) | st.just("Python 3.12.3")).map("\n".join))
def test_any_text_is_a_freeze_or_refused(text: str) -> None:
    try:
        assert wheels.parse_freeze(text, "FREEZE.txt").python
    except UsageError as error:
        assert "FREEZE.txt" in error.message and "python3 -V" in error.hint


def test_a_freeze_without_its_python_is_refused_with_the_command_that_makes_it() -> None:
    with pytest.raises(UsageError, match="Python") as caught:
        wheels.parse_freeze("torch==2.11.0+cu130\n", "FREEZE.txt")
    assert "{ python3 -V; python3 -m pip freeze; } > FREEZE.txt" in caught.value.hint


def test_a_line_that_is_none_is_named() -> None:
    with pytest.raises(UsageError, match=r"FREEZE.txt, line 2: 'Usage: pip'"):
        wheels.parse_freeze("Python 3.12.3\nUsage: pip\n", "FREEZE.txt")


@pytest.mark.parametrize(
    ("lines", "cuda"),
    [
        ("torch==2.11.0+cu130", (13, 0)),
        ("torch==2.7.1+cu118", (11, 8)),
        ("torch==2.11.0+cpu\nnvidia-cudnn-cu13==9.1", None),
        ("torch==2.11.0\nnvidia-cuda-runtime-cu12==12.8.90\nnvidia-cudnn-cu12==9.1", (12, 8)),
        ("torch==2.11.0\nnvidia-cuda-runtime==13.0.96", (13, 0)),
        ("torch==2.11.0\nnvidia-cublas-cu12==12.8.4.1", (12, None)),
        ("torch @ file:///torch.whl\nnvidia-cudnn-cu13==9.1\nnvidia-cudnn-cu12==9.1", (13, None)),
        ("torch==2.11.0", None),
    ],
)
def test_the_freeze_tells_the_cuda_of_torch(lines: str, cuda: tuple[int, int | None] | None) -> None:
    assert wheels.parse_freeze(f"Python 3.12.3\n{lines}\n", "FREEZE.txt").cuda == cuda


def test_markers_are_those_of_the_target() -> None:
    markers = wheels.Freeze("3.12.3", {}).markers
    for marker, extras, holds in (
        ("python_version >= '3.12'", (), True),
        ("python_version < '3.12'", (), False),
        ("python_full_version >= '3.12.3'", (), True),
        ("python_full_version >= '3.12.4'", (), False),
        ("sys_platform == 'win32' or platform_system == 'Darwin'", (), False),
        ("platform_machine == 'x86_64' and os_name == 'posix'", (), True),
        ("platform_python_implementation == 'CPython' and implementation_name == 'cpython'", (), True),
        ("extra == 'plot'", (), False),
        ("extra == 'plot'", ("train", "plot"), True),
        ("extra == 'plot' and python_version < '3.12'", ("plot",), False),
    ):
        assert wheels.applies(Requirement(f"a; {marker}"), extras, markers) is holds, marker


# What is chosen


SIZES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 50), min_size=1)


@given(data=st.data(), sizes=SIZES)
def test_what_is_chosen_fits_and_what_is_left_out_does_not(data: st.DataObject, sizes: dict[str, int]) -> None:
    room = data.draw(st.integers(0, sum(sizes.values())))
    some = st.frozensets(st.sampled_from(sorted(sizes)), max_size=4)
    units = [
        wheels.Unit(f"unit {number}", data.draw(st.integers(0, 3)), False, data.draw(some))
        for number in range(data.draw(st.integers(0, 6)))
    ]
    chosen, left_out = wheels.choose(units, sizes, room)
    used = sum(sizes[name] for name in chosen)
    assert used <= room
    taken = [unit for unit in units if unit.name not in left_out]
    assert chosen == {name for unit in taken for name in unit.wheels}
    for unit in (unit for unit in units if unit.name in left_out):
        assert used + sum(sizes[name] for name in unit.wheels - chosen) > room
        # Only what comes before it can have taken its room: a rank below, or a smaller one of its own.
        before = {
            name
            for each in taken
            if (each.rank, weight(each, sizes)) <= (unit.rank, weight(unit, sizes))
            for name in each.wheels
        }
        assert sum(sizes[name] for name in before | unit.wheels) > room


def weight(unit: wheels.Unit, sizes: Mapping[str, int]) -> int:
    return sum(sizes[name] for name in unit.wheels)


def test_what_is_required_is_not_left_out() -> None:
    units = [
        wheels.Unit("big", 1, True, frozenset({"big", "small"})),
        wheels.Unit("plot", 5, False, frozenset({"plot"})),
    ]
    sizes = {"big": 7_000_000, "small": 1_000_000, "plot": 1}
    with pytest.raises(UsageError, match=r"big does not fit in: big, small: 8.0 MB, but only 7.5 MB are left"):
        wheels.choose(units, sizes, 7_500_000)
    assert wheels.choose(units, sizes, 8_000_000) == (
        {"big", "small"},
        {"plot": "plot: 0.0 MB, but only 0.0 MB are left"},
    )


@pytest.mark.parametrize(
    ("room", "left_out"),
    [(50, []), (40, ["tensorboard"]), (28, ["bitsandbytes", "tensorboard"]), (20, ["tensorboard", "wandb"])],
)
def test_tensorboard_goes_first_and_a_wandb_that_is_too_large_takes_nothing_along(
    room: int, left_out: list[str]
) -> None:
    of_each = {"datasets": ("", 3), "trl": ("trl", 1), "wandb": ("wandb", 24), "bitsandbytes": ("quantize", 4)}
    of_each["tensorboard"] = ("tensorboard", 14)
    units = [wheels.Unit(x, collect.ORDER.index(y), not y, frozenset({x})) for x, (y, _) in of_each.items()]
    assert sorted(wheels.choose(units, {x: size for x, (_, size) in of_each.items()}, room)[1]) == left_out


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> collect.Shelf:
    """A shelf in front of a small registry, and of a target that has torch and `old` 1.0."""
    registry = {
        "datasets": ["dill", "old>=2", "six; python_version < '3'", "dill-speed; extra == 'fast'"],
        "dill": ["datasets"],  # a circle
        "dill-speed": [],
        "hydra-core": ["dill"],
        "wandb": [],
        "trl": ["datasets[fast]"],
        "tensorboard": ["nvidia-ml-py", "wandb"],
        "peft": ["gone"],
    }

    def fetch(wanted: str, downloads: Path, python: str) -> wheels.Wheel:
        assert python == "3.12.3"
        requirement = Requirement(wanted)
        if requirement.name not in registry:
            raise TrainingEnvironmentError(f"There is no wheel of {wanted}.")
        version = "5.0" if "==" not in wanted else wanted.partition("==")[2]
        return wheels.read_wheel(
            make_wheel(downloads, requirement.name, {}, registry[requirement.name], version=version)
        )

    monkeypatch.setattr(collect, "fetch", fetch)
    target = wheels.Freeze("3.12.3", {"torch": "2.11.0+cu130", "old": "1.0", "unknown": None})
    return collect.Shelf(target, {"dill": "0.4.1", "hydra-core": "1.3.8"}, tmp_path)


OWN_REQUIRES = [
    "datasets>=4",
    "old",
    "unknown>=3",
    "torch>=2; extra == 'train'",
    "hydra-core<2; extra == 'train'",
    "wandb; extra == 'train'",
    "peft; extra == 'lora'",
    "ambersafe-cli[lora]; extra == 'quantize'",
    "tensorboard; extra == 'tensorboard'",
    "pytest; extra == 'dev'",
]


def own_wheel(folder: Path, requires: Sequence[str]) -> wheels.Wheel:
    extras = ("train", "lora", "quantize", "tensorboard", "dev")
    return wheels.read_wheel(make_wheel(folder / "own", "ambersafe-cli", {}, requires, extras))


def test_requirements_are_followed_to_what_the_target_lacks(shelf: collect.Shelf, tmp_path: Path) -> None:
    units, left_out = shelf.units(own_wheel(tmp_path, OWN_REQUIRES), "trl==1.16.0")
    found = {unit.name: (collect.ORDER[unit.rank], unit.required, sorted(unit.wheels)) for unit in units}
    assert found == {
        "ambersafe-cli": ("", True, ["ambersafe-cli", "datasets", "dill"]),
        "trl": ("trl", False, ["datasets", "dill", "dill-speed", "trl"]),
        "torch": ("train", True, []),
        "hydra-core": ("train", True, ["datasets", "dill", "hydra-core"]),
        "wandb": ("wandb", False, ["wandb"]),
    }
    assert left_out == {
        "peft": "There is no wheel of gone.",
        "tensorboard": "tensorboard needs nvidia-ml-py, which has to be on the target already.",
    }
    assert {name: wheel.version for name, wheel in shelf.wheels.items() if name in ("dill", "hydra-core", "trl")} == {
        "dill": "0.4.1",
        "hydra-core": "1.3.8",
        "trl": "1.16.0",
    }
    assert shelf.unmet == {"datasets wants old>=2, and the target has 1.0"}


def test_what_is_required_must_be_found(shelf: collect.Shelf, tmp_path: Path) -> None:
    with pytest.raises(TrainingEnvironmentError, match="no wheel of gone"):
        shelf.units(own_wheel(tmp_path, ["gone"]), "trl==1.16.0")
    with pytest.raises(TrainingEnvironmentError, match="needs triton, which has to be on the target"):
        shelf.units(own_wheel(tmp_path, ["triton; extra == 'train'"]), "trl==1.16.0")


def test_without_a_wheel_one_is_made_of_the_source_if_it_runs_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = "antlr4_python3_runtime-4.9.3-py3-none-any.whl"

    def run_pip(command: str, *arguments: str | Path) -> str:
        if command == "download":
            assert {"--python-version", "3.12.3", "cp312", "--platform=manylinux2014_x86_64"} <= set(arguments)
            return "ERROR: no matching distribution"
        into = Path(arguments[arguments.index("--wheel-dir") + 1])
        make_wheel(into, "antlr4-python3-runtime", version="4.9.3").rename(into / made)
        return ""

    monkeypatch.setattr(wheels, "run_pip", run_pip)
    wheel = wheels.fetch("antlr4-python3-runtime==4.9.3", tmp_path, "3.12.3")
    assert (wheel.name, wheel.version) == ("antlr4-python3-runtime", "4.9.3")
    made = "antlr4_python3_runtime-4.9.3-cp311-cp311-linux_x86_64.whl"
    with pytest.raises(TrainingEnvironmentError, match=r"no matching distribution .*for this machine only"):
        wheels.fetch("antlr4-python3-runtime==4.9.3", tmp_path, "3.12.3")


# bitsandbytes


LIBRARIES = ("cuda118", "cuda128", "cuda130", "cuda132", "rocm72", "xpu2026", "cpu")


@pytest.mark.parametrize(
    ("cuda", "kept", "variable"),
    [
        ((13, 0), "cuda130", None),
        ((13, 1), "cuda130", "130"),
        ((13, 9), "cuda132", "132"),
        ((13, None), "cuda132", "132"),
        ((12, 9), "cuda128", "128"),
    ],
)
def test_bitsandbytes_keeps_one_library_and_can_be_installed(
    tmp_path: Path, cuda: tuple[int, int | None], kept: str, variable: str | None
) -> None:
    files = {f"bitsandbytes/libbitsandbytes_{each}.so": each.encode() * 20_000 for each in LIBRARIES}
    code = b"from pathlib import Path\nthere = sorted(path.name for path in Path(__file__).parent.glob('*.so'))\n"
    path = make_wheel(tmp_path / "wheels", "bitsandbytes", {"bitsandbytes/__init__.py": code, **files})
    before = path.stat().st_size
    wheel = wheels.with_one_library(wheels.read_wheel(path), cuda)
    assert wheel.environment == ({"BNB_CUDA_VERSION": variable} if variable else {})
    assert kept in wheel.note
    assert (f"BNB_CUDA_VERSION={variable}" in wheel.note) == (variable is not None)
    libraries = [f"libbitsandbytes_{each}.so" for each in ("cpu", kept)]
    assert [name for name in sorted(files_of(path)) if name.endswith(".so")] == [f"bitsandbytes/{x}" for x in libraries]
    assert path.stat().st_size < before
    collect.install(tmp_path, tmp_path / "site", sys.executable)
    script = "import bitsandbytes, importlib.metadata as m; print(bitsandbytes.there, m.version('bitsandbytes'))"
    command = [sys.executable, "-S", "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout == f"{libraries} 1.0\n", done.stderr


@pytest.mark.parametrize(
    ("cuda", "why"),
    [(None, "does not tell for which CUDA"), ((12, 1), "only for CUDA 11.8, 12.8, 13.0"), ((14, 0), "only")],
)
def test_without_a_library_for_the_cuda_bitsandbytes_is_refused(
    tmp_path: Path, cuda: tuple[int, int | None] | None, why: str
) -> None:
    path = make_wheel(tmp_path, "bitsandbytes", {f"bitsandbytes/libbitsandbytes_{x}.so": b"" for x in LIBRARIES})
    with pytest.raises(TrainingEnvironmentError, match=why):
        wheels.with_one_library(wheels.read_wheel(path), cuda)


# The folder


def test_a_folder_of_the_users_is_refused_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "FREEZE.txt").write_text(FREEZE)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in (
        ("notes.txt", "mine"),
        ("collect.json", "{}"),
        ("collect.json", "[1]"),
        ("collect.json", "\xff{"),
    ):
        (folder / name).write_text(text, encoding="latin-1")
        with pytest.raises(UsageError, match="not made by scripts/gpu-check --collect"):
            collect.collect(folder, tmp_path / "FREEZE.txt")
        assert [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_text(encoding="latin-1") == text
        (folder / name).unlink()
    collect.refuse_foreign(folder)
    with pytest.raises(UsageError, match=r"FREEZE.txt is there already"):
        collect.collect(tmp_path / "FREEZE.txt", tmp_path / "FREEZE.txt")


def test_an_earlier_collection_is_replaced_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = iter(["first", "second", "fails"])

    def gather(new: Path, scratch: Path, target: wheels.Freeze, most_bytes: int) -> collect.Collected:
        new.mkdir()
        turn = next(turns)
        (new / turn).touch()
        if turn == "fails":
            raise TrainingEnvironmentError("There is no network.")
        return collect.Collected(target.python, {"commit": turn}, (), {}, (), (), {}, most_bytes)

    monkeypatch.setattr(collect, "gather", gather)
    (tmp_path / "FREEZE.txt").write_text(FREEZE)
    for turn in ("first", "second"):
        collect.collect(tmp_path / "a" / "folder", tmp_path / "FREEZE.txt")
        assert sorted(path.name for path in (tmp_path / "a" / "folder").iterdir()) == sorted(["collect.json", turn])
    with pytest.raises(TrainingEnvironmentError):
        collect.collect(tmp_path / "a" / "folder", tmp_path / "FREEZE.txt")
    assert (tmp_path / "a" / "folder" / "second").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["folder"]
    assert json.loads((tmp_path / "a" / "folder" / "collect.json").read_text())["total_bytes"] == 60_000_000


def test_a_target_without_torch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "FREEZE.txt").write_text("Python 3.12.3\nnumpy==2.4.0\n")
    with pytest.raises(TrainingEnvironmentError, match="lists no torch"):
        collect.collect(tmp_path / "folder", tmp_path / "FREEZE.txt")
    with pytest.raises(UsageError, match=r"Cannot read .*MISSING.txt"):
        collect.collect(tmp_path / "folder", tmp_path / "MISSING.txt")


def test_what_pip_cannot_install_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no wheels"):
        collect.install(tmp_path, tmp_path / "site", sys.executable)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a-1.0-cp39-cp39-win32.whl").touch()
    with pytest.raises(TrainingEnvironmentError, match=r"1 wheels .* not a supported wheel") as caught:
        collect.install(tmp_path, tmp_path / "site", sys.executable)
    assert "freeze of this Python" in caught.value.hint
    with pytest.raises(TrainingEnvironmentError, match="No such file"):
        collect.install(tmp_path, tmp_path / "site", str(tmp_path / "python"))


def test_the_environment_adds_to_what_git_is_told_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no collect.json"):
        collect.environment(tmp_path)
    made = {"upstream": {"url": "https://example.org/a.git"}, "environment": {"BNB_CUDA_VERSION": "130"}}
    (tmp_path / "collect.json").write_text(json.dumps(made))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "user.name")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "Someone")
    environment = collect.environment(tmp_path)
    assert environment["BNB_CUDA_VERSION"] == "130"
    asked = ["git", "config", "--get-regexp", "user.name|insteadof"]
    lines = subprocess.run(
        asked, capture_output=True, text=True, env=without_network(**environment)
    ).stdout.splitlines()
    bundle = tmp_path / "upstream.bundle"
    assert [line for line in lines if str(bundle) in line or "Someone" in line] == [
        "user.name Someone",
        f"url.{bundle}.insteadof https://example.org/a.git",
        f"url.{bundle}.insteadof https://example.org/a",
    ]


# The real thing


@pytest.mark.slow
def test_ambersafe_sets_up_from_the_bundle_alone(upstream_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    made = collect.make_bundle(folder / "upstream.bundle", tmp_path)
    assert made == {"url": upstream_url, "commit": upstream.PINNED_COMMIT}
    (folder / "collect.json").write_text(json.dumps({"upstream": made, "environment": {}}))
    sets_up_from(folder, tmp_path)


def sets_up_from(folder: Path, work: Path) -> None:
    """Check that git clones from the bundle, and that it stands in for upstream's URL where nothing can be reached."""
    clone = ["git", "clone", "--quiet", str(folder / "upstream.bundle"), str(work / "clone")]
    subprocess.run(clone, check=True, env=without_network())
    head = ["git", "-C", str(work / "clone"), "rev-parse", "HEAD", "origin/main", "--abbrev-ref", "HEAD"]
    said = subprocess.run(head, check=True, capture_output=True, text=True).stdout.split()
    assert said == [upstream.PINNED_COMMIT, upstream.PINNED_COMMIT, "main"]

    alone = run_ambersafe("setup", "--dir", work / "alone", cwd=work, env=without_network())
    assert alone.returncode == 69, alone.stderr  # or this test would not show what the bundle does
    offline = without_network(**collect.environment(folder))
    for name, repo in (("plain", []), ("without-git", ["--repo", upstream.UPSTREAM_URL.removesuffix(".git")])):
        done = run_ambersafe("setup", "--dir", work / name, *repo, cwd=work, env=offline)
        assert done.returncode == 0, done.stderr
        assert upstream.inspect(work / name, patches.read_series()).is_ours


@pytest.mark.slow
def test_the_real_collection_fits_and_can_be_used(upstream_url: str, tmp_path: Path) -> None:
    (tmp_path / "FREEZE.txt").write_text(FREEZE)
    folder = tmp_path / "folder"
    collected = collect.collect(folder, tmp_path / "FREEZE.txt")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 60_000_000
    assert json.loads((folder / "collect.json").read_text())["python"] == "3.12.3"

    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    known = {*tags.cpython_tags((3, 12), ["cp312"], platforms), *tags.compatible_tags((3, 12), "cp312", platforms)}
    there: dict[str, str] = {}
    for path in (folder / "wheels").iterdir():
        name, version, _, wheel_tags = utils.parse_wheel_filename(path.name)
        assert wheel_tags & known, path.name
        there[name] = str(version)
    assert there == {each["name"]: each["version"] for each in collected.wheels}
    assert there.keys() >= WANTED
    assert not there.keys() & wheels.parse_freeze(FREEZE, "FREEZE.txt").packages.keys()
    assert not [name for name in there if name.startswith("nvidia-") or name in ("torch", "triton", "pytest", "ruff")]
    assert "torch 2.11.0+cu130, pinned 2.13.0" in collected.differences
    assert "datasets wants huggingface-hub<3.0,>=1.31.0, and the target has 1.2.0" in collected.unmet

    (path,) = (folder / "wheels").glob("bitsandbytes-*.whl")
    libraries = sorted(name for name in files_of(path) if name.endswith(".so"))
    assert libraries == ["bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/libbitsandbytes_cuda130.so"]

    # The folder alone is enough: the copied module runs with nothing but the standard library.
    assert not list(folder.rglob("__pycache__"))
    command = [sys.executable, "-S", "-B", "-c", "from gpu_check import collect; print(collect.SCRIPTS)"]
    environment = {**os.environ, "PYTHONPATH": str(folder / "scripts")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.strip() == str(folder / "scripts"), done.stderr
    assert (folder / "scripts" / "bench_train.py").exists() and (folder / "scripts" / "constraints.txt").exists()
    sets_up_from(folder, tmp_path)

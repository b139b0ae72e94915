"""Wheels for a machine that is described by its `pip freeze`: what that has, and how to get, read and shrink a wheel.

Packages beyond the standard library are imported only where they are used, see collect.py.
"""

import csv
import email
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

SCRIPTS = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("ambersafe_cli") is None:  # before `install`; Python can read it out of the wheel as well
    sys.path += map(str, SCRIPTS.parent.glob("wheels/ambersafe_cli-*.whl"))
from ambersafe_cli.errors import TrainingEnvironmentError, UsageError  # noqa: E402

MAKE_FREEZE = "Make it on the target: `{ python3 -V; python3 -m pip freeze; } > FREEZE.txt`."
MANYLINUX = (*(f"_2_{minor}" for minor in range(28, 4, -1)), "2014", "2010", "1")
SMALL_LIBRARY = 1_000_000
LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_([a-z]+)(\d*)[^/]*\.so")
FREEZE_LINE = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)\s*(?:===?\s*(\S+)|@\s*\S.*)")
EDITABLE = re.compile(r"# Editable .*\(([\w.-]+)==(\S+)\)|-e .*[#&]egg=([\w.-]+).*")


@dataclass(frozen=True)
class Freeze:
    """What the target has: its Python, and the version of each package by its normalized name (None: not known)."""

    python: str
    packages: Mapping[str, str | None]

    @property
    def cuda(self) -> tuple[int, int | None] | None:
        """Major and minor version (None: not known) of the CUDA that torch is built for. None if there is none."""
        if found := re.search(r"\+cu(\d\d)(\d+)", self.packages.get("torch") or ""):
            return int(found[1]), int(found[2])
        if re.search(r"\+(cpu|rocm|xpu)", self.packages.get("torch") or ""):
            return None
        lines = "\n".join(f"{name}=={version}" for name, version in self.packages.items())
        if runtimes := re.findall(r"^nvidia-cuda-runtime(?:-cu\d\d)?==(\d+)\.(\d+)", lines, re.MULTILINE):
            return max((int(major), int(minor)) for major, minor in runtimes)
        majors = re.findall(r"^nvidia-(?:cublas|cudnn)-cu(\d\d)==", lines, re.MULTILINE)
        return (max(map(int, majors)), None) if majors else None

    @property
    def markers(self) -> dict[str, str]:
        """What the markers of a requirement are compared with."""
        system = {"os_name": "posix", "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
        python = {"python_version": ".".join(self.python.split(".")[:2]), "python_full_version": self.python}
        kind = {"implementation_name": "cpython", "implementation_version": self.python}
        names = {"platform_python_implementation": "CPython", "platform_release": "", "platform_version": ""}
        return {**system, **python, **kind, **names}


@dataclass(frozen=True)
class Wheel:
    """A wheel that was downloaded or built, what its METADATA says, and what a check must know or set because of it."""

    name: str
    version: str
    path: Path
    requires: tuple["Requirement", ...] = ()
    extras: tuple[str, ...] = ()
    requires_python: str = ""
    note: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """Something wanted, and all wheels that it needs: they are chosen together or not at all, the lowest rank first."""

    name: str
    rank: int
    required: bool
    wheels: frozenset[str]


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def parse_freeze(text: str, source: str) -> Freeze:
    """Read what `python3 -V` and `pip freeze` print. Raises UsageError for a line that is of neither."""
    python = ""
    packages: dict[str, str | None] = {}
    for number, line in enumerate(map(str.strip, text.removeprefix("\ufeff").splitlines()), 1):
        if found := re.fullmatch(r"Python (\d+\.\d+\.\d+)\S*", line):
            python = found[1]
        elif found := EDITABLE.fullmatch(line):
            packages[normalize(found[1] or found[3])] = found[2]
        elif found := FREEZE_LINE.fullmatch(re.sub(r"\s+[;#].*", "", line)):
            packages[normalize(found[1])] = found[2]
        elif line and not line.startswith(("#", "-")):
            raise UsageError(f"{source}, line {number}: {line!r} is no line of `pip freeze`.", MAKE_FREEZE)
    if not python:
        raise UsageError(f"{source} does not tell the target's Python: no line is like `Python 3.12.3`.", MAKE_FREEZE)
    return Freeze(python, packages)


def fits(requirement: "Requirement", version: str) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        return requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return str(requirement.specifier) in ("", f"=={version}")


def applies(requirement: "Requirement", extras: Iterable[str], markers: Mapping[str, str]) -> bool:
    """Whether the target needs this requirement of a package that was asked for with these extras."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**markers, "extra": extra}) for extra in ("", *extras))


def run_pip(*arguments: str | Path, python: str = sys.executable, environment: Mapping[str, str] | None = None) -> str:
    """Run pip, and return "" if it went well, else what it said."""
    command = [python, "-m", "pip", *map(str, arguments)]
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **(environment or {})}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=env)
    except OSError as error:
        return f"{python}: {error.strerror or error}"
    if not done.returncode:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    return " ".join([line for line in lines if line.startswith("ERROR")] or lines[-3:])[-2000:]


def read_wheel(path: Path) -> Wheel:
    from packaging.requirements import Requirement

    with zipfile.ZipFile(path) as archive:
        (name,) = (each for each in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", each))
        metadata = email.message_from_bytes(archive.read(name))
    requires = tuple(map(Requirement, metadata.get_all("Requires-Dist", [])))
    extras = tuple(map(normalize, metadata.get_all("Provides-Extra", [])))
    python = str(metadata.get("Requires-Python", ""))
    return Wheel(normalize(metadata["Name"]), metadata["Version"], path, requires, extras, python)


def fetch(wanted: str, downloads: Path, python: str) -> Wheel:
    """Download a wheel for the target's Python, or make one that runs everywhere from the source.

    Raises TrainingEnvironmentError if neither can be had."""
    into = Path(tempfile.mkdtemp(dir=downloads))
    tags = ["--python-version", python, "--implementation", "cp", "--abi", "cp" + "".join(python.split(".")[:2])]
    tags += [f"--platform=manylinux{each}_x86_64" for each in MANYLINUX]
    if said := run_pip("download", "--no-deps", "--only-binary=:all:", *tags, "--dest", into, wanted):
        of_source = run_pip("wheel", "--no-deps", "--wheel-dir", into, wanted)
        if of_source or not list(into.glob("*py3-none-any.whl")):
            why = of_source or "what its source makes is for this machine only."
            raise TrainingEnvironmentError(
                f"There is no wheel of {wanted} for Python {python} on Linux, x86_64: {said} From its source: {why}",
                f"Is there a network? `{sys.executable} -m pip download --no-deps '{wanted}'` shows more.",
            )
    (path,) = into.glob("*.whl")
    return read_wheel(path)


def repack(wheel: Path, drop: Collection[str]) -> None:
    """Write a wheel anew without some of its files, which its RECORD does not name any more either."""
    smaller = wheel.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            content = old.read(info)
            if re.fullmatch(r"[^/]+\.dist-info/RECORD", info.filename):
                rows, text = csv.reader(io.StringIO(content.decode())), io.StringIO()
                csv.writer(text, lineterminator="\n").writerows(row for row in rows if row and row[0] not in drop)
                content = text.getvalue().encode()
            if info.filename not in drop:
                new.writestr(info, content, zipfile.ZIP_DEFLATED, 9)
    smaller.replace(wheel)


def library_for(cuda: tuple[int, int | None], there: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """CUDA's own version, else the nearest lower one of the same major; the newest of it if the minor is not known."""
    return max((each for each in there if each[0] == cuda[0] and (cuda[1] is None or each[1] <= cuda[1])), default=None)


def with_one_library(wheel: Wheel, cuda: tuple[int, int | None] | None) -> Wheel:
    """Leave bitsandbytes its library for this CUDA, and the one for the CPU. Raises TrainingEnvironmentError."""
    if cuda is None:
        raise TrainingEnvironmentError("The freeze does not tell for which CUDA torch is built there.")
    with zipfile.ZipFile(wheel.path) as archive:
        libraries = {info.filename: info.file_size for info in archive.infolist() if LIBRARY.fullmatch(info.filename)}
    found = {name: LIBRARY.fullmatch(name) for name in libraries}
    cudas = {(int(m[2][:2]), int(m[2][2:])): name for name, m in found.items() if m and m[1] == "cuda"}
    chosen = library_for(cuda, cudas)
    if chosen is None:
        there = ", ".join(f"{major}.{minor}" for major, minor in sorted(cudas))
        raise TrainingEnvironmentError(f"{wheel.name} {wheel.version} has no library for it, only for CUDA {there}.")
    small = {name for name, m in found.items() if m and m[1] == "cpu" and libraries[name] <= SMALL_LIBRARY}
    before = wheel.path.stat().st_size
    repack(wheel.path, set(libraries) - small - {cudas[chosen]})
    note = f"with {Path(cudas[chosen]).name} alone; {megabytes(before)} with all libraries"
    if chosen == cuda:
        return replace(wheel, note=note)
    variable = {"BNB_CUDA_VERSION": f"{chosen[0]}{chosen[1]}"}
    exact = f"{cuda[0]}.{cuda[1]}" if cuda[1] is not None else f"{cuda[0]}"
    note += f"; torch's CUDA is {exact}: BNB_CUDA_VERSION={variable['BNB_CUDA_VERSION']} has it use this one"
    return replace(wheel, note=note, environment=variable)


def choose(units: Iterable[Unit], sizes: Mapping[str, int], room: int) -> tuple[set[str], dict[str, str]]:
    """The wheels that fit into `room` bytes, and why the others are left out: by rank, and of one rank the small first.

    Raises UsageError if something required does not fit."""
    chosen: set[str] = set()
    left_out: dict[str, str] = {}
    for unit in sorted(units, key=lambda each: (each.rank, sum(sizes[name] for name in each.wheels), each.name)):
        missing = sorted(unit.wheels - chosen)
        cost = sum(sizes[name] for name in missing)
        if cost <= room:
            chosen.update(missing)
            room -= cost
            continue
        why = f"{', '.join(missing)}: {megabytes(cost)}, but only {megabytes(room)} are left"
        if unit.required:
            raise UsageError(f"{unit.name} does not fit in: {why}.", "Install more on the target, or allow more bytes.")
        left_out[unit.name] = why
    return chosen, left_out

"""Collects, where there is a network, the folder that a GPU check needs on a machine without one.

`install` runs on that other machine, when none of the wheels is installed yet: so what is not in the standard library
is imported here only where it is used.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_check.wheels import (
    MAKE_FREEZE,
    SCRIPTS,
    Freeze,
    Unit,
    Wheel,
    applies,
    choose,
    fetch,
    fits,
    megabytes,
    normalize,
    parse_freeze,
    read_wheel,
    run_pip,
    say,
    size_of,
    with_one_library,
)

# Before `install` it is the module above that makes the next one importable.
# isort: split
from ambersafe_cli.errors import SourceError, TrainingEnvironmentError, UsageError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

OWN = "ambersafe-cli"
MADE_BY = "scripts/gpu-check --collect"
COPIED = ("gpu-check", "gpu_check", "bench*", "constraints.txt")
# What is chosen first. "" are the dependencies; these and `train` are required. wandb is one of `train`, but large.
ORDER = ("", "train", "lora", "trl", "wandb", "quantize", "plot", "tensorboard")
NEVER_DOWNLOADED = re.compile(r"torch|triton|nvidia-.*")
ROOM_FOR_COLLECT_JSON = 100_000
CUDA_OF_BITSANDBYTES = "BNB_CUDA_VERSION"


@dataclass(frozen=True)
class Collected:
    """What is written to collect.json. `total_bytes` is the size of all files but that one; `differences` are packages
    that the target has in another version than the pinned one, `unmet` requirements that do not hold there."""

    python: str
    upstream: Mapping[str, str]
    wheels: tuple[Mapping[str, object], ...]
    left_out: Mapping[str, str]
    differences: tuple[str, ...]
    unmet: tuple[str, ...]
    environment: Mapping[str, str]
    total_bytes: int
    made_by: str = MADE_BY


@dataclass(frozen=True)
class Shelf:
    """The wheels got so far, by name, and the requirements that do not hold on the target."""

    target: Freeze
    pins: Mapping[str, str | None]
    downloads: Path
    wheels: dict[str, Wheel] = field(default_factory=dict)
    unmet: set[str] = field(default_factory=set)

    def get(self, requirement: "Requirement", owner: str) -> Wheel:
        """The wheel for a requirement. Raises TrainingEnvironmentError if there is none."""
        name = normalize(requirement.name)
        if name not in self.wheels:
            if NEVER_DOWNLOADED.fullmatch(name):
                raise TrainingEnvironmentError(f"{owner} needs {name}, which has to be on the target already.")
            wanted = f"=={self.pins[name]}" if self.pins.get(name) else str(requirement.specifier)
            wheel = fetch(name + wanted, self.downloads, self.target.python)
            self.wheels[name] = with_one_library(wheel, self.target.cuda) if name == "bitsandbytes" else wheel
            say(f"  {name} {wheel.version}: {megabytes(wheel.path.stat().st_size)}")
        return self.wheels[name]

    def closure(self, root: "Requirement") -> frozenset[str]:
        """Get all wheels that `root` needs, itself included, and the target lacks; return their names."""
        needed: set[str] = set()
        seen: set[tuple[str, frozenset[str]]] = set()
        queue = [(root, OWN)]
        while queue:
            requirement, owner = queue.pop()
            name, extras = normalize(requirement.name), frozenset(requirement.extras)
            is_there = name in self.target.packages and name != OWN
            version = self.target.packages[name] if is_there else self.get(requirement, owner).version
            if version and not fits(requirement, version):
                where = "target" if is_there else "folder"
                self.unmet.add(f"{owner} wants {name}{requirement.specifier}, and the {where} has {version}")
            if is_there or (name, extras) in seen:
                continue
            seen.add((name, extras))
            needed.add(name)
            wheel = self.wheels[name]
            queue += [(each, name) for each in wheel.requires if applies(each, extras, self.target.markers)]
        return frozenset(needed)

    def units(self, own: Wheel, trl: str) -> tuple[list[Unit], dict[str, str]]:
        """What is wanted, and why something optional of it cannot be had."""
        from packaging.requirements import Requirement

        self.wheels[OWN] = own
        wanted = [("", Requirement(OWN)), ("trl", Requirement(trl))]
        for extra in (each for each in own.extras if each != "dev"):
            for each in own.requires:
                of_extra = applies(each, [extra], self.target.markers) and not applies(each, [], self.target.markers)
                if of_extra and normalize(each.name) != OWN:
                    wanted.append(("wandb" if each.name == "wandb" else extra, each))
        units, left_out = [], {}
        for group, requirement in wanted:
            name, required = normalize(requirement.name), group in ("", "train")
            try:
                rank = ORDER.index(group) if group in ORDER else len(ORDER)
                units.append(Unit(name, rank, required, self.closure(requirement)))
            except TrainingEnvironmentError as error:
                if required:
                    raise
                left_out[name] = error.message
        return units, left_out


def make_bundle(bundle: Path, scratch: Path) -> dict[str, str]:
    """Write upstream's pinned commit, as `main` and HEAD, into a file that git clones from; return URL and commit."""
    from ambersafe_cli.git_calls import NETWORK_ENVIRONMENT, require_git
    from ambersafe_cli.upstream import PINNED_COMMIT, UPSTREAM_URL

    require_git()
    inside = ["--git-dir", str(scratch / "upstream.git")]
    for arguments in (
        ["clone", "--quiet", "--bare", UPSTREAM_URL, str(scratch / "upstream.git")],
        [*inside, "update-ref", "refs/heads/main", PINNED_COMMIT],
        [*inside, "symbolic-ref", "HEAD", "refs/heads/main"],
        [*inside, "bundle", "create", "--quiet", str(bundle), "HEAD", "refs/heads/main"],
    ):
        env = {**os.environ, **NETWORK_ENVIRONMENT}
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, env=env)  # noqa: S607
        if done.returncode:
            message = f"Cannot bundle {PINNED_COMMIT[:12]} of {UPSTREAM_URL}: {done.stderr.strip()}"
            raise SourceError(message, f"Is there a network? `git ls-remote {UPSTREAM_URL}` shows more.")
    return {"url": UPSTREAM_URL, "commit": PINNED_COMMIT}


def copy_scripts(to: Path) -> None:
    for path in (found for pattern in COPIED for found in sorted(SCRIPTS.glob(pattern))):
        if path.is_dir():
            shutil.copytree(path, to / path.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            to.mkdir(exist_ok=True)
            shutil.copy(path, to / path.name)


def refuse_foreign(folder: Path) -> None:
    """Raise UsageError if something is in the folder that is no earlier collection."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        if json.loads((folder / "collect.json").read_text(encoding="utf-8"))["made_by"] == MADE_BY:
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UsageError(f"{folder} is there already, and not made by {MADE_BY}.", "Choose a folder that is new or empty.")


def put_in_place(new: Path, folder: Path, scratch: Path) -> None:
    """Rename what is whole; an earlier collection goes with the scratch folder."""
    refuse_foreign(folder)
    there = folder.exists()
    if there:
        folder.rename(scratch / "earlier")
    try:
        new.rename(folder)
    except OSError:
        if there:
            (scratch / "earlier").rename(folder)
        raise


def gather(new: Path, scratch: Path, target: Freeze, most_bytes: int) -> Collected:
    """Fill the folder `new`."""
    from packaging.requirements import Requirement

    from ambersafe_cli.environment import MODULES

    (new / "wheels").mkdir(parents=True)
    say("upstream")
    upstream = make_bundle(new / "upstream.bundle", scratch)
    copy_scripts(new / "scripts")
    say("wheels")
    constraints = SCRIPTS / "constraints.txt"
    pins = parse_freeze("Python 3.11.0\n" + constraints.read_text(encoding="utf-8"), str(constraints)).packages
    if said := run_pip("wheel", "--no-deps", "--wheel-dir", scratch, SCRIPTS.parent):
        hint = "Is it a whole checkout, is there a network, and has this Python pip?"
        raise TrainingEnvironmentError(f"Cannot build the wheel of {SCRIPTS.parent}: {said}", hint)
    shelf = Shelf(target, pins, scratch)
    own = read_wheel(next(scratch.glob("*.whl")))
    if not fits(Requirement(f"python{own.requires_python}"), target.python):
        raise UsageError(f"The target's Python is {target.python}; {OWN} needs {own.requires_python}.", MAKE_FREEZE)
    trl = re.findall(r'^TRL = "(.+)"$', (SCRIPTS / "bench_train.py").read_text(encoding="utf-8"), re.MULTILINE)
    units, left_out = shelf.units(own, trl[0])
    sizes = {name: wheel.path.stat().st_size for name, wheel in shelf.wheels.items()}
    chosen, too_large = choose(units, sizes, most_bytes - size_of(new) - ROOM_FOR_COLLECT_JSON)
    left_out |= too_large
    for name in left_out.keys() & MODULES.values():
        left_out[name] += " `ambersafe` starts no training without it."
    wheels: list[Mapping[str, object]] = []
    environment: dict[str, str] = {}
    for name, wheel in sorted(shelf.wheels.items()):
        if name in chosen:
            wheel.path.rename(new / "wheels" / wheel.path.name)
            wheels.append({"name": name, "version": wheel.version, "bytes": sizes[name], "note": wheel.note})
            environment.update(wheel.environment)
    known = {name: version for name, version in target.packages.items() if version and pins.get(name)}
    differences = [f"{n} {v}, pinned {pins[n]}" for n, v in sorted(known.items()) if v.partition("+")[0] != pins[n]]
    return Collected(
        target.python, upstream, tuple(wheels), left_out, tuple(differences), tuple(sorted(shelf.unmet)),
        environment, size_of(new),
    )  # fmt: skip


def report(collected: Collected) -> None:
    """Tell what a reader of the checks' results must know."""
    say(f"{len(collected.wheels)} wheels for Python {collected.python}; {megabytes(collected.total_bytes)} in all")
    for title, lines in (
        ("left out", [f"{name}: {why}" for name, why in collected.left_out.items()]),
        ("not as pinned on the target, and left as it is", collected.differences),
        ("requirements that do not hold there", collected.unmet),
        ("to be set there", [f"{name}={value}" for name, value in collected.environment.items()]),
    ):
        say("\n  ".join([f"{title}:", *lines]) if lines else f"{title}: nothing")


def collect(folder: Path, freeze: Path, most_bytes: int = 60_000_000) -> Collected:
    """Make `folder`, as a whole or not at all, for a target that has what the file `freeze` lists."""
    folder = folder.expanduser().resolve()
    refuse_foreign(folder)
    try:
        target = parse_freeze(freeze.read_text(encoding="utf-8"), str(freeze))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read {freeze}: {error}", MAKE_FREEZE) from error
    if "torch" not in target.packages:
        message = f"{freeze} lists no torch: a GPU check needs the target's own PyTorch, built for its CUDA."
        raise TrainingEnvironmentError(message, f"Install it there, or name the Python that has it. {MAKE_FREEZE}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            new = Path(scratch) / "new"
            collected = gather(new, Path(scratch), target, most_bytes)
            text = json.dumps(asdict(collected), indent=1)
            (new / "collect.json").write_text(text + "\n", encoding="utf-8")
            put_in_place(new, folder, Path(scratch))
    except OSError as error:
        raise UsageError(f"Cannot write {folder}: {error.strerror or error}", "Choose another folder.") from error
    report(collected)
    return collected


def install(folder: Path, site: Path, python: str) -> None:
    """Install the wheels of a collected folder into `site`, a folder of its own. Raises TrainingEnvironmentError."""
    wheels = sorted(folder.glob("wheels/*.whl"))
    if not wheels:
        raise UsageError(f"There are no wheels in {folder / 'wheels'}.", f"{MADE_BY} makes such a folder.")
    how = ("--isolated", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", site)
    if said := run_pip("install", *how, *wheels, python=python, environment={"PIP_CONFIG_FILE": os.devnull}):
        raise TrainingEnvironmentError(
            f"{python} cannot install the {len(wheels)} wheels of {folder} into {site}: {said}",
            f"Does `{python} -m pip --version` work, and was the folder collected with the freeze of this Python?",
        )


def environment(folder: Path) -> dict[str, str]:
    """What a process on the target is started with: upstream's URL is the bundle there, and what wheels need set."""
    try:
        made = json.loads((folder / "collect.json").read_text(encoding="utf-8"))
        url, own = str(made["upstream"]["url"]), made["environment"]
        variables = {name: str(own[name]) for name in (CUDA_OF_BITSANDBYTES,) if name in own}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder} has no collect.json that can be read: {error!r}", f"{MADE_BY} makes one."
        ) from error
    first = int(os.environ.get("GIT_CONFIG_COUNT") or 0)
    for number, each in enumerate((url, url.removesuffix(".git")), first):
        variables[f"GIT_CONFIG_KEY_{number}"] = f"url.{(folder / 'upstream.bundle').resolve()}.insteadOf"
        variables[f"GIT_CONFIG_VALUE_{number}"] = each
    return {**variables, "GIT_CONFIG_COUNT": str(first + 2)}

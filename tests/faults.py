"""Faults that are injected: how many of each, what came of them, and the hands that kill, fill, cut and flip.

AMBERSAFE_FAULTS=all, which `scripts/test --faults` sets, makes every try; without it a quick part of them is made.
AMBERSAFE_TEST_SEED repeats the random choices of an earlier run, as far as they are ours: a kill's moment also depends
on the machine.
"""

import ctypes
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from ambersafe_cli import integrity, recovery, runs

ALL = os.environ.get("AMBERSAFE_FAULTS") == "all"
# In the environment, so that all of pytest's workers have the same one.
SEED = os.environ.setdefault("AMBERSAFE_TEST_SEED", str(random.randrange(10**6)))

_MARK = "AMBERSAFE_TEST_MARK"

# How often each fault is injected: in the quick part, and in all.
_TRIES = {
    "kill -9 of the writer": (15, 70),
    "full disk under the writer": (8, 40),
    "checkpoint cut or with a flipped bit": (12, 60),
    "the same, resumed": (1, 4),
    "run.json damaged": (4, 16),
    "train.log damaged": (2, 8),
    "kill -9 of setup": (6, 45),
    "file of the clone cut, flipped or deleted": (8, 60),
    "two resumes at once": (1, 8),
    "kill -9 of a rank": (4, 20),
    "terminal closed, one rank": (2, 40),
    "terminal closed, two ranks": (1, 20),
    "SIGTERM to all, one rank": (1, 20),
    "SIGTERM to all, two ranks": (2, 10),
    "Ctrl-Z, one rank": (2, 6),
    "Ctrl-Z, two ranks": (1, 3),
    "launcher killed while stopped": (1, 3),
    "a rank stands still": (1, 3),
    "one process stands still": (1, 5),
    "a number that is not finite": (3, 9),
    "flipped bit in reference_logps": (40, 40),
    "reference_logps of another model": (2, 6),
    "newest checkpoint damaged, --max-restarts": (1, 6),
    "clock set back": (2, 6),
    "two machines, no locks, clocks apart": (1, 6),
    "two resumes at once, no locks": (1, 5),
    "a process that SIGKILL does not end": (1, 5),
    "killed for memory": (1, 6),
    "resume without room": (2, 8),
    "several sft at once": (1, 4),
    "several sft in one folder at once": (1, 4),
    "several setups at once": (1, 5),
}


def tries(fault: str) -> int:
    """How often this run injects a fault."""
    return _TRIES[fault][ALL]


def generator(*of: object) -> random.Random:
    """Random choices that depend on the seed and on what they are for."""
    return random.Random(f"{SEED} {of}")


@dataclass
class Row:
    """A line of the table at the end: how often a fault was injected, and what came of it."""

    tries: int = 0
    lost: int = 0
    orphans: int = 0
    is_kill_of_a_training: bool = False


TABLE: dict[str, Row] = {}


def note(
    fault: str, lost: Collection[object] = (), orphans: Collection[object] = (), is_kill_of_a_training: bool = False
) -> None:
    """Count a fault that was injected, and fail if something was lost or left behind by it."""
    row = TABLE.setdefault(fault, Row(is_kill_of_a_training=is_kill_of_a_training))
    row.tries += 1
    row.lost += len(lost)
    row.orphans += len(orphans)
    assert not lost, f"{fault}, seed {SEED}: lost {lost}"
    assert not orphans, f"{fault}, seed {SEED}: left {orphans}"


def as_plain() -> dict[str, dict[str, int]]:
    """The table for another process."""
    return {fault: asdict(row) for fault, row in TABLE.items()}


def add(other: dict[str, dict[str, int]]) -> None:
    """Add what another process noted, as_plain."""
    for fault, values in other.items():
        row = TABLE.setdefault(fault, Row())
        row.tries += values["tries"]
        row.lost += values["lost"]
        row.orphans += values["orphans"]
        row.is_kill_of_a_training |= bool(values["is_kill_of_a_training"])


def table() -> list[str]:
    """The lines of the table."""
    width = max(map(len, TABLE))
    lines = [f"{'fault':{width}}  tries  lost  orphans"]
    lines += [f"{fault:{width}}  {row.tries:5}  {row.lost:4}  {row.orphans:7}" for fault, row in TABLE.items()]
    total = Row(*(sum(getattr(row, column) for row in TABLE.values()) for column in ("tries", "lost", "orphans")))
    lines.append(f"{'all':{width}}  {total.tries:5}  {total.lost:4}  {total.orphans:7}")
    kills = sum(row.tries for row in TABLE.values() if row.is_kill_of_a_training)
    return [*lines, f"of these, kill -9 of a real training: {kills}; seed {SEED}"]


# --- processes ---


def marked_environment(mark: str) -> dict[str, str]:
    """An environment by which a process and all that it starts can be found."""
    return {_MARK: mark, "OMP_NUM_THREADS": "1"}


def marked(mark: str) -> dict[int, str]:
    """The living processes that were started in such an environment: their commands by their numbers."""
    wanted = f"{_MARK}={mark}".encode()
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (path / "environ").read_bytes().split(b"\0"):
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return {pid: command for pid, command in found.items() if command}


def kill_marked(mark: str) -> None:
    """As when the machine goes down: all of them at one moment, and no handler of anybody's runs."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in marked(mark):
            kill(pid, number)
    assert not left_over(mark, 10)


def kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def left_over(mark: str, seconds: float) -> dict[int, str]:
    """What is left of the processes after so many seconds."""
    wait_until(lambda: not marked(mark), seconds)
    return marked(mark)


def wait_until(is_so: Callable[[], bool], seconds: float, pause: float = 0.02) -> bool:
    """Whether it became so within that time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_so():
            return True
        time.sleep(pause)
    return is_so()


def die_with_parent() -> None:
    """For a child of a test: a test run that is killed leaves nothing running either."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


# --- checkpoints ---


def whole_checkpoints(run: Path) -> set[int]:
    """The numbers of a run's checkpoints that have their name; each must be whole."""
    found = set()
    for path in runs.steps(run):
        for name in recovery.FILES_OF_A_CHECKPOINT:
            assert integrity.damage(path / name) is None, f"{path / name}: {integrity.damage(path / name)}"
        found.add(int(path.name[5:]))
    return found


def lost_checkpoints(run: Path, before: set[int], keep: int) -> set[int]:
    """Those that were whole before and are gone, though the rule to keep so many of the newest holds them."""
    now = whole_checkpoints(run)
    in_between = {int(p.stem[5:]) for p in runs.steps(run, ".old")}  # of two renames, the first was done
    return set(sorted(before | now)[-keep:]) - now - in_between


# --- files ---


def damage_file(path: Path, rng: random.Random, ways: tuple[str, ...] = ("cut", "flip")) -> str:
    """Cut a file off at a random byte, flip one of its bits, or delete it; return what was done."""
    size = path.stat().st_size
    way = rng.choice(ways)
    if way == "delete":
        path.unlink()
        return "deleted"
    if not size:
        path.write_bytes(b"\0")
        return "a byte more"
    path.chmod(0o644)  # git's objects are read-only
    at = rng.randrange(size)
    with path.open("r+b") as file:
        if way == "cut":
            file.truncate(at)
            return f"cut at {at} of {size}"
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        bit = rng.randrange(8)
        file.write(bytes([byte ^ 1 << bit]))
        return f"bit {bit} of byte {at} of {size} flipped"


class SmallDisk:
    """A tmpfs that is mounted for a test; `is_there` is False where we may not mount one."""

    def __init__(self, folder: Path, kilobytes: int) -> None:
        self.folder = folder
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        self.is_there = subprocess.run(command, capture_output=True).returncode == 0

    def resize(self, kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(self.folder)], check=True)

    def fill(self, leave: int = 0) -> None:
        """Leave so many bytes free, rounded down to whole pages."""
        with (self.folder / "filler").open("ab", buffering=0) as file:
            try:
                while (free := os.statvfs(self.folder).f_bavail * 4096 - leave) >= 4096:
                    file.write(bytes(min(free // 4096 * 4096, 1 << 20)))
            except OSError:
                return

    def make_room(self) -> None:
        (self.folder / "filler").unlink()

    def unmount(self) -> None:
        if self.is_there:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

"""Run a training in a process, with the time at which each line of its output came, and make figures of that."""

import ast
import os
import re
import resource
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS_BETWEEN_SAMPLES = 0.25
LAST_LINES = 20

_STEP = re.compile(r"train stats after (\d+) examples: (\{.*\})")
_TRAINER = "Creating trainer"
# Upstream's line right before the first batch, that of bench_trl.py, or that ahead of a pass of the reference model.
_BEGINS = re.compile(r"Using \w+ optimizer|training begins|building reference model")


@dataclass(frozen=True)
class Line:
    """One line of output, and the seconds from the start of the command until it came."""

    time: float
    text: str


@dataclass(frozen=True)
class Run:
    """What came of a command: its lines, wall time and the processor time of all its processes in seconds.

    `peak` is the largest resident set that any of its processes reached, in MB.
    """

    lines: tuple[Line, ...]
    wall: float
    processor: float
    peak: float


@dataclass(frozen=True)
class Step:
    """The line of an optimizer step: the examples until then, all steps counted, and its metrics as printed."""

    time: float
    examples: int
    metrics: Mapping[str, str]


@dataclass(frozen=True)
class Spread:
    """The median of some values, and the least and the greatest of them."""

    median: float
    least: float
    greatest: float


def run(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Run:
    """Run the command in the folder until it ends. A failure ends this program with the last lines of output."""
    begun, used_before = time.perf_counter(), _used_by_children()
    child = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    peaks: list[float] = [0.0]
    ended = threading.Event()
    sampler = threading.Thread(target=_sample_peak, args=(child.pid, peaks, ended), daemon=True)
    sampler.start()
    try:
        lines = tuple(Line(time.perf_counter() - begun, text.rstrip("\n")) for text in child.stdout or ())
        status = child.wait()
        wall = time.perf_counter() - begun
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
        ended.set()
        sampler.join()
    if status:
        tail = "\n".join(line.text for line in lines[-LAST_LINES:])
        raise SystemExit(f"{tail}\nerror: exit status {status} of {' '.join(command)}")
    return Run(lines, wall, _used_by_children() - used_before, max(peaks))


def _used_by_children() -> float:
    """Processor time of all children that have ended, and theirs, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _sample_peak(top: int, peaks: list[float], ended: threading.Event) -> None:
    while not ended.wait(SECONDS_BETWEEN_SAMPLES):
        peaks.append(max(map(_peak_resident, _tree(top)), default=0.0))


def _tree(top: int) -> list[int]:
    """The process and all below it, as far as they are still there."""
    parents: dict[int, int] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                # The name, in parentheses, may hold anything.
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    tree = [top]
    for process in tree:
        tree += [child for child, parent in parents.items() if parent == process]
    return tree


def _peak_resident(process: int) -> float:
    """The largest resident set that the process had so far, in MB; 0 if it is no more."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def steps(lines: Sequence[Line]) -> list[Step]:
    """The optimizer steps that the lines tell of."""
    found = ((line.time, _STEP.search(line.text)) for line in lines)
    return [Step(when, int(match[1]), ast.literal_eval(match[2])) for when, match in found if match]


def figures(one: Run, tokens_per_example: float, imports: float) -> dict[str, float]:
    """What is compared, by name. `imports`: what imports alone hold resident, in MB.

    Speed is from the line of the first step to that of the last one, so that reading the data between steps counts
    and starting does not. Training is from before the first batch, or the pass of the reference model ahead of it, to
    the line of the last step. Raises ValueError if there are fewer than two steps.
    """
    made = steps(one.lines)
    if len(made) < 2:
        raise ValueError(f"{len(made)} steps: two at least are needed to tell a speed")
    first, last = made[0], made[-1]
    examples_per_second = (last.examples - first.examples) / (last.time - first.time)
    # In front of the trainer, the reference model is only loaded.
    texts = [line.text for line in one.lines]
    trainer = next((number for number, text in enumerate(texts) if text.startswith(_TRAINER)), 0)
    begins = next((line.time for line in one.lines[trainer:] if _BEGINS.match(line.text)), None)
    if begins is None:
        raise ValueError("no line says that training begins")
    return {
        "examples/s": examples_per_second,
        "tokens/s": examples_per_second * tokens_per_example,
        "training, s": last.time - begins,
        "whole process, s": one.wall,
        "processor time, s": one.processor,
        "to the first step, s": first.time,
        "peak memory, MB": one.peak,
        "beyond imports, MB": one.peak - imports,
    }


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def ratios(values: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Each value by the baseline's of the same turn, which ran next to it: noise that both had falls out."""
    return spread([value / base for value, base in zip(values, baseline, strict=True)])


def equality(pairs: Sequence[tuple[str, str]]) -> str:
    """In words, how far pairs of printed numbers are equal."""
    if all(one == other for one, other in pairs):
        return "equal to every printed digit"
    apart = max(abs(float(a) - float(b)) / (max(abs(float(a)), abs(float(b))) or 1.0) for a, b in pairs)
    return f"{'equal to 4 digits' if apart < 1e-4 else 'NOT equal'}, {apart:.1e} apart at the most"

"""A run as it is seen from outside, while it goes on or later: what the live view shows, with nothing of how."""

import collections
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from ambersafe_cli import curves, health, journal, metrics, runs, standstill

TAIL = 40
"""Lines of the output that are kept."""

_HEALTH_EVERY = 5.0
"""Seconds between two looks at the run's health."""

_CHECKPOINT_EVERY = 3.0
"""Seconds between two looks into the run's folder, which may lie on a slow disk."""

_BAR = re.compile(r"\d+%\|")
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # a command, such as a colour
    r"|\x1b[\]P^_X].*?(?:\x07|\x1b\\|$)"  # a text for the terminal, such as a title
    r"|\x1b[ -~]?|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


def clean(text: str) -> str:
    """A text without what a terminal would obey."""
    return _CONTROL.sub("", text).replace("\t", "    ").replace("\n", " ")


@dataclass
class Following:
    """What is known of a run now. `take_line` and `take_entry` are told what comes; the rest is looked up.

    `doing` is the last line of output, if that came behind the last metrics.
    """

    folder: Path
    stage: str
    model: str
    status: str
    planned_examples: int | None
    curves: curves.Curves
    began: float
    ended: float | None = None
    tail: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=TAIL))
    notices: list[str] = field(default_factory=list)
    advice: tuple[health.Advice, ...] = ()
    doing: str = "starting"
    checkpoint: tuple[str, float] | None = None
    _stuck: str | None = None
    _attempt: int = 0
    _first: metrics.Record | None = None
    _looked: dict[str, float] = field(default_factory=dict)

    def take_entry(self, entry: journal.Entry) -> None:
        """What metrics.jsonl got, or holds."""
        self.curves.add(entry)
        if isinstance(entry, metrics.Total):
            self.planned_examples = entry.examples or None
        if isinstance(entry, metrics.Record) and entry.kind == "train":
            if entry.attempt != self._attempt:
                self._attempt, self._first = entry.attempt, entry
            self.doing, self._stuck = "", None

    def take_line(self, line: str) -> None:
        """A line of the child's output, or a state of its progress bar, which takes the place of the one before."""
        line = clean(line).rstrip()
        if not line or (" after " in line and metrics.parse_line(line)):
            return
        self._stuck = standstill.parse_line(line) or (None if line.startswith(standstill.MOVES) else self._stuck)
        if self.tail and _BAR.search(line) and _BAR.search(self.tail[-1]):
            self.tail.pop()
        self.tail.append(line)
        if not line.startswith("skipping logging"):
            self.doing = line

    def look(self, at_once: bool = False) -> None:
        """Look, not more often than needed, for what no line tells: the run's health, and its checkpoints."""
        if self._is_due("health", _HEALTH_EVERY) or at_once:
            found = health.look(self.stage, self.curves.steps, self.curves.evaluations, self.planned_examples)
            self.advice = (standstill.advice(self._stuck), *found) if self._stuck else found
        if self._is_due("checkpoint", _CHECKPOINT_EVERY) or at_once:
            self.checkpoint = _newest_checkpoint(self.folder)

    def _is_due(self, what: str, every: float) -> bool:
        now = time.monotonic()
        if now - self._looked.get(what, -every) < every:
            return False
        self._looked[what] = now
        return True

    @property
    def examples(self) -> int:
        """How many examples it has trained on."""
        return self.curves.last.examples if self.curves.last else 0

    def seconds_left(self) -> float | None:
        """How long it will still take at the pace of this attempt so far, evaluations and saves included.

        None as long as that is not known.
        """
        first, last = self._first, self.curves.last
        if not (first and last and first.time and last.time and self.planned_examples):
            return None
        if last.examples <= first.examples or last.time <= first.time:
            return None
        pace = (last.time - first.time) / (last.examples - first.examples)
        return max(0.0, (self.planned_examples - last.examples) * pace)


def of(folder: Path, record: runs.Record, status: str) -> Following:
    """Begin to follow a run, by its record; its metrics so far are to be told by `take_entry`."""
    planned = record.get("planned_examples")
    attempts = record.get("attempts") or [record]
    return Following(
        folder=folder,
        stage=str(record["stage"]),
        model=clean(Path(str(record["model"].get("name"))).name),
        status=status,
        planned_examples=planned if isinstance(planned, int) and planned > 0 else None,
        curves=curves.Curves(),
        began=runs.seconds(attempts[-1].get("started")) or time.time(),
        ended=runs.seconds(record.get("ended")),
    )


def _newest_checkpoint(folder: Path) -> tuple[str, float] | None:
    """The name of the newest whole checkpoint, and when it was written, in seconds since 1970."""
    for path in (folder / "LATEST", *runs.steps(folder)[:1]):
        try:
            return path.name, (path / "policy.pt").stat().st_mtime
        except OSError:
            continue
    return None

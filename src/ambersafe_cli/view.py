"""The live view of a run as lines of text that fit a terminal of any size: what is told by `following` alone."""

import datetime
import itertools
import math
import statistics
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ambersafe_cli import metrics
from ambersafe_cli.display import printable
from ambersafe_cli.following import Following, clean

if TYPE_CHECKING:
    from rich.text import Text

_SHARED = (("gradient norm", "grad_norm"), ("learning rate", "learning_rate"), ("examples/s", "examples_per_second"))
METRICS: dict[str, tuple[tuple[str, str], ...]] = {
    "sft": (("loss", "loss/train"), *_SHARED),
    "dpo": (
        ("loss", "loss/train"),
        ("reward accuracy", "rewards_train/accuracies"),
        ("reward margin", "rewards_train/margins"),
        ("chosen reward", "rewards_train/chosen"),
        ("rejected reward", "rewards_train/rejected"),
        *_SHARED,
    ),
}
"""What is shown of each stage: its name here, and upstream's."""

HELD_OUT = (
    ("loss", "loss/eval"),
    ("accuracy", "rewards_eval/accuracies"),
    ("margin", "rewards_eval/margins"),
    ("chosen", "rewards_eval/chosen"),
    ("rejected", "rewards_eval/rejected"),
)

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-=+*%#"
_ARROWS = {1: "↗", -1: "↘", 0: "→"}
_ASCII_ARROWS = {1: "/", -1: "\\", 0: "-"}


def sparkline(values: Sequence[float], width: int, bars: str = _BARS) -> str:
    """A curve in one line of at most `width` characters; what is no number is a gap."""
    width = min(width, len(values))
    if width < 1:
        return ""
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [_mean(values[a:b]) for a, b in itertools.pairwise(edges)]
    finite = [value for value in means if math.isfinite(value)]
    if not finite:
        return " " * width
    low, high = min(finite), max(finite)
    if not math.isfinite(high - low) or high - low <= 1e-9 * max(abs(low), abs(high)):
        return "".join(bars[3] if math.isfinite(value) else " " for value in means)
    step = (high - low) / (len(bars) - 1)
    return "".join(bars[round((value - low) / step)] if math.isfinite(value) else " " for value in means)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def trend(values: Sequence[float]) -> int | None:
    """Whether a metric rises (1), falls (-1) or neither (0), by its last tenth against the tenth before.

    A difference counts if it is larger than twice its standard error. None as long as there are fewer than ten points.
    """
    finite = [value for value in values if math.isfinite(value)]
    width = max(5, len(finite) // 10)
    if len(finite) < 2 * width:
        return None
    last, before = finite[-width:], finite[-2 * width : -width]
    difference = statistics.fmean(last) - statistics.fmean(before)
    error = math.sqrt((statistics.variance(last) + statistics.variance(before)) / width)
    if not math.isfinite(difference) or abs(difference) <= max(2 * error, 1e-9 * abs(before[-1])):
        return 0
    return 1 if difference > 0 else -1


def number(value: float | None) -> str:
    """A metric to four digits, for a column of nine characters."""
    return "" if value is None else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, with days where there are any."""
    days, rest = divmod(int(max(seconds, 0)), 86_400)
    return f"{days} d " * (days > 0) + str(datetime.timedelta(seconds=rest))


class View:
    """Draws a run at any size. It keeps the curves that it has drawn: they are drawn anew once they have grown by a
    hundredth, which keeps what this costs the training small."""

    def __init__(self, run: Following, footer: str = "", ascii_only: bool = False) -> None:
        self._run = run
        self._footer = footer
        self._ascii = ascii_only
        self._drawn: dict[str, tuple[tuple[int, int], str, str]] = {}

    def lines(self, width: int, height: int, now: float) -> list["Text"]:
        """`height` lines of at most `width` cells: what matters most where not all fits. `now`: seconds since 1970."""
        run = self._run
        width = max(width, 20)
        head = [*self._head(width, now), self._progress(width)]
        table = self._table(width)
        state = self._state(width, now)
        warnings = self._warnings(width)
        footer = [self._text(self._footer, width, "dim")] if self._footer else []
        room = height - len(head) - len(table) - len(state) - len(footer)
        warnings = warnings[: max(room, 0)]
        room -= len(warnings)
        blank = [self._text("", width)]
        spaced = room >= 3
        tail = self._tail(width, room - 5) if room >= 8 and run.tail else []
        body = [
            *head,
            *blank * spaced,
            *table,
            *blank * spaced,
            *state,
            *blank * (spaced and bool(warnings)),
            *warnings,
        ]
        body = [*body, *blank * bool(tail), *tail][: height - len(footer)]
        return [*body, *blank * (height - len(footer) - len(body)), *footer]

    def summary(self, width: int, now: float) -> list["Text"]:
        """The same for a run that has ended, as lines that stay on the terminal."""
        width = max(width, 20)
        return [*self._head(width, now), self._progress(width), *self._table(width), *self._state(width, now)]

    def _text(self, text: str, width: int, style: str = "") -> "Text":
        from rich.text import Text

        line = Text(printable(clean(text)), style=style, no_wrap=True)
        line.truncate(width, overflow="ellipsis")
        return line

    def _head(self, width: int, now: float) -> list["Text"]:
        run = self._run
        elapsed = duration((run.ended or now) - run.began)
        right = printable(clean(f"{run.status}  {elapsed}"))
        left = f"{run.stage} of {run.model}"
        gap = width - len(right) - 2
        title = self._text(left, max(gap, 1), "bold")
        title.pad_right(max(gap - title.cell_len, 0) + 2)
        title.append(right, style="not bold")
        title.truncate(width)
        return [title, self._text(_shortened(str(run.folder), width), width, "dim")]

    def _progress(self, width: int) -> "Text":
        run = self._run
        if not run.planned_examples:
            return self._text(f"{run.examples:,} examples", width)
        share = min(run.examples / run.planned_examples, 1.0)
        left = run.seconds_left()
        words = [f"{run.examples:,} of {run.planned_examples:,} examples", f"{share:.0%}"]
        words += [f"{duration(left)} left"] if left and run.ended is None else []
        text = "  ".join(words)
        room = width - len(text) - 2
        if room < 8:
            return self._text(text, width)
        full, empty = ("#", ".") if self._ascii else ("━", "─")
        filled = int(share * room)
        line = self._text(full * filled, width, "bold")
        line.append(empty * (room - filled), style="not bold dim")
        line.append(f"  {text}", style="not bold")
        return line

    def _table(self, width: int) -> list["Text"]:
        """A line a metric: its last value, whether it rises or falls, and its curve."""
        lines = []
        steps = self._run.curves.steps
        last = self._run.curves.last
        for name, key in METRICS[self._run.stage]:
            curve_width = width - 31
            arrow, curve = self._curve(key, steps, curve_width)
            value = number(last.values.get(key)) if last else ""
            line = self._text(f"{name:<16}", width)
            line.append(f"{value:>10}", style="bold")
            line.append(f"  {arrow:<1}  ")
            line.append(curve, style="dim" if last is None else "cyan")
            line.truncate(width)
            lines.append(line)
        return lines

    def _curve(self, key: str, steps: list[metrics.Record], width: int) -> tuple[str, str]:
        known = self._drawn.get(key)
        if known and known[0][1] == width and 0 <= len(steps) - known[0][0] <= known[0][0] // 100:
            return known[1], known[2]
        values = [each.values.get(key, math.nan) for each in steps]
        rising = trend(values)
        arrow = "" if rising is None else (_ASCII_ARROWS if self._ascii else _ARROWS)[rising]
        curve = sparkline(values, width, _ASCII_BARS if self._ascii else _BARS)
        self._drawn[key] = ((len(steps), width), arrow, curve)
        return arrow, curve

    def _state(self, width: int, now: float) -> list["Text"]:
        """The last evaluation, the last checkpoint, and what it is doing."""
        run = self._run
        facts = []
        if run.curves.evaluations:
            last = run.curves.evaluations[-1]
            shown = [f"{name} {last.values[key]:.3g}" for name, key in HELD_OUT if key in last.values]
            facts.append(("held out", f"{', '.join(shown)} (after {last.examples:,})"))
        else:
            facts.append(("held out", "not evaluated yet"))
        if run.checkpoint:
            name, moment = run.checkpoint
            ago = "" if run.ended else f", {duration(now - moment)} ago"
            facts.append(("checkpoint", f"{name}{ago}"))
        else:
            facts.append(("checkpoint", "none yet"))
        if run.curves.unreadable:
            facts.append(("log", f"{run.curves.unreadable} lines of metrics could not be read"))
        if run.ended is None:
            facts.append(("now", run.notices[-1] if run.notices else run.doing or "training"))
        return [self._text(f"{name:<12}{what}", width) for name, what in facts]

    def _warnings(self, width: int) -> list["Text"]:
        lines = []
        for advice in self._run.advice:
            style = "yellow" if advice.level == "warning" else "dim"
            text = printable(clean(f"{advice.level}: {advice.what} {advice.mend}"))
            lines += [self._text(each, width, style) for each in textwrap.wrap(text, width, subsequent_indent="  ")]
        return lines

    def _tail(self, width: int, count: int) -> list["Text"]:
        rule = "-" if self._ascii else "─"
        shown = list(self._run.tail)[-count:]
        title = f"{rule * 2} train.log "
        return [self._text(title + rule * (width - len(title)), width, "dim"), *(self._text(t, width) for t in shown)]


def _shortened(path: str, width: int) -> str:
    """A path that keeps its end, which tells runs apart."""
    return path if len(path) <= width else "…" + path[len(path) - width + 1 :]

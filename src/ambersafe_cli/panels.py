"""What is drawn of a run: which curves matter for a stage, as points ready to draw. Nothing here draws."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ambersafe_cli import curves, metrics

POINTS = 512
"""Points of a curve that are drawn at most: a panel is no wider than that in pixels."""

_SMOOTH_FROM = 30
"""A curve of fewer steps is drawn as it is."""


@dataclass(frozen=True)
class Series:
    """One quantity in a panel, by upstream's names in training and in an evaluation; `label` if there are several."""

    train: str
    evaluation: str | None = None
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `name` is an identifier, `unit` what the y axis counts, if that takes a word; `level` a value
    that means something, `level_name` what; `limits` those of the y axis where they are known beforehand."""

    name: str
    title: str
    unit: str
    series: tuple[Series, ...]
    is_smoothed: bool = True
    level: float | None = None
    level_name: str = ""
    limits: tuple[float, float] | None = None


def _pair(kind: str) -> tuple[Series, ...]:
    return tuple(Series(f"{kind}_train/{each}", f"{kind}_eval/{each}", each) for each in ("chosen", "rejected"))


_GRADIENT = Panel("gradient", "Gradient norm", "before clipping", (Series("grad_norm"),))
_RATE = Panel("rate", "Learning rate", "", (Series("learning_rate"),), is_smoothed=False)
_SPEED = Panel("speed", "Speed", "examples a second", (Series("examples_per_second"),))
_LOSS = (Series("loss/train", "loss/eval"),)
_ACCURACY = (Series("rewards_train/accuracies", "rewards_eval/accuracies"),)
_MARGIN = (Series("rewards_train/margins", "rewards_eval/margins"),)

PANELS: Mapping[str, tuple[Panel, ...]] = {
    "sft": (Panel("loss", "Loss", "nats a response", _LOSS), _GRADIENT, _RATE, _SPEED),
    "dpo": (
        Panel("loss", "Loss", "nats a pair", _LOSS),
        Panel(
            "accuracy",
            "Reward accuracy",
            "share of pairs",
            _ACCURACY,
            level=0.5,
            level_name="by chance",
            limits=(-0.03, 1.03),
        ),
        Panel("margin", "Reward margin", "nats times beta", _MARGIN, level=0.0),
        Panel("rewards", "Rewards", "nats times beta", _pair("rewards"), level=0.0),
        Panel("logps", "Log-probabilities", "nats a response", _pair("logps")),
        _GRADIENT,
        _RATE,
        _SPEED,
    ),
}
"""The panels of each stage, in the order in which they are read."""


@dataclass(frozen=True)
class Line:
    """A series of one run as points (training examples, value); a value that is no number is NaN and leaves a gap.

    `steps` is what was logged, thinned so that the extremes stay; `smooth` its running mean, empty where there is too
    little to smooth; `evaluations` the points on held-out rows.
    """

    label: str
    steps: list[tuple[int, float]]
    smooth: list[tuple[int, float]]
    evaluations: list[tuple[int, float]]


def of_stage(stage: str, runs: Sequence[curves.Curves]) -> list[Panel]:
    """The panels for which at least one of the runs has something to draw."""
    known = {key for run in runs for records in (run.steps, run.evaluations) for each in records for key in each.values}
    return [p for p in PANELS[stage] if any(s.train in known or s.evaluation in known for s in p.series)]


def lines(panel: Panel, run: curves.Curves) -> list[Line]:
    """What a run has to draw in a panel, a line a series."""
    found = []
    steps = run.steps
    for series in panel.series:
        points = _points(steps, series.train)
        smooth = []
        if panel.is_smoothed and len(points) >= _SMOOTH_FROM:
            thin = means(points, POINTS)
            smooth = running_mean(thin, max(3, len(thin) // 20))
        evaluations = _points(run.evaluations, series.evaluation) if series.evaluation else []
        found.append(Line(series.label, extremes(points, POINTS), smooth, evaluations))
    return found


def _points(records: Sequence[metrics.Record], key: str) -> list[tuple[int, float]]:
    found = [(each.examples, each.values[key]) for each in records if key in each.values]
    return [(examples, value if abs(value) < 1e300 else math.nan) for examples, value in found]  # of NaN, NaN


def extremes(points: list[tuple[int, float]], limit: int) -> list[tuple[int, float]]:
    """At most about twice `limit` of the points: of each group of neighbours the lowest and the highest, in order.

    A group that holds NaN keeps one, so that a gap stays.
    """
    if len(points) <= limit:
        return points
    found = []
    for group in _groups(points, limit):
        finite = sorted((value, index) for index, (_, value) in enumerate(group) if not math.isnan(value))
        gaps = [index for index, (_, value) in enumerate(group) if math.isnan(value)][:1]
        kept = {finite[0][1], finite[-1][1], *gaps} if finite else {0}
        found += [group[index] for index in sorted(kept)]
    return found


def means(points: list[tuple[int, float]], limit: int) -> list[tuple[int, float]]:
    """At most `limit` points: the mean of each group of neighbours, in the middle of it."""
    if len(points) <= limit:
        return points
    return [(group[len(group) // 2][0], _mean([value for _, value in group])) for group in _groups(points, limit)]


def running_mean(points: list[tuple[int, float]], width: int) -> list[tuple[int, float]]:
    """Each value's mean with its neighbours, `width` in all and fewer at the ends. NaN stays, and counts in no mean."""
    half = width // 2
    values = [value for _, value in points]
    return [
        (examples, value if math.isnan(value) else _mean(values[max(0, index - half) : index + half + 1]))
        for index, (examples, value) in enumerate(points)
    ]


def _mean(values: list[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return sum(value / len(finite) for value in finite) if finite else math.nan


def _groups(points: list[tuple[int, float]], count: int) -> list[list[tuple[int, float]]]:
    """The points in at most `count` groups of neighbours of one size; the last may be smaller."""
    size = math.ceil(len(points) / count)
    return [points[start : start + size] for start in range(0, len(points), size)]

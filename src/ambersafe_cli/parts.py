"""Means of parts of a curve, and whether they differ by more than the noise of its batches."""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

SURE = 4.0
"""Standard errors that a difference has to have. Many, as it is looked at again every few seconds."""


class Part(NamedTuple):
    """The mean of neighbouring values, with its standard error."""

    mean: float
    error: float


def part(values: Sequence[float]) -> Part:
    mean = statistics.fmean(values)
    # From the differences of neighbours, as a trend within the part is no noise.
    squares = math.fsum((after - before) ** 2 for before, after in pairwise(values))
    return Part(mean, math.sqrt(squares / 2 / (len(values) - 1) / len(values)))


def pieces(values: Sequence[float], count: int) -> list[Sequence[float]]:
    """Cut into so many neighbouring pieces, as equal as can be."""
    edges = [len(values) * number // count for number in range(count + 1)]
    return [values[begin:end] for begin, end in pairwise(edges)]


def best_and_last(values: Sequence[float], lowest: bool) -> tuple[Part, Part]:
    """The lowest or highest of the quarters that begin at 0/8 … 4/8, which do not touch the last one; and that one."""
    quarters = [part(values[len(values) * begin // 8 : len(values) * (begin + 2) // 8]) for begin in (0, 1, 2, 3, 4, 6)]
    *past, last = quarters
    return (min if lowest else max)(past, key=lambda part: part.mean), last


def is_above(high: Part, low: Part, by: float) -> bool:
    """Whether a part lies above another by so much, and surely."""
    return high.mean - low.mean > max(by, SURE * math.hypot(high.error, low.error))

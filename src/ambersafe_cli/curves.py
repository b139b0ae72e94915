"""A run's metrics as curves: in order, without what a later attempt did again, and never more than a few thousand."""

import math
from pathlib import Path

from ambersafe_cli import journal, metrics

LIMIT = 2048
"""Points that are kept of a curve at least, once there have been as many; there are never more than twice as many."""


class Curves:
    """The records of a run as they come.

    Where there are too many steps, neighbours are brought together into their mean: a run of any length has curves of
    the same size.
    """

    def __init__(self) -> None:
        self.train: list[metrics.Record] = []
        self.evaluations: list[metrics.Record] = []
        self.last: metrics.Record | None = None
        self.unreadable = 0
        self._attempt = 1
        self._a_point = 1  # how many steps a point of `train` stands for
        self._waiting: list[metrics.Record] = []

    def add(self, entry: journal.Entry) -> None:
        """Take the next entry of a run."""
        if isinstance(entry, metrics.Unreadable):
            self.unreadable += 1
            return
        if isinstance(entry, metrics.Total):
            return
        if entry.attempt > self._attempt or goes_back(self.last, entry):
            self._go_back(entry)
        if entry.kind == "eval":
            self.evaluations.append(entry)
            return
        self.last = entry
        self._waiting.append(entry)
        if len(self._waiting) >= self._a_point:
            self.train.append(mean(self._waiting))
            self._waiting = []
        if len(self.train) >= 2 * LIMIT:
            self._a_point *= 2
            self.train = [mean(self.train[i : i + 2]) for i in range(0, len(self.train), 2)]

    def _go_back(self, entry: metrics.Record) -> None:
        """Training has begun again from a checkpoint: what was done behind it comes again."""
        self._attempt = entry.attempt
        self.last = None
        self._waiting = []
        self.train = [each for each in self.train if each.examples < entry.examples]
        self.evaluations = [each for each in self.evaluations if each.examples < entry.examples]

    @property
    def steps(self) -> list[metrics.Record]:
        """The training records as far as they have come, the last ones included."""
        return self.train + ([mean(self._waiting)] if self._waiting else [])


def goes_back(last: metrics.Record | None, entry: metrics.Record) -> bool:
    """Whether an entry comes from behind the last step: torchrun starts again by itself, within an attempt."""
    if last is None:
        return False
    return entry.examples < last.examples or (entry.kind == "train" and entry.examples == last.examples)


def mean(records: list[metrics.Record]) -> metrics.Record:
    """The mean of neighbouring steps, in the place of the last; of what is not a number in one of them, NaN."""
    last = records[-1]
    if len(records) == 1:
        return last
    values = {
        key: value
        if key.startswith("counters/")
        else sum(each.values.get(key, math.nan) for each in records) / len(records)
        for key, value in last.values.items()
    }
    return metrics.Record(last.kind, last.examples, values, last.attempt, last.time)


def read(folder: Path) -> Curves:
    """The curves of a run from its folder; empty where nothing is known. Raises OSError."""
    curves = Curves()
    for entry in journal.read(folder):
        curves.add(entry)
    return curves

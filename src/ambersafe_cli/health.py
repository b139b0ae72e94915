"""What looks wrong with a run, in plain words: the form of it, the rules come next."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ambersafe_cli import metrics


@dataclass(frozen=True)
class Advice:
    level: Literal["warning", "note"]
    rule: str
    what: str
    mend: str


def look(
    stage: str, train: Sequence[metrics.Record], evals: Sequence[metrics.Record], planned_examples: int | None
) -> tuple[Advice, ...]:
    return ()

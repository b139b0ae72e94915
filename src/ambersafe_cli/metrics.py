"""The lines that train.py prints, as typed records."""

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ambersafe_cli.errors import RunFolderError

# Upstream, trainers.py: "train stats after N examples: {...}", "eval after N: {...}"; the floats in them are strings.
_STATS = re.compile(r"(?P<kind>train stats|eval) after (?P<examples>\d+)(?: examples)?: (?P<values>\{.*\})")
# Patches 0001 and 0006.
_RESOLVED = re.compile(r"resolved (?P<what>model|dataset) (?P<name>.+) to revision (?P<commit>[0-9a-f]{40})")


_ATTEMPT = "=== ambersafe: attempt "
_ATTEMPT_LINE = re.compile(rf"{_ATTEMPT}(\d{{1,9}})$")


@dataclass(frozen=True)
class Record:
    """The metrics of one training step or of one evaluation, after so many training examples.

    `values` by upstream's names: loss/train in nats a response (SFT) or a pair (DPO), rewards_train/accuracies from 0
    to 1, and so on; the same with _eval.
    """

    kind: Literal["train", "eval"]
    examples: int
    values: Mapping[str, float]
    attempt: int = 1


@dataclass(frozen=True)
class Log:
    """What a run's output says: its records in order, and the commits that names on the hub stood for."""

    records: tuple[Record, ...]
    model_commit: str | None
    data_commit: str | None

    def evaluations(self) -> tuple[Record, ...]:
        return tuple(record for record in self.records if record.kind == "eval")


def parse_line(line: str) -> Record | None:
    """Read one line; None for every line that is not one of metrics."""
    match = _STATS.search(line)
    if not match:
        return None
    try:
        printed = ast.literal_eval(match["values"])
        values = {str(key): float(value) for key, value in printed.items()}
        examples = int(match["examples"])
    except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError, OverflowError):
        return None
    return Record("eval" if match["kind"] == "eval" else "train", examples, values)


def begin_attempt(log: Path, number: int) -> None:
    """Mark, in a run's log, that what follows comes from a further attempt. Raises RunFolderError."""
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n{_ATTEMPT}{number}\n")
    except OSError as error:
        raise RunFolderError(f"Cannot write {log}: {error.strerror}") from error


def parse(lines: Iterable[str]) -> Log:
    """Read the lines of a run's output."""
    records: list[Record] = []
    commits: dict[str, str] = {}
    attempt = 1
    for line in lines:
        if match := _ATTEMPT_LINE.match(line):
            attempt = int(match[1])
        elif record := parse_line(line):
            records.append(replace(record, attempt=attempt))
        elif match := _RESOLVED.search(line):
            commits[match["what"]] = match["commit"]
    return Log(tuple(records), commits.get("model"), commits.get("dataset"))


def read_log(path: Path) -> Log:
    """Read a run's train.log; one that is not there is an empty one."""
    if not path.exists():
        return parse([])
    with path.open(encoding="utf-8", errors="replace") as file:
        return parse(file)

"""The lines that train.py prints, as typed records. Read one by one: a log of any length takes the same memory."""

import ast
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from ambersafe_cli import files
from ambersafe_cli.errors import RunFolderError

# Upstream, trainers.py: "train stats after N examples: {...}", "eval after N: {...}"; the floats in them are strings.
_STATS = re.compile(r"(?P<kind>train stats|eval) after (?P<examples>\d{1,18})(?: examples)?: (?P<values>\{.*\})")
_TRAIN = "train stats after "
# As upstream prints it, each value a number that float() takes: whatever else there is goes the longer way.
_NUMBER = r"-?[0-9]++(?:\.[0-9]++)?+(?:e[-+][0-9]++)?+"
_VALUE = rf"'[\w/]++': (?:'{_NUMBER}'|{_NUMBER})"
_STEP = re.compile(rf"{_TRAIN}[0-9]{{1,18}} examples: \{{{_VALUE}(?:, {_VALUE})*+\}}\n")
_ALMOST = re.compile(r"(?:train stats|eval) after \d+(?: examples)?: ")
# The patch that says it.
_TOTAL = re.compile(r"training on (\d{1,18}) examples in all$")
# Patches 0001 and 0006.
_RESOLVED = re.compile(r"resolved (?P<what>model|dataset) (?P<name>.+) to revision (?P<commit>[0-9a-f]{40})")


_LONGEST = 20_000
"""Characters of a line: in a longer one, which is none of train.py's, the searches could take hours."""

_JSON = json.JSONDecoder()
_ATTEMPT = "=== ambersafe: attempt "
_ATTEMPT_LINE = re.compile(rf"{_ATTEMPT}(\d{{1,9}})$")


class Record(NamedTuple):  # of which there may be millions: a dataclass takes three times as long to make
    """The metrics of one training step or of one evaluation, after so many training examples.

    `values` by upstream's names: loss/train in nats a response (SFT) or a pair (DPO), rewards_train/accuracies from 0
    to 1, and so on; the same with _eval. `time` is when it was printed, in seconds since 1970, where that is known.
    """

    kind: Literal["train", "eval"]
    examples: int
    values: Mapping[str, float]
    attempt: int = 1
    time: float | None = None


@dataclass(frozen=True)
class Commit:
    """What a name on the hub stood for: `what` is model or dataset."""

    what: str
    commit: str


@dataclass(frozen=True)
class Total:
    """How many examples the run trains on in all, all epochs counted, before a first step is made."""

    examples: int
    attempt: int = 1
    time: float | None = None


@dataclass(frozen=True)
class Unreadable:
    """A line that begins as one of metrics does, and cannot be read."""

    line: str
    attempt: int = 1
    time: float | None = None


@dataclass(frozen=True)
class Log:
    """What a run's output says in all: its evaluations in order, its last step, the commits that names on the hub stood
    for, and how many of its lines are unreadable."""

    evaluations: tuple[Record, ...]
    last_step: Record | None
    model_commit: str | None
    data_commit: str | None
    unreadable: int


Found = Record | Total | Unreadable | Commit


def parse_line(line: str) -> Found | None:
    """Read one line; None for every line that has nothing to say here."""
    if len(line) > _LONGEST:
        return Unreadable(line) if _ALMOST.search(line) else None
    if " after " not in line:  # most lines: the searches cost more
        if match := _TOTAL.search(line):
            return Total(int(match[1]))
        match = _RESOLVED.search(line)
        return Commit(match["what"], match["commit"]) if match else None
    kind, examples, text = _parts(line)
    if kind:
        try:
            values = _values(text)
        except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError, OverflowError):
            return Unreadable(line)
        return Record("eval" if kind == "eval" else "train", int(examples), values)
    return Unreadable(line) if _ALMOST.search(line) else None


def _parts(line: str) -> tuple[str, str, str]:
    """Kind, number of examples and values of a line of metrics, as texts; nothing for another line."""
    if line.startswith(_TRAIN) and line.endswith("}\n"):  # nearly all: the search takes twice as long
        head, _, text = line.partition(" examples: ")
        examples = head[len(_TRAIN) :]
        if examples.isdecimal() and len(examples) <= 18 and text.startswith("{"):
            return "train stats", examples, text[:-1]
    match = _STATS.search(line)
    return (match["kind"], match["examples"], match["values"]) if match else ("", "", "")


def _values(text: str) -> Mapping[str, float]:
    """The numbers in Python's repr of a dict. JSON's parser is ten times as fast, and equal where nothing is escaped.

    Raises whatever a text that is none makes of it.
    """
    if '"' not in text and "\\" not in text:
        try:
            found, end = _JSON.raw_decode(text.replace("'", '"'))
            if end == len(text):
                return {key: float(value) for key, value in found.items()}
        except (ValueError, TypeError, RecursionError):
            pass
    values = {str(key): float(value) for key, value in ast.literal_eval(text).items()}
    "".join(values).encode()  # fails for half a character, which no file can hold
    return values


def begin_attempt(log: Path, number: int) -> None:
    """Mark, in a run's log, that what follows comes from a further attempt. Raises RunFolderError."""
    try:
        with os.fdopen(files.append(log), "a", encoding="utf-8") as file:
            file.write(f"\n{_ATTEMPT}{number}\n")
    except OSError as error:
        raise RunFolderError(f"Cannot write {log}: {error.strerror}") from error


def parse(lines: Iterable[str]) -> Iterator[Found]:
    """Read the lines of a run's output, one by one, each with the attempt that it is of."""
    attempt = 1
    for line in lines:
        found = parse_line(line)
        if found is None:
            if match := _ATTEMPT_LINE.match(line):
                attempt = int(match[1])
        elif attempt == 1 or isinstance(found, Commit):
            yield found
        else:
            yield found._replace(attempt=attempt) if isinstance(found, Record) else replace(found, attempt=attempt)


def read(path: Path) -> Iterator[Found]:
    """Read a run's train.log one by one; one that is not there is an empty one."""
    if path.exists():
        yield from parse(_lines(path))


def _lines(path: Path) -> Iterator[str]:
    """Raises RunFolderError for what cannot be read, or is no file."""
    try:
        yield from files.read_lines(path)
    except OSError as error:
        raise RunFolderError(f"Cannot read {path}: {error.strerror}.") from error


def _without_superseded(path: Path) -> Iterator[str]:
    """The lines of a log, but of well-formed training steps that follow one another only the last.

    Looking takes a fifth of the time of reading the numbers, and of millions of steps one is wanted.
    """
    step = ""
    if path.exists():
        for line in _lines(path):
            if _STEP.fullmatch(line):
                step = line
                continue
            if step and not line.startswith("skipping logging"):
                yield step
                step = ""
            yield line
    if step:
        yield step


def read_log(path: Path) -> Log:
    """Read a run's train.log, and keep what a reader of the whole needs; one that is not there is an empty one."""
    evaluations: list[Record] = []
    last_step = None
    commits: dict[str, str] = {}
    unreadable = 0
    for found in parse(_without_superseded(path)):
        if isinstance(found, Record):
            if found.kind == "train":
                last_step = found
            else:
                evaluations.append(found)
        elif isinstance(found, Commit):
            commits[found.what] = found.commit
        elif isinstance(found, Unreadable):
            unreadable += 1
    return Log(tuple(evaluations), last_step, commits.get("model"), commits.get("dataset"), unreadable)

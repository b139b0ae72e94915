"""metrics.jsonl in a run's folder: what train.py printed of its metrics, one JSON object a line, as it comes.

Every line has `kind`, `time` (seconds since 1970) and `attempt`. Of kind `train` and `eval` it has `examples` and the
metrics by upstream's names, null for what is not a finite number; of kind `total` it has the `examples` that the run
will train on; of kind `unreadable` the `line`.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ambersafe_cli import files, metrics

FILE = "metrics.jsonl"
_LATEST = 253_402_300_800.0
"""The end of the year 9999, in seconds since 1970."""
_OWN = ("kind", "time", "attempt", "examples", "line")

Entry = metrics.Record | metrics.Total | metrics.Unreadable


def to_line(entry: Entry) -> str:
    """An entry as it stands in the file, with its line feed."""
    if isinstance(entry, metrics.Unreadable):
        own: dict[str, Any] = {"kind": "unreadable", "time": entry.time, "attempt": entry.attempt, "line": entry.line}
        return json.dumps(own) + "\n"
    if isinstance(entry, metrics.Total):
        own = {"kind": "total", "time": entry.time, "attempt": entry.attempt, "examples": entry.examples}
        return json.dumps(own) + "\n"
    values = {k: v if math.isfinite(v) else None for k, v in entry.values.items() if k not in _OWN}
    own = {"kind": entry.kind, "time": entry.time, "attempt": entry.attempt, "examples": entry.examples}
    return json.dumps({**own, **values}) + "\n"


def from_line(line: str) -> Entry:
    """The entry that a line holds. One that is torn, or no entry of ours, is unreadable, never an error."""
    try:
        found = json.loads(line)
        kind, moment = found.pop("kind"), found.pop("time")
        attempt = _count(found.pop("attempt"))
        moment = None if moment is None else float(moment)
        if moment is not None and not 0 <= moment < _LATEST:
            raise ValueError("no time")
        if kind == "unreadable":
            return metrics.Unreadable(str(found["line"]), attempt, moment)
        if kind not in ("train", "eval", "total"):
            return metrics.Unreadable(line)
        examples = _count(found.pop("examples"))
        if kind == "total":
            return metrics.Total(examples, attempt, moment)
        values = {key: math.nan if value is None else float(value) for key, value in found.items()}
        "".join(values).encode()  # fails for half a character, which JSON can hold, and no file
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return metrics.Unreadable(line)
    return metrics.Record(kind, examples, values, attempt, moment)


def _count(value: Any) -> int:
    if not 0 <= int(value) < 10**18:  # as metrics.parse_line has it
        raise ValueError("no count")
    return int(value)


class Journal:
    """Writes metrics.jsonl while a run trains. A full disk loses lines, it never stops the training."""

    def __init__(self, folder: Path, attempt: int) -> None:
        self._path = folder / FILE
        self._attempt = attempt
        self._is_torn = self._path.exists() and not _ends_with_line_feed(self._path)

    def take(self, line: str) -> Entry | None:
        """Read a line of train.py's output, write what it says, and return it; None where it is not about metrics."""
        found = metrics.parse_line(line)
        if found is None or isinstance(found, metrics.Commit):
            return None
        now = round(time.time(), 3)
        if isinstance(found, metrics.Record):
            entry: Entry = found._replace(attempt=self._attempt, time=now)
        else:
            entry = replace(found, attempt=self._attempt, time=now)
        self._write(to_line(entry).encode())
        return entry

    def _write(self, data: bytes) -> None:
        """Append a line in one write, whole where the disk has room: who reads along sees it at once."""
        data = b"\n" + data if self._is_torn else data
        with contextlib.suppress(OSError):
            file = files.append(self._path)
            try:
                self._is_torn = os.write(file, data) < len(data)
            finally:
                os.close(file)


def _ends_with_line_feed(path: Path) -> bool:
    try:
        with files.open_to_read(path) as file:
            return file.seek(0, os.SEEK_END) == 0 or (file.seek(-1, os.SEEK_END) and file.read(1)) == b"\n"
    except OSError:
        return False


def read(folder: Path) -> Iterator[Entry]:
    """What is known of a run's metrics, one by one: from metrics.jsonl, or, where a run has none, from its train.log.

    A last line that is not whole yet is left away. Raises OSError.
    """
    path = folder / FILE
    if not path.exists():
        yield from (each for each in metrics.read(folder / "train.log") if not isinstance(each, metrics.Commit))
        return
    yield from Follower(path).new()


class Follower:
    """Reads a file that grows: each call of `new` gives the entries that have come since the last one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> Iterator[Entry]:
        """The entries since the last call, without a last line that is not whole yet. Raises OSError."""
        if not self._path.exists():
            return
        with files.open_to_read(self._path) as file:
            file.seek(self._offset)
            is_rest = False  # of a line that is longer than one is looked at
            while line := file.readline(files.LONGEST_LINE):
                is_whole = line.endswith(b"\n")
                if not is_whole and len(line) < files.LONGEST_LINE:
                    return
                self._offset += len(line)
                if line.strip() and not is_rest:
                    yield from_line(line.decode(errors="replace"))
                is_rest = not is_whole

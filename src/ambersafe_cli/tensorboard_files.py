"""TensorBoard's event files, in a run's folder: written while it trains, or later from its metrics.jsonl.

They are written by the record writer of the package `tensorboard`, without its thread and its queue: each record is one
write, seen at once. Tags are upstream's names, the step is the number of training examples.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambersafe_cli import curves, display, extras, files, journal, metrics
from ambersafe_cli.errors import RunFolderError

if TYPE_CHECKING:
    from ambersafe_cli import runs

FOLDER = "tensorboard"
_FILE = "events.out.tfevents.ambersafe"  # TensorBoard reads what has tfevents in its name, in the order of the names
EXTRA = "tensorboard"

Take = Callable[[journal.Entry], None]


@contextlib.contextmanager
def of_attempt(folder: Path, record: "runs.Record") -> Iterator[Take]:
    """Give a function that takes each entry of the attempt which begins now, if the run was started with --tensorboard.

    It never raises: what could not be written is said when the attempt has ended, and the training goes on.
    """
    if record.get("tensorboard") is not True:
        yield lambda entry: None
        return
    number = len(record["attempts"])
    failures: list[Exception] = []
    with contextlib.ExitStack() as stack:
        try:
            (folder / FOLDER).mkdir(exist_ok=True)
            writer = stack.enter_context(_Writer(folder / FOLDER / f"{_FILE}-attempt-{number:04}", number))
        except (OSError, ImportError) as error:
            failures.append(error)

        def take(entry: journal.Entry) -> None:
            if not failures:
                try:
                    writer.take(entry)
                except (OSError, ValueError) as error:
                    failures.append(error)

        yield take
    for failure in failures:
        display.warn(
            f"TensorBoard's event files are not whole: {failure}. "
            f"`ambersafe plot --tensorboard {folder.name}` makes them of what is in {journal.FILE}."
        )


def make(folder: Path) -> Path:
    """Write all that is known of a run's metrics into one event file, in place of those written while it trained.

    Returns the folder to give to TensorBoard. Raises UsageError without the package, RunFolderError if it cannot be
    written or the metrics cannot be read.
    """
    extras.require("tensorboard", EXTRA)
    place = files.place_in(folder, FOLDER)
    temporary = place / ".events.new"
    try:
        place.mkdir(exist_ok=True)
        log = folder / "train.log"
        moment = log.stat().st_mtime if log.exists() else 0.0
        with _Writer(temporary, 1) as writer:
            for entry in journal.read(folder):
                writer.take(entry, moment)
        temporary.replace(place / _FILE)
        for path in place.glob(f"{_FILE}-attempt-*"):
            path.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RunFolderError(f"Cannot write {place}: {error.strerror}") from error
    return place


class _Writer:
    """One event file. Raises OSError, ImportError."""

    def __init__(self, path: Path, attempt: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event: Callable[..., Any] = event_pb2.Event
        self._summary: Callable[..., Any] = summary_pb2.Summary
        self._restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._attempt = attempt
        self._is_restart = attempt > 1
        self._last: metrics.Record | None = None
        self._file = os.fdopen(files.create(path), "wb", 0)
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def take(self, entry: journal.Entry, moment: float = 0.0) -> None:
        """Write an entry; one without a time gets that of `moment`, in seconds since 1970."""
        if not isinstance(entry, metrics.Record):
            return
        if entry.attempt > self._attempt or self._is_restart or curves.goes_back(self._last, entry):
            # Has TensorBoard forget what the attempt before did behind the checkpoint from which this one goes on.
            self._attempt, self._is_restart, self._last = entry.attempt, False, None
            self._write(wall_time=entry.time or moment, step=entry.examples, session_log=self._restart)
        self._last = entry if entry.kind == "train" else self._last
        values = [{"tag": key, "simple_value": value} for key, value in entry.values.items()]
        self._write(wall_time=entry.time or moment, step=entry.examples, summary=self._summary(value=values))

    def _write(self, **fields: object) -> None:
        self._records.write(self._event(**fields).SerializeToString())

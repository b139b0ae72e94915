"""What a user sees of an attempt while it trains: the live view on a terminal, upstream's own lines elsewhere."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ambersafe_cli import child, display, following, journal, live, runs, tensorboard_files

STOPPING = "stopping: a checkpoint is saved when this step has ended; once more (Ctrl-C) stops at once"
_FOOTER = "Ctrl-C saves a checkpoint and stops. What train.py prints is in train.log."

LAST_LINES = 15
"""Lines of the output that are repeated behind the live view of a run that failed."""


@contextlib.contextmanager
def watching(
    folder: Path, record: runs.Record, plain: bool, is_stop_asked: Callable[[], bool]
) -> Iterator[child.Watcher]:
    """Keep metrics.jsonl, and show an attempt that begins in this block.

    On a terminal, unless `plain`, that is the live view and at its end a summary; elsewhere the child's own streams,
    and each advice on the run's health when it is due. What is amiss when it ends is said in both.
    """
    run = following.of(folder, record, "running")
    with contextlib.suppress(OSError):
        for entry in journal.read(folder):
            run.take_entry(entry)
    writer = journal.Journal(folder, len(record["attempts"]))
    is_live = not plain and live.is_possible()
    lock = threading.Lock()
    said: set[str] = set()

    def take(line: str, is_stdout: bool) -> None:
        entry = writer.take(line) if is_stdout else None
        with lock:
            if entry:
                run.take_entry(entry)
                to_tensorboard(entry)
            elif is_live:
                run.take_line(line)
            if entry and not is_live:
                run.look()
                _say_new(run, said)

    def notice() -> None:
        if is_live:
            run.notices.append(STOPPING)
        else:
            display.say(STOPPING)

    def look() -> None:
        with lock:
            run.look()

    watcher = child.Watcher(take, notice, is_stop_asked, passes_on=not is_live)
    try:
        with (
            tensorboard_files.of_attempt(folder, record) as to_tensorboard,
            live.shown(run, _FOOTER, lock, look) if is_live else contextlib.nullcontext(None) as aside,
        ):
            yield replace(watcher, aside=aside) if aside else watcher
    finally:
        run.look(at_once=True)
        if is_live:
            _leave(run)
        for advice in run.advice:
            if advice.rule not in said or is_live:
                display.find(advice.level, advice.what, advice.mend)


def _say_new(run: following.Following, said: set[str]) -> None:
    for advice in run.advice:
        if advice.rule not in said:
            said.add(advice.rule)
            display.find(advice.level, advice.what, advice.mend)


def _leave(run: following.Following) -> None:
    """Leave on the terminal what the view showed last, and, where it has not come to its end, the last lines."""
    has_ended = runs.checkpoint(run.folder).is_file()
    run.status, run.ended = "ended" if has_ended else "stopped", time.time()
    live.summarize(run)
    if not (has_ended or run.notices):  # who stopped it knows why
        for line in list(run.tail)[-LAST_LINES:]:
            display.say(f"  {line}")

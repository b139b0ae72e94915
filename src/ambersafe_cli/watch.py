"""`ambersafe watch`: the live view of a run that another process, or another machine, has."""

import codecs
import contextlib
import threading
import time
from pathlib import Path

from ambersafe_cli import display, files, following, journal, live, runs, slurm
from ambersafe_cli.errors import RunFolderError

_FOOTER = "Ctrl-C leaves; the run goes on."


def run(name: str | None, plain: bool) -> None:
    """Show a run, by default the newest, until it has ended; off a terminal, or `plain`, copy its train.log.

    Raises UsageError if there is none, RunFolderError if the log cannot be read.
    """
    found = runs.open_run(name)
    with contextlib.suppress(KeyboardInterrupt):
        found = _when_it_begins(found)
    if plain or not live.is_possible():
        try:
            _copy(found.folder)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise RunFolderError(f"Cannot read {found.folder / 'train.log'}: {error.strerror}.") from error
        return
    state = following.of(found.folder, found.record, found.status)
    entries = journal.Follower(found.folder / journal.FILE)
    output = Tail(found.folder / "train.log", following.TAIL)
    if not (found.folder / journal.FILE).exists():  # of an older version, or made by hand
        for entry in journal.read(found.folder):
            state.take_entry(entry)

    def update() -> None:
        with contextlib.suppress(OSError):
            for entry in entries.new():
                state.take_entry(entry)
            for line in output.new():
                state.take_line(line)
        now = runs.look(found.folder, by_hand=True)
        if now:
            state.status = now.status
            state.ended = None if now.status == "running" else runs.seconds(now.record.get("ended")) or time.time()
        state.look()

    update()
    if state.status == "running":
        with contextlib.suppress(KeyboardInterrupt), live.shown(state, _FOOTER, threading.Lock(), update):
            while state.status == "running":
                time.sleep(0.2)
        update()
    state.look(at_once=True)
    live.summarize(state)
    for advice in state.advice:
        display.find(advice.level, advice.what, advice.mend)
    if state.status == "running":
        display.say("the run goes on")


def _when_it_begins(run: runs.Run) -> runs.Run:
    """Wait as long as Slurm has a run in its queue, and say what it says of it; return the run as it is then."""
    job = (run.record.get("slurm") or {}).get("job_id")
    said = None
    while job and run.status not in ("running", "finished"):
        state = slurm.state(job, run.folder)
        if state is None:
            if run.status == slurm.QUEUED:
                display.warn(f"Slurm no longer has job {job}; what it printed is in {run.folder / 'slurm.log'}")
            break
        if state != said:
            display.say(f"Slurm's job {job}: {state}")
            said = state
        time.sleep(1)
        run = runs.look(run.folder) or run
    return run


class Tail:
    """The lines of a file that grows; of what is there at the beginning only the last ones."""

    def __init__(self, path: Path, count: int) -> None:
        self._path = path
        try:
            self._offset = max(0, path.stat().st_size - 200 * count)
        except OSError:
            self._offset = 0

    def new(self) -> list[str]:
        """The lines, and states of a progress bar, since the last call; not one whose end is still to come."""
        if not self._path.exists():
            return []
        with files.open_to_read(self._path) as file:
            file.seek(self._offset)
            data = file.read(files.LONGEST_LINE)
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1 or len(data) // files.LONGEST_LINE * files.LONGEST_LINE
        self._offset += end
        return data[:end].decode(errors="replace").replace("\r", "\n").splitlines()


def _copy(folder: Path) -> None:
    """Print train.log as it grows, until the run has ended; each state of a progress bar is a line of its own."""
    offset = 0
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    if not (folder / "train.log").exists():
        display.warn(f"{folder} has no train.log")
    while True:
        run = runs.look(folder, by_hand=True)
        is_running = run is not None and run.status == "running"
        with contextlib.suppress(FileNotFoundError), files.open_to_read(folder / "train.log") as file:
            file.seek(offset)
            while data := file.read(1 << 20):
                offset += len(data)
                display.write_part(decoder.decode(data).replace("\r\n", "\n").replace("\r", "\n"))
        if not is_running:
            return
        time.sleep(0.5)

"""A run that waits in Slurm: its folder and its record as of a run that has not begun, its script, and its job."""

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ambersafe_cli import display, files, runs, slurm
from ambersafe_cli.errors import SlurmError


def submit(
    folder: Path,
    record: runs.Record,
    name: str,
    wish: slurm.Wish,
    processes: int,
    flags: Sequence[str],
    after: str | None = None,
) -> str:
    """Make a run's folder, record and script, hand it to Slurm, and return the job's id.

    `processes` are those of each machine, `flags` those of `resume`, `after` is the job that must have ended well
    before. Raises SlurmError,
    RunFolderError.
    """
    text = slurm.script(wish, folder, name, flags)
    runs.make(folder)
    path = folder / slurm.SCRIPT
    files.write_lines(path, text.splitlines())
    queued: dict[str, Any] = {
        **record,
        "started": runs.now(),
        "ended": None,
        "exit_status": None,
        "attempts": [],
        "status": slurm.QUEUED,
        "slurm": {"job_id": None, "nodes": wish.nodes, "processes": processes},
    }
    runs.write(folder, queued)
    try:
        job = slurm.submit(path, after)
    except SlurmError:
        for each in (path, folder / "run.json"):  # or it would wait for ever for a job that there is not
            each.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
    try:
        queued["slurm"]["job_id"] = job
        runs.write(folder, queued)
        slurm.release(job)  # only now: the job writes into the record
    except BaseException:
        with contextlib.suppress(SlurmError):
            slurm.cancel(job)
        raise
    shown = shlex.quote(folder.name)
    display.say(f"run folder: {folder}")
    display.say(f"{record['stage']} is Slurm's job {job}{f', after job {after}' if after else ''}: {path}")
    display.say(f"ambersafe watch {shown} follows it, ambersafe stop {shown} stops it")
    return job

"""Runs that go on without a terminal: starting one in the background, and stopping it."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from ambersafe_cli import display, files, locks, runs, slurm, standstill
from ambersafe_cli.errors import RunFolderError, UsageError


def detach(folder: Path, python: str | None, allow_modified: bool) -> int:
    """Go on with a run whose record is written in a process of its own, which no terminal can end.

    Returns 0 once that process has the run, or its exit status if it ended before, after saying what it said.
    """
    before = _attempts(folder)
    log = folder / "launcher.log"
    begin = log.stat().st_size if log.exists() else 0
    with os.fdopen(_append(log), "ab") as file:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "ambersafe_cli", "resume", str(folder)]  # -P: no module of the working folder
            + (["--python", python] if python else [])
            + (["--allow-modified"] if allow_modified else []),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # train.log has it
            stderr=file,
            start_new_session=True,  # a SIGHUP of the terminal does not reach it
        )
    try:
        while child.poll() is None and _attempts(folder) == before:
            time.sleep(0.1)
    except KeyboardInterrupt:  # whoever presses Ctrl-C wants no run in the background
        child.terminate()
        child.wait()
        raise
    if _attempts(folder) == before:
        display.say(log.read_bytes()[begin:].decode(errors="replace").strip())
        return child.returncode or 70
    name = shlex.quote(folder.name)
    display.say(f"run folder: {folder}")
    display.say(f"it goes on without this terminal; its output is in {log.with_name('train.log')}")
    display.say(f"ambersafe show {name} tells how far it is, ambersafe stop {name} stops it")
    return 0


def _append(path: Path) -> int:
    try:
        return files.append(path)
    except OSError as error:
        raise RunFolderError(f"Cannot write {path}: {error.strerror}.", "Delete it.") from error


def _attempts(folder: Path) -> int:
    record = runs.read(folder)
    return len(record["attempts"]) if record else 0


def stop(name: str | None, now: bool) -> int:
    """Have a run, by its folder or name, save a checkpoint and stop, and wait for that; `now`: kill it. Return 0.

    Without a name it is the one run of this working folder that is running.

    Raises UsageError if there is no such run or no process has it, RunFolderError.
    """
    folder = _the_running_one() if name is None else runs.find(name)
    if not runs.is_running(folder):
        if _leave_queue(folder):
            return 0
        raise UsageError(f"{folder} is not running.", "`ambersafe runs` shows which are.")
    display.say("stopping it: a checkpoint is saved when its step has ended" if not now else "stopping it at once")
    for _ in range(2 if now else 1):
        locks.ask_to_stop(folder)
        while runs.is_running(folder) and locks.is_asked_to_stop(folder):
            time.sleep(0.1)
    is_said = now
    while runs.is_running(folder):
        if not is_said and (said := standstill.of_run(folder)):
            display.warn(f"{said} {standstill.MEND}")
            is_said = True
        time.sleep(0.1)
    run = runs.look(folder)
    status = run.status if run else "gone"
    display.say(f"{folder}: {status}")
    if run and run.record.get("exit_status") in slurm.AGAIN and _leave_queue(folder):
        return 0  # a scheduler had stopped it first, and would start it again
    if status != "finished":
        display.say(f"to go on with it: {shlex.join(['ambersafe', 'resume', str(folder)])}")
    return 0


def _leave_queue(folder: Path) -> bool:
    """Take a run out of Slurm's queue; False if it is not in it. Raises SlurmError, RunFolderError."""
    record = runs.read(folder)
    job = (record or {}).get("slurm", {}).get("job_id")
    if not record or not job or record["status"] == "finished" or not slurm.state(job, folder):
        return False
    slurm.cancel(job)
    runs.write(folder, {**record, "status": "interrupted", "ended": record["ended"] or runs.now()})
    display.say(f"{folder} is taken out of Slurm's queue, where it was job {job}")
    return True


def _the_running_one() -> Path:
    running = [run.folder for run in runs.list_runs() if run.status == "running"]
    if len(running) != 1:
        raise UsageError(
            f"{len(running) or 'No'} runs under {runs.folder_of_runs()} are running.",
            f"Name one: {', '.join(folder.name for folder in running)}." if running else "",
        )
    return running[0]

"""One attempt at a run, the first or a later one: from the lock on its folder to the exit status, and `resume`."""

import os
import shlex
import zipfile
from collections.abc import Mapping
from pathlib import Path

from ambersafe_cli import display, environment, launch, metrics, patches, recovery, runs, upstream
from ambersafe_cli.errors import CloneError, NoCheckpointError, RunFolderError, UsageError
from ambersafe_cli.overrides import assign

STOPPING = "stopping: a checkpoint is saved when this step has ended; once more (Ctrl-C) stops at once"


def run(plan: launch.Launch, record: runs.Record) -> int:
    """Run a new run's train.py to its end, keep run.json up to date, and return the exit status.

    `record` is what run.json says of what is trained.
    Raises RunFolderError, UsageError if another process has the folder, NoCheckpointError if nothing is left of it.
    """
    with runs.locked(plan.run_folder):
        runs.require_empty(plan.run_folder)  # another run may have been here since it was made
        return _attempt(plan, record)


def _attempt(plan: launch.Launch, record: runs.Record) -> int:
    """The same for each attempt, with the record of earlier ones. Only for who has the run's lock."""
    folder = plan.run_folder
    with upstream.in_use(Path(record["upstream"]["folder"])):
        number = len(record.get("attempts", [])) + 1
        started = {"started": runs.now(), "host": runs.host(), "pid": os.getpid(), "command": list(plan.argv)}
        record = {"started": started["started"], **record, "status": "running", "ended": None, "exit_status": None}
        record["attempts"] = [*record.get("attempts", []), started]
        runs.write(folder, record)
        display.say(f"run folder: {folder}")
        log_file = folder / "train.log"
        try:
            if number > 1:
                metrics.begin_attempt(log_file, number)
            outcome = launch.run(plan, log_file, lambda: display.say(STOPPING))
        except BaseException:
            runs.write(folder, {**record, "status": "failed", "ended": runs.now()})
            raise
        return _end(folder, record, outcome)


def _end(folder: Path, record: runs.Record, outcome: launch.Outcome) -> int:
    log = metrics.read_log(folder / "train.log")
    has_checkpoint = runs.checkpoint(folder).is_file()
    finished = outcome.exit_status == 0 and has_checkpoint
    end = {"ended": runs.now(), "exit_status": outcome.exit_status}
    record = {**record, **end, "attempts": [*record["attempts"][:-1], {**record["attempts"][-1], **end}]}
    record["status"] = "finished" if finished else "interrupted" if outcome.interrupted else "failed"
    record["model"] = {**record["model"], "commit": log.model_commit}
    record["data"] = {**record["data"], "commit": log.data_commit}
    record["last_metrics"] = dict(log.evaluations()[-1].values) if log.evaluations() else None
    try:
        runs.write(folder, record)
    except RunFolderError:
        if finished:  # else the child's own failure is what the user has to see
            raise
    if outcome.exit_status == 0 and not has_checkpoint:
        raise NoCheckpointError(
            f"train.py ended without an error, but left no {runs.checkpoint(folder)}.",
            f"Its output is in {folder / 'train.log'}.",
        )
    if finished:
        _show_end(folder, record, log)
    else:
        how = "was stopped" if outcome.interrupted else f"failed with exit status {outcome.exit_status}"
        display.say(f"{record['stage']} {how}; its output is in {folder / 'train.log'}")
        if checkpoint := _newest_checkpoint(folder):
            display.say(f"to go on from {checkpoint}: {shlex.join(['ambersafe', 'resume', str(folder)])}")
    return outcome.exit_status


def _show_end(folder: Path, record: runs.Record, log: metrics.Log) -> None:
    if log.evaluations():
        last = log.evaluations()[-1]
        shown = [f"{key.replace('_eval', '').replace('/eval', '')} {value:.5g}" for key, value in last.values.items()]
        display.say(f"held out, after {last.examples} examples: {', '.join(shown)}")
    display.say(f"checkpoint: {runs.checkpoint(folder)}")
    display.say(f"next: {shlex.join(record['next_command'])}")


def _newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that looks whole, or None. Quick: `resume` looks at every byte."""
    for path in recovery.numbered(folder):
        if all(zipfile.is_zipfile(path / name) for name in recovery.FILES_OF_A_CHECKPOINT):
            return path
    return None


def resume(folder: Path | None, python: str | None, allow_modified: bool) -> int:
    """Go on with a run (by default the newest one here that has not finished) in its own folder.

    Raises UsageError for a run that cannot go on, RunFolderError if its run.json cannot be read, CloneError if its
    clone is not what it was.
    """
    folder = folder.absolute() if folder else _newest_unfinished()
    if runs.read(folder) is None:
        raise UsageError(f"{folder} is not the folder of a run.", "`ambersafe runs` lists them.")
    with runs.locked(folder):
        record = runs.read(folder)  # once more: whoever had the lock may have changed it
        if record is None or record["status"] == "finished":
            raise UsageError(f"{folder} has finished.", f"Its checkpoint is {runs.checkpoint(folder)}.")
        _check_clone(record["upstream"], allow_modified)
        command = list(record["command"])
        command[0] = python or command[0]
        environment.probe(command[0]).require_packages()
        checkpoint = recovery.put_in_order(folder)
        if checkpoint:
            if not record["upstream"]["can_resume"]:
                raise UsageError("The clone of this run lacks the patch that resumes.", "Start the stage again.")
            command.append(assign("resume", str(checkpoint)))
        display.say(f"going on from {checkpoint}" if checkpoint else "no checkpoint was saved: from the beginning")
        return _attempt(launch.Launch(folder, tuple(command), record["environment"], 1, ()), record)


def _newest_unfinished() -> Path:
    found = [run for run in runs.list_runs() if run.record["status"] != "finished"]
    if not found:
        raise UsageError(f"There is no unfinished run under {runs.folder_of_runs()}.", "Give the folder of one.")
    return found[-1].folder


def _check_clone(recorded: Mapping[str, str], allow_modified: bool) -> None:
    """Raise CloneError if the clone has changed since the run started: the numbers would not go on."""
    state = upstream.inspect(Path(recorded["folder"]), patches.read_series())
    if (state.head, bool(state.edited)) != (recorded["head"], bool(recorded["edited"])) and not allow_modified:
        raise CloneError(
            f"{state.folder} is at {state.head[:12]}{' with edits' if state.edited else ''}; "
            f"the run was started with {recorded['head'][:12]}.",
            f"`git -C {state.folder} checkout {recorded['head']}` brings it back; --allow-modified goes on as it is.",
        )

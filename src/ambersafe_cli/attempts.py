"""One attempt at a run, the first or a later one: from the lock on its folder to the exit status, and `resume`."""

import math
import os
import shlex
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ambersafe_cli import (
    checkpoints,
    child,
    control,
    display,
    environment,
    launch,
    locks,
    metrics,
    onlooker,
    patches,
    provenance,
    recorded,
    recovery,
    runs,
    upstream,
)
from ambersafe_cli.errors import (
    NoCheckpointError,
    RunFolderError,
    UsageError,
)
from ambersafe_cli.overrides import assign


def run(plan: launch.Launch, record: runs.Record, plain: bool) -> int:
    """Run a new run's train.py to its end, keep run.json up to date, and return the exit status.

    `record` is what run.json says of what is trained; `plain` leaves the live view away.
    Raises RunFolderError, UsageError if another process has the folder, NoCheckpointError if nothing is left of it.
    """
    with locks.locked(plan.run_folder):
        locks.take_stop_request(plan.run_folder)
        runs.require_empty(plan.run_folder)  # another run may have been here since it was made
        return _attempt(plan, record, plain)


def _attempt(plan: launch.Launch, record: runs.Record, plain: bool, also: Mapping[str, Any] | None = None) -> int:
    """The same for each attempt, with the record of earlier ones; `also` is what there is to say of this attempt alone.

    Only for who has the run's lock.
    """
    folder = plan.run_folder
    with upstream.in_use(plan.clone):
        earlier = record.get("attempts") or []
        number = len(earlier) + 1
        started = {"started": runs.now(), "host": runs.host(), "pid": os.getpid(), "command": list(plan.argv)}
        started |= also or {}
        record = {"started": started["started"], **record, "status": "running", "ended": None, "exit_status": None}
        record["attempts"] = [*earlier, started]
        runs.write(folder, record)
        display.say(f"run folder: {folder}")
        log_file = folder / "train.log"
        try:
            if number > 1:
                metrics.begin_attempt(log_file, number)
            with onlooker.watching(folder, record, plain, lambda: _listen(folder)) as watcher:
                outcome = child.run(plan, log_file, watcher)
        except BaseException:
            runs.write(folder, {**record, "status": "failed", "ended": runs.now()})
            raise
        return _end(folder, record, outcome)


def _listen(folder: Path) -> bool:
    """Called every second: give a sign of life, and hear whether the run shall stop."""
    locks.give_sign_of_life(folder)
    return locks.take_stop_request(folder)


def _end(folder: Path, record: runs.Record, outcome: child.Outcome) -> int:
    log = metrics.read_log(folder / "train.log")
    has_checkpoint = runs.checkpoint(folder).is_file()
    finished = outcome.exit_status == 0 and has_checkpoint
    end = {"ended": runs.now(), "exit_status": outcome.exit_status}
    record = {**record, **end, "attempts": [*record["attempts"][:-1], {**record["attempts"][-1], **end}]}
    record["status"] = "finished" if finished else "interrupted" if outcome.interrupted else "failed"
    record["model"] = {**record["model"], "commit": log.model_commit}
    record["data"] = {**record["data"], "commit": log.data_commit}
    record["checkpoint_fingerprint"] = checkpoints.fingerprint(runs.checkpoint(folder))
    last = log.evaluations[-1].values if log.evaluations else None
    # JSON has no NaN
    record["last_metrics"] = last and {key: value if math.isfinite(value) else None for key, value in last.items()}
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
    if log.evaluations:
        last = log.evaluations[-1]
        shown = [f"{key.replace('_eval', '').replace('/eval', '')} {value:.5g}" for key, value in last.values.items()]
        display.say(f"held out, after {last.examples} examples: {', '.join(shown)}")
    display.say(f"checkpoint: {runs.checkpoint(folder)}")
    metric = runs.Run(folder, record, record["status"]).setting("keep_best")
    best, value = (metric and runs.best_checkpoint(folder, metric)) or (folder / "LATEST", 0.0)
    if best.name != "LATEST":
        display.warn(f"{best / 'policy.pt'} was better by {metric}: {value:.5g}; `ambersafe dpo --archive` takes it")
    display.say(f"next: {shlex.join(record['next_command'])}")


def _newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that looks whole, or None. Quick: `resume` looks at every byte."""
    for path in runs.steps(folder):
        if all(zipfile.is_zipfile(path / name) for name in recovery.FILES_OF_A_CHECKPOINT):
            return path
    return None


def resume(name: str | None, python: str | None, allow_modified: bool, detach: bool, plain: bool) -> int:
    """Go on with a run, by its folder or name (by default the newest one here that has not finished), where it is.

    Raises UsageError for a run that cannot go on, RunFolderError if its run.json cannot be read, CloneError if the
    series that it was started with is gone.
    """
    folder = runs.find(name) if name is not None else _newest_unfinished()
    if detach:
        return control.detach(folder, python, allow_modified)
    with locks.locked(folder):
        locks.take_stop_request(folder)  # one that came after an earlier attempt had ended
        runs.require_not_elsewhere(folder)
        record = runs.read(folder)  # only now: whoever had the lock may have changed it
        if record is None:
            raise UsageError(f"{folder} is not the folder of a run.", "`ambersafe runs` lists them.")
        if record["status"] == "finished":
            raise UsageError(f"{folder} has finished.", f"Its checkpoint is {runs.checkpoint(folder)}.")
        clone = recorded.clone(record["upstream"], allow_modified)
        pins, settings = recorded.pinned(record, folder)
        command = [*recorded.command(record, clone, folder, python), *pins]
        training = environment.probe(command[0], ask_torch=True)
        training.require_packages()
        for error in recorded.changed_inputs(record, settings, training.python):
            if not allow_modified:
                raise error
            display.warn(error.message)
        checkpoint = recovery.put_in_order(folder)
        if checkpoint:
            if not record["upstream"]["can_resume"]:
                raise UsageError("The clone of this run lacks the patch that resumes.", "Start the stage again.")
            command.append(assign("resume", str(checkpoint)))
        if record["attempts"]:
            display.say(f"going on from {checkpoint}" if checkpoint else "no checkpoint was saved: from the beginning")
        state = upstream.inspect(clone, patches.read_series())
        also = {
            "python": provenance.of_python(training),
            "variables": provenance.of_variables(),
            "allow_modified": allow_modified,
            "upstream": {"folder": str(clone), "head": state.head, "tree": state.tree, "edited": list(state.edited)},
        }
        return _attempt(launch.Launch(folder, clone, tuple(command), settings, 1, ()), record, plain, also)


def _newest_unfinished() -> Path:
    found = [run for run in runs.list_runs() if run.status not in ("finished", "running")]
    if not found:
        raise UsageError(f"There is no unfinished run under {runs.folder_of_runs()}.", "Give the folder of one.")
    return found[-1].folder

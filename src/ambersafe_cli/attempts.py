"""One attempt at a run, the first or a later one: from the lock on its folder to the exit status, and `resume`."""

import contextlib
import math
import os
import re
import shlex
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ambersafe_cli import (
    checkpoints,
    child,
    control,
    display,
    environment,
    integrity,
    launch,
    locks,
    machines,
    metrics,
    onlooker,
    patches,
    provenance,
    recorded,
    recovery,
    runs,
    slurm,
    upstream,
)
from ambersafe_cli.errors import (
    NoCheckpointError,
    RunFolderError,
    SlurmError,
    UsageError,
)
from ambersafe_cli.overrides import assign
from ambersafe_cli.watch import Tail


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
        started |= {"slurm_job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}
        started |= also or {}
        record = {"started": started["started"], **record, "status": "running", "ended": None, "exit_status": None}
        record["attempts"] = [*earlier, started]
        runs.write(folder, record)
        display.say(f"run folder: {folder}")
        log_file = folder / "train.log"
        try:
            if number > 1:
                metrics.begin_attempt(log_file, number)
            machines.meet(plan.machines)
            with onlooker.watching(folder, record, plain, lambda: _listen(folder)) as watcher:
                outcome = child.run(plan, log_file, _giving_up(watcher, plan.machines))
        except BaseException:
            runs.write(folder, {**record, "status": "failed", "ended": runs.now()})
            raise
        return _end(folder, record, outcome, plan.machines)


def _giving_up(watcher: child.Watcher, of: machines.Machines) -> child.Watcher:
    """The same watcher, which does not wait for ever for a torchrun that has lost the others: cut off, it may hang."""
    lost = False

    def on_line(line: str, is_stdout: bool) -> None:
        nonlocal lost
        lost = lost or machines.LOST in line
        watcher.on_line(line, is_stdout)

    def is_given_up(seconds: float) -> bool:
        return seconds > (5 if lost and not of.restarts else of.patience + 60)

    return replace(watcher, on_line=on_line, is_given_up=is_given_up)


def help_out(plan: launch.Launch, log_file: Path) -> int:
    """Train on a machine that is not the first one, which keeps the run's record; return the exit status.

    Raises MachinesError, RunFolderError.
    """
    machines.meet(plan.machines)
    watcher = child.Watcher(lambda line, is_stdout: None, lambda: display.say(onlooker.STOPPING), lambda: False)
    with upstream.in_use(plan.clone):
        outcome = child.run(plan, log_file, _giving_up(watcher, plan.machines))
    if outcome.signal:
        return 128 + outcome.signal
    if outcome.exit_status and (error := machines.explain(_last_lines(log_file), plan.machines)):
        raise error
    return outcome.exit_status


def _last_lines(log_file: Path, count: int = 500) -> list[str]:
    return list(Tail(log_file, count).new())


def _listen(folder: Path) -> bool:
    """Called every second: give a sign of life, and hear whether the run shall stop."""
    locks.give_sign_of_life(folder)
    return locks.take_stop_request(folder)


def _end(folder: Path, record: runs.Record, outcome: child.Outcome, of: machines.Machines) -> int:
    log = metrics.read_log(folder / "train.log")
    has_checkpoint = runs.checkpoint(folder).is_file()
    finished = outcome.exit_status == 0 and has_checkpoint
    # torchrun ends with 0 when its processes were stopped, be it by a signal that only another machine got.
    number = outcome.signal or (0 if finished or outcome.exit_status else _stopped_by(folder / "train.log"))
    interrupted = bool(number) and not finished
    status = 128 + number if interrupted else outcome.exit_status
    end = {"ended": runs.now(), "exit_status": status}
    record = {**record, **end, "attempts": [*record["attempts"][:-1], {**record["attempts"][-1], **end}]}
    record["status"] = "finished" if finished else "interrupted" if interrupted else "failed"
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
    if status == 0 and not has_checkpoint:
        raise NoCheckpointError(
            f"train.py ended without an error, but left no {runs.checkpoint(folder)}.",
            f"Its output is in {folder / 'train.log'}.",
        )
    if finished:
        _show_end(folder, record, log)
    else:
        how = "was stopped" if interrupted else f"failed with exit status {status}"
        display.say(f"{record['stage']} {how}; its output is in {folder / 'train.log'}")
        if checkpoint := _newest_checkpoint(folder):
            display.say(f"to go on from {checkpoint}: {shlex.join(['ambersafe', 'resume', str(folder)])}")
        error = None if interrupted else machines.explain(_last_lines(folder / "train.log"), of)
        if error:
            raise error
    return status


def _stopped_by(log_file: Path) -> int:
    """The signal by which train.py says at its end that it was stopped; 0 if it does not."""
    found = [match for line in _last_lines(log_file, 20) if (match := _STOPPED.match(line))]
    return int(found[-1][1]) if found else 0


_STOPPED = re.compile(r"stopped by signal (\d+) after \d+ examples$")


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


@dataclass(frozen=True)
class Ranks:
    """What `resume` is told of processes and machines: how many processes a machine, how many machines, the number of
    this one, where they meet, how often torchrun may start again; None for what is to be as before."""

    processes: int | None = None
    count: int | None = None
    number: int | None = None
    endpoint: str | None = None
    restarts: int | None = None


def _fit(ranks: Ranks, record: runs.Record) -> tuple[machines.Machines, int]:
    """The machines that a run goes on with, and the processes on each. Raises UsageError, MachinesError."""
    before = machines.Machines(**(record.get("machines") or {}))
    job = record.get("slurm")
    restarts = before.restarts if ranks.restarts is None else ranks.restarts
    if job and "SLURM_STEP_ID" in os.environ and ranks == Ranks():
        return machines.in_slurm(os.environ, job["nodes"], restarts, before.patience), job["processes"]
    processes = ranks.processes or max(1, (record.get("processes") or 1) // before.count)
    count = before.count if ranks.count is None else ranks.count
    number = (before.number if ranks.number is None else ranks.number) if count > 1 else ranks.number
    endpoint = (ranks.endpoint or before.endpoint) if count > 1 else ranks.endpoint
    return machines.from_flags(count, number, endpoint, restarts, before.patience), processes


def resume(
    name: str | None, python: str | None, allow_modified: bool, detach: bool, plain: bool, ranks: Ranks = Ranks()
) -> int:
    """Go on with a run, by its folder or name (by default the newest one here that has not finished), where it is.

    Raises UsageError for a run that cannot go on, RunFolderError if its run.json cannot be read, CloneError if the
    series that it was started with is gone.
    """
    folder = runs.find(name) if name is not None else _newest_unfinished()
    if detach:
        if ranks != Ranks():
            raise UsageError("--detach goes on as before: it takes no other processes or machines.", "Leave it away.")
        return control.detach(folder, python, allow_modified)
    if (found := runs.read(folder)) and _fit(ranks, found)[0].number:
        plan, _ = _again(folder, found, python, allow_modified, ranks)
        return help_out(plan, folder / f"machine-{plan.machines.number}.log")
    with locks.locked(folder):
        locks.take_stop_request(folder)  # one that came after an earlier attempt had ended
        runs.require_not_elsewhere(folder)
        record = runs.read(folder)  # only now: whoever had the lock may have changed it
        if record is None:
            raise UsageError(f"{folder} is not the folder of a run.", "`ambersafe runs` lists them.")
        _require_not_waiting(record)
        if record["status"] == "finished":
            raise UsageError(f"{folder} has finished.", f"Its checkpoint is {runs.checkpoint(folder)}.")
        plan, training = _again(folder, record, python, allow_modified, ranks)
        for error in recorded.changed_inputs(record, plan.environment, training.python):
            if not allow_modified:
                raise error
            display.warn(error.message)
        checkpoint = recovery.put_in_order(folder)
        if checkpoint:
            if not record["upstream"]["can_resume"]:
                raise UsageError("The clone of this run lacks the patch that resumes.", "Start the stage again.")
            if assign("resume", launch.NEWEST) not in plan.argv:
                plan = replace(plan, argv=(*plan.argv, assign("resume", str(checkpoint))))
        if record["attempts"]:
            display.say(f"going on from {checkpoint}" if checkpoint else "no checkpoint was saved: from the beginning")
        if record["status"] == slurm.QUEUED:
            del record["started"]
            if record.get("archive"):  # which may not have been there when it was queued
                integrity.require_whole(Path(record["archive"]))
                record["archive_fingerprint"] = provenance.of_checkpoint(record["archive"])
        state = upstream.inspect(plan.clone, patches.read_series())
        also = {
            "python": provenance.of_python(training),
            "variables": provenance.of_variables(),
            "allow_modified": allow_modified,
            "upstream": {
                "folder": str(state.folder),
                "head": state.head,
                "tree": state.tree,
                "edited": list(state.edited),
            },
        }
        return _attempt(plan, record, plain, also)


def _require_not_waiting(record: runs.Record) -> None:
    """Raise UsageError if Slurm still has the run, and will begin it or go on with it by itself."""
    job = (record.get("slurm") or {}).get("job_id")
    if job is None or "SLURM_STEP_ID" in os.environ or record["status"] == "finished":
        return
    with contextlib.suppress(SlurmError):  # no Slurm here, or none that answers
        if found := slurm.state(job):
            raise UsageError(f"Slurm has the run as job {job}: {found}.", f"To take it from there: scancel {job}")


def _again(
    folder: Path, record: runs.Record, python: str | None, allow_modified: bool, ranks: Ranks
) -> tuple[launch.Launch, environment.TrainingEnvironment]:
    """The command by which a run goes on, as it was recorded but for what `ranks` says otherwise.

    Raises AmberSafeError.
    """
    clone = recorded.clone(record["upstream"], allow_modified)
    pins, settings = recorded.pinned(record, folder)
    command = [*recorded.command(record, clone, folder, python), *pins]
    training = environment.probe(command[0], ask_torch=True)
    training.require_packages()
    of, processes = _fit(ranks, record)
    if launch.TORCHRUN in command:
        script = command.index(str(clone / "train.py"))
        command[1:script] = launch.torchrun(training.python_version, of, processes)
        if of.count > 1 or of.restarts:
            settings = {k: v for k, v in settings.items() if k not in machines.SETTINGS} | machines.settings(of)
    elif ranks != Ranks():
        raise UsageError("The run trains in one process, without torchrun.", "Start the stage again with --nproc.")
    return launch.Launch(folder, clone, tuple(command), settings, processes * of.count, (), of), training


def _newest_unfinished() -> Path:
    found = [run for run in runs.list_runs() if run.status not in ("finished", "running")]
    if not found:
        raise UsageError(f"There is no unfinished run under {runs.folder_of_runs()}.", "Give the folder of one.")
    return found[-1].folder

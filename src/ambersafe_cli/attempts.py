"""One attempt at a run, the first or a later one: from the lock on its folder to the exit status."""

import collections
import functools
import math
import os
import re
import secrets
import shlex
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ambersafe_cli import (
    checkpoints,
    child,
    display,
    launch,
    locks,
    machines,
    metrics,
    onlooker,
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


def run(plan: launch.Launch, record: runs.Record, plain: bool) -> int:
    """Run a new run's train.py to its end, keep run.json up to date, and return the exit status.

    `record` is what run.json says of what is trained; `plain` leaves the live view away.
    Raises RunFolderError, UsageError if another process has the folder, NoCheckpointError if nothing is left of it.
    """
    with locks.locked(plan.run_folder):
        locks.take_stop_request(plan.run_folder)
        runs.require_empty(plan.run_folder)  # another run may have been here since it was made
        return attempt(plan, record, plain)


def attempt(plan: launch.Launch, record: runs.Record, plain: bool, also: Mapping[str, Any] | None = None) -> int:
    """The same for each attempt, with the record of earlier ones; `also` is what there is to say of this attempt alone.

    Only for who has the run's lock.
    """
    folder = plan.run_folder
    with upstream.in_use(plan.clone, (also or record)["upstream"]):
        earlier = record.get("attempts") or []
        number = len(earlier) + 1
        started = {"started": runs.now(), "host": runs.host(), "pid": os.getpid(), "command": list(plan.argv)}
        newest = _newest_checkpoint(folder)
        started |= {"from": newest and newest.name}
        if slurm.is_job_of(folder):
            started |= {"slurm_job": os.environ["SLURM_JOB_ID"]}
            record = {**record, "slurm": {**record["slurm"], "job_id": os.environ["SLURM_JOB_ID"]}}
        else:
            record = {**record, "machines": asdict(plan.machines), "processes": plan.processes}
        token = secrets.token_hex(8)
        started |= {"token": token, **(also or {})}
        record = {"started": started["started"], **record, "status": "running", "ended": None, "exit_status": None}
        record["attempts"] = [*earlier, started]
        runs.write(folder, record)
        display.say(f"run folder: {folder}")
        log_file = folder / "train.log"
        ears = _Ears(functools.partial(_has_another, folder, token))
        try:
            if number > 1:
                metrics.begin_attempt(log_file, number)
            machines.meet(plan.machines)
            with onlooker.watching(folder, record, plain, lambda: _listen(folder)) as watcher:
                outcome = child.run(plan, log_file, ears.between(watcher, plan.machines, plan.processes))
        except BaseException:
            runs.write(folder, {**record, "status": "failed", "ended": runs.now()})
            raise
        if ears.is_overtaken:
            raise UsageError(
                f"Another process has the run {folder} now, and this one has ended: run.json is of its attempt.",
                "It began while this one gave no sign of life, or where the disk has no locks; `ambersafe show` tells.",
            )
        return _end(folder, record, outcome, plan.machines, ears)


class _Ears:
    """Hears what the processes say, for what their exit statuses do not tell.

    `lost`: that another one has gone; `stopped`: the signal by which they were stopped, 0 if they were not; `begun`:
    how often they began; `tail`: the last lines since then; `is_overtaken`: that another process has the run;
    `has_given_up`: that they ended with 0 for torchrun not to start them again.
    """

    def __init__(self, has_another: Callable[[], bool] = lambda: False) -> None:
        self.lost = self.is_overtaken = self.has_given_up = False
        self._lost_at, self._looked_at = 0.0, time.monotonic()
        self._has_another = has_another
        self.stopped = self.begun = 0
        self.tail: collections.deque[str] = collections.deque(maxlen=500)

    def hear(self, line: str) -> None:
        if line == _BEGINS:
            self.begun += 1
            self.lost = False
            self.tail.clear()
        if not self.lost and (machines.LOST in line or machines.STUCK in line):
            self.lost, self._lost_at = True, time.monotonic()
        if match := _STOPPED.match(line):
            self.stopped = int(match[1])
        self.has_given_up = self.has_given_up or bool(_NOT_FINITE.match(line))
        self.tail.append(line)

    def between(self, watcher: child.Watcher, of: machines.Machines, ranks: int) -> child.Watcher:
        """The same watcher, with these ears, and which does not wait for ever for a torchrun that has lost the others,
        cut off or waiting for a process that cannot be killed."""

        def on_line(line: str, is_stdout: bool) -> None:
            self.hear(line)
            watcher.on_line(line, is_stdout)

        def is_given_up(seconds: float) -> bool:
            if time.monotonic() - self._looked_at > _LOOK_EVERY:
                self._looked_at = time.monotonic()
                self.is_overtaken = self._has_another()
            is_cut_off = self.lost and not of.restarts
            waits = _TORCHRUNS_END + (of.patience if of.restarts else 0)
            is_over = self.lost and time.monotonic() - self._lost_at > waits
            return self.is_overtaken or is_over or seconds > (5 if is_cut_off else of.patience + 60)

        return replace(watcher, on_line=on_line, is_given_up=is_given_up, may_pause=lambda: _may_pause(of, ranks))


def _may_pause(of: machines.Machines, ranks: int) -> bool:
    if of.count > 1:
        display.say("Ctrl-Z is passed over: the other machines would take this one for lost; Ctrl-C saves and stops")
    elif ranks > 1:
        display.say("the training stops as well; after half an hour its ranks no longer wait for one another")
    return of.count == 1


def _has_another(folder: Path, token: str) -> bool:
    """Whether run.json is of an attempt that another process has begun."""
    try:
        record = runs.read(folder)
    except RunFolderError:  # being written, or damaged: nothing that another attempt leaves
        return False
    return record is not None and (record["attempts"] or [{}])[-1].get("token", token) != token


_LOOK_EVERY = 10.0
"""Seconds between two looks for another process in the run's folder, which may lie on a slow disk."""

_TORCHRUNS_END = 90.0
"""Seconds that torchrun gets to end its processes: it gives them 30 before it kills them."""


KILLED = 137
"""The exit status of a process that SIGKILL ended; torchrun tells of one in its table."""
_KILLED = re.compile(r"\s*exitcode\s*: -9\b")
MEMORY = (
    "It was killed (SIGKILL), most likely by the system, as this machine's memory was full; `dmesg` or the scheduler "
    "knows. Fewer processes (--nproc), a smaller model, or a job with more memory (--mem) would help."
)

_BEGINS = "building policy"
_NOT_FINITE = re.compile(r"error: the (?:loss|gradient|evaluation) after \d+ examples is not finite")
_STOPPED = re.compile(r"stopped by signal (\d+) after \d+ examples$")


def help_out(plan: launch.Launch, log_file: Path) -> int:
    """Train on a machine that is not the first one, which keeps the run's record; return the exit status.

    Raises MachinesError, RunFolderError.
    """
    machines.meet(plan.machines)
    ears = _Ears()
    watcher = child.Watcher(lambda line, is_stdout: None, lambda: display.say(onlooker.STOPPING), lambda: False)
    with upstream.in_use(plan.clone):
        display.say(f"the run's folder is on machine 0; what is printed here is in {log_file}")
        outcome = child.run(plan, log_file, ears.between(watcher, plan.machines, plan.processes))
    if outcome.exit_status == 0 and runs.checkpoint(plan.run_folder).is_file():
        return 0  # a signal that came when all was done
    if outcome.signal or ears.stopped:
        display.say("the run was stopped")
        return 128 + (outcome.signal or ears.stopped)
    if outcome.exit_status == 0 and ears.has_given_up:
        return 1
    if outcome.exit_status == 0:
        display.say("the run has finished")
    if outcome.exit_status and (error := machines.explain(ears.tail, plan.machines)):
        raise error
    return outcome.exit_status


def _listen(folder: Path) -> bool:
    """Called every second: give a sign of life, and hear whether the run shall stop."""
    locks.give_sign_of_life(folder)
    return locks.take_stop_request(folder)


def _end(folder: Path, record: runs.Record, outcome: child.Outcome, of: machines.Machines, ears: _Ears) -> int:
    log = metrics.read_log(folder / "train.log")
    has_checkpoint = runs.checkpoint(folder).is_file()
    if ears.has_given_up and not has_checkpoint:
        outcome = replace(outcome, exit_status=outcome.exit_status or 1)
    finished = outcome.exit_status == 0 and has_checkpoint
    # torchrun ends with 0 when its processes were stopped, be it by a signal that only another machine got.
    number = outcome.signal or (0 if finished or outcome.exit_status else ears.stopped)
    interrupted = bool(number) and not finished
    status = 128 + number if interrupted else outcome.exit_status
    end = {"ended": runs.now(), "exit_status": status}
    restarts = max(0, ears.begun - 1)
    ended = {**record["attempts"][-1], **end, **({"restarts": restarts} if restarts else {})}
    record = {**record, **end, "attempts": [*record["attempts"][:-1], ended]}
    record["status"] = "finished" if finished else "interrupted" if interrupted else "failed"
    record["model"] = {**record["model"], "commit": log.model_commit}
    record["data"] = {**record["data"], "commit": log.data_commit}
    record["checkpoint_fingerprint"] = checkpoints.fingerprint(runs.checkpoint(folder))
    last = log.evaluations[-1].values if log.evaluations else None
    # JSON has no NaN
    record["last_metrics"] = last and {key: value if math.isfinite(value) else None for key, value in last.items()}
    if outcome.left:
        display.warn(
            f"Not even SIGKILL ends the processes {', '.join(map(str, outcome.left))}: they wait for a disk, a GPU or "
            "a network that does not answer. `dmesg` may say which; only a reboot may help."
        )
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
    if restarts:
        display.say(f"begun again {restarts} times after a process had died, of --max-restarts {of.restarts}")
    if finished:
        _show_end(folder, record, log)
    else:
        was_killed = not interrupted and (status == KILLED or any(_KILLED.match(line) for line in ears.tail))
        how = "was stopped" if interrupted else f"failed with exit status {status}"
        display.say(f"{record['stage']} {how}; its output is in {folder / 'train.log'}")
        if was_killed and not outcome.left:
            display.say(MEMORY)
        if checkpoint := _newest_checkpoint(folder):
            again = (
                ["sbatch", str(folder / slurm.SCRIPT)]
                if slurm.is_job_of(folder)
                else ["ambersafe", "resume", str(folder)]
            )
            on_others = " here, and with --node-rank N on the others" if of.count > 1 else ""
            display.say(f"to go on from {checkpoint}: {shlex.join(again)}{on_others}")
        error = None if interrupted else machines.explain(ears.tail, of)
        if error:
            raise error
        if slurm.is_job_of(folder) and status in slurm.AGAIN:
            _require_progress(folder, record)
    return status


def _require_progress(folder: Path, record: runs.Record) -> None:
    """Raise SlurmError if a run was stopped several times without a new checkpoint: it would be queued for ever."""
    newest = _newest_checkpoint(folder)
    begun = [attempt.get("from") for attempt in record["attempts"][-slurm.TRIES :]]
    if len(begun) == slurm.TRIES and set(begun) == {newest and newest.name}:
        raise SlurmError(
            f"{folder} was stopped {slurm.TRIES} times without a new checkpoint, and is not queued again.",
            "It needs a longer --time, or room on its disk; train.log says more.",
        )


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
        if all((path / name).is_file() and zipfile.is_zipfile(path / name) for name in recovery.FILES_OF_A_CHECKPOINT):
            return path
    return None

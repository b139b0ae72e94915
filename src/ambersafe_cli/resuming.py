"""`ambersafe resume`: go on with a run, on as many processes and machines as before or on others."""

import contextlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from ambersafe_cli import (
    attempts,
    control,
    display,
    environment,
    integrity,
    launch,
    locks,
    machines,
    patches,
    provenance,
    recorded,
    recovery,
    runs,
    slurm,
    upstream,
)
from ambersafe_cli.errors import SlurmError, UsageError
from ambersafe_cli.overrides import assign
from ambersafe_cli.plans import in_gigabytes


@dataclass(frozen=True)
class Ranks:
    """What `resume` is told of processes and machines: how many processes a machine, how many machines, the number of
    this one, where they meet, how often torchrun may start again; None for what is to be as before."""

    processes: int | None = None
    count: int | None = None
    number: int | None = None
    endpoint: str | None = None
    restarts: int | None = None


def _fit(folder: Path, ranks: Ranks, record: runs.Record) -> tuple[machines.Machines, int]:
    """The machines that a run goes on with, and the processes on each. Raises UsageError, MachinesError."""
    before = machines.Machines(**(record.get("machines") or {}))
    job = record.get("slurm")
    restarts = before.restarts if ranks.restarts is None else ranks.restarts
    if job and slurm.is_job_of(folder):
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
    if (found := runs.read(folder)) and _fit(folder, ranks, found)[0].number:
        if found["status"] == "finished" and slurm.is_job_of(folder):
            return 0
        plan, _ = _again(folder, found, python, allow_modified, ranks)
        return attempts.help_out(plan, folder / f"machine-{plan.machines.number}.log")
    with locks.locked(folder):
        locks.take_stop_request(folder)  # one that came after an earlier attempt had ended
        runs.require_not_elsewhere(folder)
        record = runs.read(folder)  # only now: whoever had the lock may have changed it
        if record is None:
            raise UsageError(f"{folder} is not the folder of a run.", "`ambersafe runs` lists them.")
        _require_not_waiting(folder, record)
        if record["status"] == "finished" and slurm.is_job_of(folder):
            display.say(f"{folder} has finished")  # Slurm started the job again all the same
            return 0
        if record["status"] == "finished":
            raise UsageError(f"{folder} has finished.", f"Its checkpoint is {runs.checkpoint(folder)}.")
        plan, training = _again(folder, record, python, allow_modified, ranks)
        for error in recorded.changed_inputs(record, plan.environment, training.python):
            if not allow_modified:
                raise error
            display.warn(error.message)
        checkpoint = recovery.put_in_order(folder)
        if checkpoint:
            _require_room(runs.Run(folder, record, record["status"]), checkpoint)
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
                "edits": state.edits,
            },
        }
        return attempts.attempt(plan, record, plain, also)


def _require_not_waiting(folder: Path, record: runs.Record) -> None:
    """Raise UsageError if Slurm still has the run, and will begin it or go on with it by itself."""
    job = (record.get("slurm") or {}).get("job_id")
    if job is None or slurm.is_job_of(folder) or record["status"] == "finished":
        return
    with contextlib.suppress(SlurmError):  # no Slurm here, or none that answers
        if found := slurm.state(job, folder):
            raise UsageError(
                f"Slurm has the run as job {job}: {found}.", f"To take it from there: `ambersafe stop {folder.name}`"
            )


def _again(
    folder: Path, record: runs.Record, python: str | None, allow_modified: bool, ranks: Ranks
) -> tuple[launch.Launch, environment.TrainingEnvironment]:
    """The command by which a run goes on, as it was recorded but for what `ranks` says otherwise.

    Raises AmberSafeError.
    """
    clone = recorded.clone(record["upstream"], allow_modified)
    pins, settings = recorded.pinned(record, folder)
    words = [*recorded.words(record, folder, allow_modified), *pins]
    python = recorded.interpreter(record, python)
    display.say(f"runs {clone / 'train.py'} with {python}")
    training = environment.probe(python, ask_torch=True)
    training.require_packages()
    start: list[str] = []
    of, processes = _fit(folder, ranks, record)
    _require_equal_parts(runs.Run(folder, record, record["status"]), processes * of.count)
    if launch.TORCHRUN in record["command"]:
        start = launch.torchrun(training.python_version, of, processes)
        settings |= machines.settings(of)
        if training.gpus and processes > len(training.gpus):
            raise UsageError(
                f"The run goes on in {processes} processes, and there are {len(training.gpus)} GPUs here.",
                "--nproc says another number.",
            )
    elif ranks != Ranks():
        raise UsageError("The run trains in one process, without torchrun.", "Start the stage again with --nproc.")
    command = (training.python, *start, str(clone / "train.py"), *words)
    return launch.Launch(folder, clone, command, settings, processes * of.count, (), of), training


def _require_room(run: runs.Run, newest: Path) -> None:
    """Raise UsageError if the disk has no room for the checkpoints that are still to come, each as large as the newest.

    Each is written before an older one is deleted, and LATEST comes besides.
    """
    each = sum(path.stat().st_size for path in newest.iterdir() if path.is_file())
    kept = run.setting("keep_checkpoints")
    held = len(runs.steps(run.folder))
    most = max(kept, held) + 1 if isinstance(kept, int) else held + 1
    needed, free = (most - held + 1) * each, shutil.disk_usage(run.folder).free
    if needed > free:
        raise UsageError(
            f"{run.folder} needs room for {most - held + 1} more checkpoints, {in_gigabytes(needed)}, and its disk has "
            f"{in_gigabytes(free)} free.",
            "Make room, then resume again: training would come as far as the next checkpoint, and lose what it did.",
        )


def _newest_unfinished() -> Path:
    found = [run for run in runs.list_runs() if run.status not in ("finished", "running")]
    if not found:
        raise UsageError(f"There is no unfinished run under {runs.folder_of_runs()}.", "Give the folder of one.")
    return found[-1].folder


def _require_equal_parts(run: runs.Run, ranks: int) -> None:
    """Raise UsageError for a number of ranks that batches cannot be divided among: examples would be dropped."""
    batch, microbatches = run.setting("batch_size"), run.setting("gradient_accumulation_steps") or 1
    evaluated = run.setting("eval_batch_size")
    if ranks > 1 and isinstance(batch, int) and isinstance(microbatches, int) and batch % (microbatches * ranks):
        raise UsageError(
            f"batch_size {batch} cannot be cut into {microbatches} microbatches on {ranks} ranks.",
            "Take another number.",
        )
    if ranks > 1 and isinstance(evaluated, int) and evaluated % ranks:
        raise UsageError(f"eval_batch_size {evaluated} cannot be divided among {ranks} ranks.", "Take another number.")

"""Slurm: the batch script by which a run waits for its machines, and asking Slurm about it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambersafe_cli.errors import SlurmError, UsageError

QUEUED = "queued"
"""The status of a run that Slurm has, and that has not begun."""

AGAIN = (138, 143)
"""The launcher's exit statuses after SIGUSR1, which the script has Slurm send before the time limit, and SIGTERM, which
Slurm sends to a job that has to make room. `ambersafe stop` and Ctrl-C make it 130."""

MARK = "AMBERSAFE_SLURM_RUN"
"""The variable by which the script tells the launchers that they are its own: a shell in a job is none."""

SCRIPT = "slurm.sh"

TRIES = 3
"""How often a run may be stopped without a new checkpoint before it is no longer queued again."""

_OURS = frozenset(
    (
        "-N", "--nodes", "-n", "--ntasks", "--ntasks-per-node", "--gpus-per-node", "-p", "--partition", "-t", "--time",
        "-A", "--account", "-J", "--job-name", "-o", "--output", "--open-mode", "--requeue", "--no-requeue", "--signal",
        "-a", "--array", "-d", "--dependency", "-H", "--hold", "--parsable",
    )
)  # fmt: skip
"""Options of sbatch that have a flag of their own, or that requeueing rests on."""

WARNING = 300
"""Seconds before the time limit at which that is sent: a 7B model's checkpoint of 54 GB takes minutes."""


@dataclass(frozen=True)
class Wish:
    """What is asked of Slurm: machines, GPUs on each, partition, time limit, account, and other options of sbatch."""

    nodes: int
    gpus_per_node: int | None
    partition: str | None
    time: str | None
    account: str | None
    others: tuple[str, ...]


def from_flags(params: Mapping[str, Any]) -> Wish | None:
    """Read the flags of --slurm by their names in cli.py; None without it. Raises UsageError."""
    flags = {"nodes": "--nodes", "gpus_per_node": "--gpus-per-node", "partition": "--partition", "time": "--time"}
    flags |= {"account": "--account", "sbatch": "--sbatch"}
    given = [flag for name, flag in flags.items() if params.get(name)]
    if not params.get("slurm"):
        if given:
            raise UsageError(
                f"{given[0]} is for --slurm.", "Add --slurm; without Slurm it is --nnodes, on each machine."
            )
        return None
    for name, flag in (("nnodes", "--nnodes"), ("node_rank", "--node-rank"), ("rdzv_endpoint", "--rdzv-endpoint")):
        if params.get(name) is not None:
            raise UsageError(f"{flag} is not for --slurm, which finds the machines itself.", "--nodes says how many.")
    if params.get("detach"):
        raise UsageError("--detach is not for --slurm: the job goes on by itself.", "Leave it away.")
    for text in params.get("sbatch") or ():
        name = text.split("=")[0].split()[0] if text.strip() else ""
        if name in _OURS:
            raise UsageError(f"{name} is what ambersafe itself tells sbatch.", "Leave it away, or use the flag for it.")
        if not text.startswith("-"):
            raise UsageError(
                f"Invalid value for '--sbatch': {text!r}.", "It is an option of sbatch, such as --qos=high."
            )
    time = params.get("time")
    seconds = _seconds(time)
    if time is not None and seconds is None and time.upper() not in ("UNLIMITED", "INFINITE"):
        raise UsageError(
            f"Invalid value for '--time': {time!r}.", "It is minutes, hours:minutes:seconds, or days-hours."
        )
    if seconds is not None and seconds < 2 * WARNING:
        raise UsageError(
            f"--time {time} is {seconds} s, too short: {WARNING // 60} minutes before its end the run saves and stops.",
            f"Ask for {2 * WARNING // 60} minutes or more.",
        )
    return Wish(
        params.get("nodes") or 1,
        params.get("gpus_per_node"),
        params.get("partition"),
        time,
        params.get("account"),
        tuple(params.get("sbatch") or ()),
    )


def _seconds(time: str | None) -> int | None:
    """A time limit as sbatch takes it, [days-]hours:minutes:seconds or minutes[:seconds]; None for any other text."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time or "")
    if not match:
        return None
    days, *parts = match.groups()
    first, second, third = (int(part or 0) for part in parts)
    if days is not None or parts[2] is not None:
        return int(days or 0) * 86400 + first * 3600 + second * 60 + third
    return first * 60 + second


def is_job_of(run_folder: Path) -> bool:
    """Whether this process was started by the script of a run."""
    return os.environ.get(MARK) == str(run_folder) and "SLURM_JOB_ID" in os.environ


def script(wish: Wish, run_folder: Path, name: str, flags: Sequence[str]) -> str:
    """The batch script of a run: on each machine one task, which goes on with the run until it has come to its end,
    with these flags of `resume`.

    Raises UsageError for what would end a line of it.
    """
    options = [
        f"--job-name={name}",
        f"--nodes={wish.nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={wish.gpus_per_node}"] if wish.gpus_per_node else []),
        *([f"--partition={wish.partition}"] if wish.partition else []),
        *([f"--time={wish.time}"] if wish.time else []),
        *([f"--account={wish.account}"] if wish.account else []),
        f"--output={_pattern(run_folder / 'slurm.log')}",
        "--open-mode=append",
        "--requeue",
        f"--signal=USR1@{WARNING}",
        *wish.others,
    ]
    for text in (name, str(run_folder), sys.executable, *flags, *options):
        if not text.isprintable():
            raise UsageError(f"{text!r} cannot stand in a batch script.", "Give another name.")
    lines = [
        "#!/bin/bash",
        f"# {name}: written by ambersafe. To send it by hand: sbatch slurm.sh",
        *(f"#SBATCH {_option(option)}" for option in options),
        "",
        "# One launcher on each machine. The first one keeps the run's record; stopped, preempted or started again,",
        "# they go on from the newest checkpoint.",
        f"export {MARK}={shlex.quote(str(run_folder))}",
        'srun --kill-on-bad-exit=0 --wait=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \\',
        f"  {shlex.join([sys.executable, '-P', '-m', 'ambersafe_cli', 'resume', str(run_folder), *flags])}",
        "status=$?",
        "",
        f"# {AGAIN[0]}: SIGUSR1, {WARNING} s before the time limit; {AGAIN[1]}: SIGTERM, to make room for another job.",
        "# A checkpoint is saved: the job waits anew.",
        'case "$status" in',
        f'  {AGAIN[0]} | {AGAIN[1]}) scontrol requeue "$SLURM_JOB_ID" && sleep 60 ;;  # until Slurm ends it for that',
        "esac",
        'exit "$status"',
    ]
    return "\n".join(lines) + "\n"


def _pattern(path: Path) -> str:
    """A path as --output takes it, where % begins a pattern."""
    return str(path).replace("\\", "\\\\").replace("%", "%%")


def _option(text: str) -> str:
    """An option as it has to stand behind #SBATCH, where spaces and quotes mean what they do in a shell."""
    name, equals, value = text.partition("=")
    return f"{name}={shlex.quote(value)}" if equals else text


def submit(path: Path, after: str | None = None) -> str:
    """Hand a script to Slurm, to begin once it is released and a job has ended well, and return the job's id.

    Raises SlurmError.
    """
    behind = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    said = _ask(["sbatch", "--parsable", "--hold", *behind, str(path)], "Slurm did not take the job")
    return said.strip().partition(";")[0]


def release(job: str) -> None:
    """Let a job begin. Raises SlurmError."""
    _ask(["scontrol", "release", job], f"Job {job} is held, and was not released")


def require() -> None:
    """Raise SlurmError where there is no sbatch."""
    if not shutil.which("sbatch"):
        raise SlurmError("There is no sbatch on this machine.", "--slurm is for a machine that can submit Slurm jobs.")


def state(job: str, run_folder: Path) -> str | None:
    """What Slurm says of a run's job: its state, and why it waits; None when it is gone, or the job is another's now.

    Raises SlurmError.
    """
    said = _ask(["squeue", "--noheader", "--jobs", job, "--format", "%T %r|%o"], "squeue does not answer", gone="|")
    words, _, command = said.strip().partition("|")
    if command != str(run_folder / SCRIPT):
        return None
    return " ".join(words.split()).removesuffix(" None").lower() or None


def cancel(job: str) -> None:
    """Raises SlurmError."""
    _ask(["scancel", job], f"Job {job} was not cancelled")


def _ask(command: list[str], failure: str, gone: str | None = None) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{failure}: {error}.") from error
    said = re.sub(rf"^{command[0]}: (error: )?", "", done.stderr.strip(), flags=re.MULTILINE)
    if done.returncode == 0:
        return done.stdout
    if gone is not None and "Invalid job id" in said:
        return gone
    raise SlurmError(f"{failure}: {said or f'exit status {done.returncode}'}", "Mend that, and give the command again.")

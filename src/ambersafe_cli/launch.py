"""The command that runs train.py: a stage, fitted to the clone and the machine."""

import contextlib
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ambersafe_cli import machines
from ambersafe_cli.environment import TrainingEnvironment
from ambersafe_cli.errors import UsageError
from ambersafe_cli.machines import ALONE, Machines
from ambersafe_cli.overrides import assign
from ambersafe_cli.recipe import DEFAULT, Stage
from ambersafe_cli.runs import user_name

if TYPE_CHECKING:
    from ambersafe_cli.upstream import CloneState

TORCHRUN_PATCH = "Join the process group that torchrun made"
RESTART_PATCH = "Go on from the newest checkpoint when torchrun starts again"
OPTIMIZER_PATCH = "Take the optimizers of bitsandbytes too"
LORA_PATCH = "Train an adapter in place of all weights"
MACHINES_PATCH = "Compare the machines, and end when a rank is gone"


@dataclass(frozen=True)
class Launch:
    """A command that is ready to start: its run's folder, the clone whose train.py it runs, its arguments, what it adds
    to the environment, and how many processes it will train in, on all machines together.

    `notes` say what was changed to suit the machine or the clone.
    """

    run_folder: Path
    clone: Path
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    processes: int
    notes: tuple[str, ...]
    machines: Machines = ALONE

    @property
    def shields_torchrun(self) -> bool:
        """Whether torchrun is kept from SIGTERM: only where train.py, which has it blocked then as well, takes it."""
        if TORCHRUN not in self.argv:
            return False
        with contextlib.suppress(OSError):
            return "signal.SIG_UNBLOCK" in (self.clone / "train.py").read_text(errors="replace")
        return False

    def as_shell(self) -> str:
        """The same as one line for a shell."""
        settings = " ".join(f"{key}={shlex.quote(value)}" for key, value in self.environment.items())
        return f"mkdir -p {shlex.quote(str(self.run_folder))} && {settings} {shlex.join(self.argv)}"


def plan(
    stage: Stage,
    clone: "CloneState",
    environment: TrainingEnvironment,
    run_folder: Path,
    processes: int | None,
    of: Machines,
) -> tuple[Stage, Launch]:
    """Fit a stage to the clone and the machines, and write its command; `processes` are those of each machine.

    Raises UsageError for what cannot be had, MachinesError.
    """
    applied = {p.patch.subject for p in clone.patches if p.state != "missing"}
    _require_patches(stage, applied, processes, of)
    stage, processes, notes = _fit_trainer(stage, environment, processes, of)
    stage, said = _fit_reference(_fit_precision(stage), bool(environment.gpus))
    notes += said
    unknown = [k for p in clone.patches if p.state == "missing" for k in p.patch.config_keys if k in stage.values]
    for key in unknown:
        if key in stage.explicit or (key in ("lora", "quantize") and stage.values[key]):
            raise UsageError(f"{key} comes with a patch that {clone.folder} lacks.", "Apply it: `ambersafe setup`.")
        notes.append(f"{key} is left away: the patch that adds it is not in {clone.folder}.")
    stage = stage.without(unknown)

    argv = [assign(key, value) for key, value in stage.values.items()]
    argv += [assign("local_run_dir", str(run_folder)), assign("hydra.run.dir", str(run_folder / "hydra"))]
    added = settings(stage.data, stage.data_revision)
    start = [environment.python]
    if TORCHRUN_PATCH in applied and "FSDP" in stage.trainer:
        start += torchrun(environment.python_version, of, processes or 1)
        added |= machines.settings(of)
        if RESTART_PATCH in applied and not any(o.key == "resume" for o in stage.overrides):
            argv.append(assign("resume", NEWEST))
    argv += [override.text for override in stage.overrides if override.key != "local_run_dir"]
    words = (*start, str(clone.train_py), *argv)
    world = (processes or 1) * of.count
    return stage, Launch(run_folder, clone.folder, words, added, world, tuple(notes), of)


def settings(data: str, revision: str | None) -> dict[str, str]:
    """What the environment of train.py has to hold, besides what several machines need."""
    found = {"SAFERLHF_DATASET": data, "SAFERLHF_REVISION": revision or "", "PYTHONUNBUFFERED": "1"}
    if user_name().startswith("uid-"):
        found["LOGNAME"] = user_name()  # upstream's getpass.getuser() would raise KeyError
    return found


def _require_patches(stage: Stage, applied: Collection[str], processes: int | None, of: Machines) -> None:
    """Raise UsageError for what is asked for and comes with a patch that the clone lacks."""
    optimizer = stage.get("optimizer")
    for what, is_asked_for, subject in (
        ("--nproc", processes is not None, TORCHRUN_PATCH),
        ("--max-restarts", of.restarts > 0, RESTART_PATCH),
        ("--nnodes", of.count > 1, MACHINES_PATCH),
        (optimizer, optimizer in BITSANDBYTES, OPTIMIZER_PATCH),
    ):
        if is_asked_for and subject not in applied:
            raise UsageError(f"{what} needs the patch {subject!r}.", "Apply it: `ambersafe setup`.")


def _fit_trainer(
    stage: Stage, environment: TrainingEnvironment, processes: int | None, of: Machines
) -> tuple[Stage, int | None, list[str]]:
    """The stage with the trainer that goes with the GPUs and what is asked for, the processes of each machine, and
    notes of what was changed. Raises UsageError for what does not go together."""
    notes: list[str] = []
    if processes is None and not environment.gpus and (of.count > 1 or of.restarts):
        flag = "--nnodes" if of.count > 1 else "--max-restarts"
        raise UsageError(f"{flag} needs --nproc where there is no GPU.", "--nproc 1 trains in one process a machine.")
    if processes is not None and environment.gpus and processes > len(environment.gpus):
        raise UsageError(f"--nproc {processes} needs as many GPUs, and there are {len(environment.gpus)}.")
    if (alone := needs_basic_trainer(stage)) and ("FSDP" in stage.trainer or processes is not None):
        if processes is not None or of.count > 1 or _is_users(stage, "trainer"):
            raise UsageError(
                f"{alone} needs BasicTrainer, which trains in one process.",
                f"Leave away what asks for more (--nproc, --nnodes, --nodes) or for another trainer, or {alone}.",
            )
        notes.append(f"{alone}: BasicTrainer, in one process, in place of the recipe's {stage.trainer}.")
        stage = stage.with_values({"trainer": "BasicTrainer"})
    if processes is None and "FSDP" in stage.trainer:
        processes = len(environment.gpus)
        if not processes:
            notes.append("FSDPTrainer needs GPUs and there is none here: BasicTrainer, on the CPU.")
            stage = stage.with_values({"trainer": "BasicTrainer"})
    elif processes is not None and "FSDP" not in stage.trainer:
        if _is_users(stage, "trainer"):
            raise UsageError(f"--nproc needs FSDPTrainer: {stage.trainer} trains in one process.")
        notes.append(f"--nproc: FSDPTrainer in place of the recipe's {stage.trainer}.")
        stage = stage.with_values({"trainer": "FSDPTrainer"})
    return stage, processes, notes


def _fit_precision(stage: Stage) -> Stage:
    """The stage with the types of its weights, where something else decides about them. Raises UsageError."""
    if stage.get("model.fsdp_policy_mp") and "FSDP" not in stage.trainer:
        raise UsageError(f"model.fsdp_policy_mp is for FSDPTrainer, not {stage.trainer}.", "--bf16 is for both.")
    if stage.get("quantize") and not _is_users(stage, "mixed_precision"):
        stage = stage.with_values({"mixed_precision": "bfloat16"})  # what bitsandbytes computes in
    if stage.get("lora") and stage.get("mixed_precision") and not stage.get("model.policy_dtype"):
        # No update is rounded away: these weights have none. The adapter's are float32.
        stage = stage.with_values({"model.policy_dtype": stage.get("mixed_precision")})
    is_ours = _is_users(stage, "mixed_precision") or not stage.get("model.reference_dtype")
    is_theirs = _is_users(stage, "model.reference_dtype")
    if stage.get("mixed_precision") and stage.name == "dpo" and is_ours and not is_theirs:
        # The reference model has to compute as the policy does, or rewards begin with the difference in rounding.
        dtype = stage.get("mixed_precision") if "FSDP" in stage.trainer else "float32"
        stage = stage.with_values({"model.reference_dtype": dtype})
    return stage


def _fit_reference(stage: Stage, has_gpu: bool) -> tuple[Stage, list[str]]:
    """The stage with the type of DPO's reference model, where nobody has said one, and a note of it.

    It computes as the policy does, but where AmberSafe is reproduced: on GPUs its own recipe keeps upstream's float16.
    """
    if stage.name != "dpo" or stage.get("lora") or stage.get("model.reference_dtype"):
        return stage, []
    dtype = policy_dtype(stage.get, stage.trainer)
    if has_gpu and stage.recipe == DEFAULT:
        note = (
            f"The reference model is in float16, as AmberSafe's was, and the policy in {dtype}: rewards begin at the "
            f"difference in rounding, not at 0. model.reference_dtype={dtype} has both alike, for more memory."
        )
        return stage, [note] if dtype != "float16" else []
    note = f"The reference model is in {dtype}, as the policy is: upstream's float16 is slow on a CPU."
    return stage.with_values({"model.reference_dtype": dtype}), [] if has_gpu else [note]


def policy_dtype(get: Callable[[str], object], trainer: str) -> str:
    """The type that the policy computes in without mixed precision; `get` gives upstream's keys."""
    own = get("model.fsdp_policy_mp") if "FSDP" in trainer else None
    return str(own or get("model.policy_dtype") or "float32")


def _is_users(stage: Stage, key: str) -> bool:
    """Whether a flag or KEY=VALUE set it, not the recipe."""
    return key in stage.explicit or any(override.key == key for override in stage.overrides)


def needs_basic_trainer(stage: Stage) -> str | None:
    """A setting of the stage that only BasicTrainer has."""
    if stage.get("quantize"):
        return "quantize"
    if stage.get("optimizer") in BITSANDBYTES:
        return str(stage.get("optimizer"))
    return "offload_reference" if stage.get("offload_reference") else None


BITSANDBYTES = ("AdamW8bit", "PagedAdamW", "PagedAdamW8bit")
"""The optimizers that are not torch's: they know nothing of FSDP's shards."""

NEWEST = "newest"
"""What `resume` is for train.py where torchrun starts it: it looks for the newest checkpoint itself, each time."""


def torchrun(python_version: str, of: Machines, processes: int) -> list[str]:
    """The words between the interpreter and train.py. Raises MachinesError."""
    # -P: or a file in the working folder that is called like a module is taken for it.
    version = tuple(int(part) for part in python_version.split(".")[:2])
    is_safe = ["-P"] if version >= (3, 11) else []
    return [*is_safe, "-m", TORCHRUN, *machines.torchrun_words(of, processes)]


TORCHRUN = "torch.distributed.run"

"""What a user asks of a stage: the parameters of `ambersafe sft` and `ambersafe dpo`, read by themselves."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambersafe_cli import machines, slurm, upstream
from ambersafe_cli import recipe as recipes
from ambersafe_cli.errors import UsageError
from ambersafe_cli.machines import ALONE, Machines
from ambersafe_cli.slurm import Wish

if TYPE_CHECKING:
    from ambersafe_cli.overrides import Value


@dataclass(frozen=True)
class Request:
    """What a user asked for with `ambersafe sft` or `ambersafe dpo`."""

    stage: recipes.StageName
    recipe: str
    flags: recipes.Flags
    overrides: tuple[str, ...]
    clone: Path
    python: str
    processes: int | None
    machines: Machines = ALONE
    slurm: Wish | None = None
    archive: Path | None = None
    archive_to_come: bool = False
    carried: tuple[str, ...] = ()
    dry_run: bool = False
    auto: bool = False
    preflight: bool = True
    allow_modified: bool = False
    detach: bool = False
    plain: bool = False
    tensorboard: bool = False


# What the flags of both commands set in upstream's config, as they stand.
_KEY_OF_FLAG = {
    "model": "model.name_or_path",
    "model_revision": "model.revision",
    "batch_size": "batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "lr": "lr",
    "epochs": "n_epochs",
    "max_length": "max_length",
    "trainer": "trainer",
    "exp_name": "exp_name",
    "seed": "seed",
    "wandb": "wandb.enabled",
    "keep_best": "keep_best",
    "attn": "attn_implementation",
    "lora_rank": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "optimizer": "optimizer",
    "beta": "loss.beta",
    "label_smoothing": "loss.label_smoothing",
}


_MACHINE_FLAGS = ("nnodes", "node_rank", "rdzv_endpoint", "max_restarts", "rdzv_timeout")


def read(stage: recipes.StageName, params: Mapping[str, Any]) -> Request:
    """Read the parameters of the commands `sft` and `dpo`, by their names in cli.py."""
    values: dict[str, Value] = {k: params[flag] for flag, k in _KEY_OF_FLAG.items() if params.get(flag) is not None}
    if params["bf16"]:
        # Never policy_dtype=bfloat16: in bfloat16 weights an update at a learning rate of 5e-7 rounds away.
        values["mixed_precision"] = "bfloat16"
    if params["activation_checkpointing"]:
        values["activation_checkpointing"] = True
    if params["lora"]:
        values["lora"] = True
    if params["lora_targets"] is not None:
        targets = [name.strip() for name in params["lora_targets"].split(",")]
        values["lora_targets"] = targets[0] if targets == ["all-linear"] else [*targets]
    if params["quantize"]:
        values["quantize"] = str(params["quantize"])
    if params.get("loss"):
        values["loss.name"] = str(params["loss"])
    if params["template"]:
        values["template"] = None if params["template"] == "none" else str(params["template"])
    if params["keep"]:
        values["keep_checkpoints"] = None if params["keep"] == "all" else _number(params["keep"], "--keep")
    if params["save_every"]:
        minutes = params["save_every"].endswith("m")
        number = _number(params["save_every"].removesuffix("m"), "--save-every")
        values["save_every_minutes" if minutes else "save_every_examples"] = number
    wish = slurm.from_flags(params)
    return Request(
        stage=stage,
        recipe=params["recipe"],
        flags=recipes.Flags(values, params["data"], params["data_revision"]),
        overrides=tuple(params["overrides"] or ()),
        clone=params["folder"].absolute(),
        python=params["python"],
        processes=params["nproc"],
        machines=machines.from_flags(*(params[flag] for flag in _MACHINE_FLAGS)),
        slurm=wish,
        archive=params.get("archive"),
        carried=_carried(params),
        dry_run=params["dry_run"],
        auto=bool(params.get("auto")),
        preflight=not params["no_preflight"],
        allow_modified=params["allow_modified"],
        detach=params["detach"],
        plain=params["plain"],
        tensorboard=params["tensorboard"],
    )


def _number(text: str, flag: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise UsageError(f"Invalid value for '{flag}': {text!r}.", "`ambersafe sft --help` says what it takes.")
    return int(text)


# What DPO needs told again if SFT was told it: where things are and how long texts may be, but not how to train.
_CARRIED_FLAGS = (
    "recipe", "model", "model_revision", "data", "data_revision", "max_length", "template", "trainer", "wandb", "nproc",
    "keep", "save_every", "python", "attn", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "quantize",
    "optimizer",
)  # fmt: skip
_CARRIED_KEYS = (
    "model.", "datasets", "max_", "eval_batch_size", "n_eval_examples", "fsdp_port", "keep_eos", "drop_eos", "template",
    "mixed_precision", "attn_implementation", "activation_checkpointing", "lora", "quantize", "optimizer",
)  # fmt: skip


def _carried(params: Mapping[str, Any]) -> tuple[str, ...]:
    """The part of a command line that holds for the other stage as well."""
    defaults = {"recipe": recipes.DEFAULT, "python": sys.executable}
    given = {flag: params[flag] for flag in _CARRIED_FLAGS if params[flag] not in (None, defaults.get(flag))}
    wandb = given.pop("wandb", None)
    words = [word for flag, value in given.items() for word in (f"--{flag.replace('_', '-')}", str(value))]
    words += ["--wandb"] if wandb else []
    words += ["--tensorboard"] if params["tensorboard"] else []
    words += ["--bf16"] if params["bf16"] else []
    words += ["--lora"] if params["lora"] else []
    words += ["--auto"] if params.get("auto") else []
    words += ["--activation-checkpointing"] if params["activation_checkpointing"] else []
    if params["folder"].absolute() != Path.cwd() / upstream.DEFAULT_FOLDER:
        words += ["--dir", str(params["folder"])]
    overrides = [text for text in params["overrides"] or () if text.lstrip("+").startswith(_CARRIED_KEYS)]
    return (*words, *overrides)

"""What preflight says of values that no run can have, whatever the others are: train.py would fail, or do nothing."""

import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from ambersafe_cli.findings import Finding
from ambersafe_cli.overrides import LARGEST

METRICS = {
    "sft": ("loss/eval", "logps_eval/chosen"),
    "dpo": (
        "loss/eval", "rewards_eval/accuracies", "rewards_eval/margins", "rewards_eval/chosen", "rewards_eval/rejected",
        "logps_eval/chosen", "logps_eval/rejected",
    ),
}  # fmt: skip
"""What an evaluation of each stage finds, by upstream's names (get_batch_metrics)."""


def of_values(stage: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings of a stage (sft or dpo), by its config as train.py will see it: each value by itself."""
    counts = ["batch_size", "gradient_accumulation_steps", "eval_batch_size", "eval_every", "max_length"]
    may_be_null = ("n_epochs", "n_examples", "save_every_examples", "keep_checkpoints")
    counts += ["max_prompt_length", "n_eval_examples", *(key for key in may_be_null if config.get(key) is not None)]
    for key in counts:
        value = config[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
            said = reprlib.repr(value)
            yield Finding("error", f"{key} must be a whole number from 1 on, it is {said}.", f"Change {key}.")
    for key, allows_zero in (
        ("warmup_steps", True),
        ("lr", False),
        ("max_grad_norm", False),
        ("save_every_minutes", False),
    ):
        number = config.get(key)
        is_number = isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < math.inf
        if number is None and key == "save_every_minutes":
            continue
        if number is None or not is_number or number < 0 or (number == 0 and not allows_zero):
            least = "0 or more" if allows_zero else "above 0"
            yield Finding("error", f"{key} must be a number, {least}, it is {number!r}.", f"Change {key}.")
    if not isinstance(config["wandb"], dict):
        yield Finding("error", "wandb is a group of settings, it cannot be set itself.", "Set wandb.enabled=false.")
    if (best := config.get("keep_best")) is not None and best not in METRICS[stage]:
        named = f"{', '.join(METRICS[stage])}"
        yield Finding("error", f"No evaluation of {stage.upper()} has the metric {best}.", f"keep_best takes {named}.")
    if config["n_epochs"] is None and config["n_examples"] is None:
        yield Finding("error", "Neither n_epochs nor n_examples says when to end.", "Give --epochs.")
    if config.get("lr_decay") not in (None, "linear", "cosine"):
        yield Finding("error", f"lr_decay must be linear, cosine or null, it is {config['lr_decay']!r}.", "")
    if config.get("mixed_precision") not in (None, "bfloat16"):
        found = config["mixed_precision"]
        yield Finding("error", f"mixed_precision must be bfloat16 or null, it is {found!r}.", "--bf16 sets it.")
    seed = config["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        yield Finding("error", f"seed must be a whole number from 0 to 4294967295, it is {seed!r}.", "Change --seed.")

"""Upstream's own config as it stands in the clone, and what a stage sets over it: what train.py will see."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ambersafe_cli.errors import CloneError
from ambersafe_cli.overrides import is_plain, read_yaml

if TYPE_CHECKING:
    from ambersafe_cli.recipe import Stage

NEEDED = (
    "batch_size", "datasets", "debug", "do_first_eval", "eval_batch_size", "eval_every", "gradient_accumulation_steps",
    "lr", "max_grad_norm", "max_length", "max_prompt_length", "n_epochs", "n_eval_examples", "n_examples", "optimizer",
    "sample_during_eval", "seed", "trainer", "wandb", "warmup_steps",
    "model.name_or_path", "model.fsdp_policy_mp", "model.policy_dtype", "model.reference_dtype",
)  # fmt: skip
_MAY_NEST = ("defaults", "hydra", "wandb")


def of_clone(clone: Path, stage: "Stage") -> dict[str, Any]:
    """The config of a clone, with the groups model and loss that a stage takes; keys with dots, as recipes have them.

    Raises CloneError if it cannot be read, or is not what upstream has: what follows reckons with it.
    """
    folder = clone / "config"
    path = folder / "config.yaml"
    config = dict(_read_mapping(path))
    listed = config.get("defaults")
    defaults = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    for group in ("model", "loss"):
        name = stage.get(group) or next((each[group] for each in defaults if group in each), None)
        config |= {f"{group}.{key}": value for key, value in _read_mapping(folder / group / f"{name}.yaml").items()}
    mend = "`ambersafe setup` mends it."
    if lacking := [key for key in NEEDED if key not in config]:
        raise CloneError(f"Upstream's config {path} lacks {', '.join(lacking)}.", mend)
    for key, value in config.items():
        if key in _MAY_NEST[:2]:
            continue
        if not (isinstance(value, dict) if key == "wandb" else is_plain(value)):
            what = "a mapping" if key == "wandb" else "a plain value, or a list of them"
            raise CloneError(f"Upstream's config {path}: {key} must be {what}, not {reprlib.repr(value)}.", mend)
    return config


def effective(clone: Path, stage: "Stage") -> dict[str, Any]:
    """The same with what the stage sets over it."""
    return of_clone(clone, stage) | dict(stage.values) | {each.key: each.value for each in stage.overrides}


def _read_mapping(path: Path) -> Mapping[str, Any]:
    try:
        document = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CloneError(f"Cannot read upstream's config {path}: {error}", "`ambersafe setup` mends it.") from error
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise CloneError(f"Upstream's config {path} is no mapping of keys.", "`ambersafe setup` mends it.")
    return document

"""From a recipe, flags and KEY=VALUE to a Stage: what is to be trained, fully resolved.

A recipe is a YAML file with the values of both stages, named as upstream's config names them. KEY=VALUE wins over
flags, flags over the recipe, the recipe over upstream's own config.
"""

import math
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import yaml

from ambersafe_cli.errors import DataError, RecipeError, UsageError
from ambersafe_cli.files import expand
from ambersafe_cli.overrides import Override, Value, is_plain, parse_overrides, read_yaml
from ambersafe_cli.templates import TEMPLATES

FOLDER = Path(__file__).parent / "recipes"
DEFAULT = "ambersafe"
HUB_DATASET = "PKU-Alignment/PKU-SafeRLHF"

UPSTREAMS_MAX_PROMPT_LENGTH = 256
TRAINERS = ("FSDPTrainer", "BasicTrainer", "TensorParallelTrainer")
COME_AS_HH = ("hh", "shp", "se")
"""Upstream's own datasets, whose prompts have the form of the template hh already."""

StageName = Literal["sft", "dpo"]

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
MADE_BY_SAVE_TO_DISK = ("dataset_dict.json", "state.json")
_FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".csv")


@dataclass(frozen=True)
class Recipe:
    """A recipe as it stands in its file; `source` is the name of a packaged one, or the path."""

    source: str
    description: str
    data: str | None
    data_revision: str | None
    values: Mapping[StageName, Mapping[str, Value]]


@dataclass(frozen=True)
class Flags:
    """What the flags of `sft` and `dpo` say: `values`, those that were given, by upstream's keys; the rest has none."""

    values: Mapping[str, Value]
    data: str | None = None
    data_revision: str | None = None


@dataclass(frozen=True)
class Stage:
    """One training run, fully resolved.

    `values` are the recipe's and the flags', by upstream's key, without those that an override replaces; `explicit` are
    the keys among them that a flag set; `data` is a path or a name on the hub,
    or empty where the run does not use saferlhf.
    """

    name: StageName
    recipe: str
    values: Mapping[str, Value]
    explicit: frozenset[str]
    overrides: tuple[Override, ...]
    data: str
    data_revision: str | None

    def get(self, key: str) -> Value:
        """What train.py will see for a key, or None if that is left to upstream's config."""
        given = [override.value for override in self.overrides if override.key == key]
        return given[-1] if given else self.values.get(key)

    def with_values(self, values: Mapping[str, Value]) -> "Stage":
        """The same stage with other values for some keys, whoever had set them."""
        kept = tuple(override for override in self.overrides if override.key not in values)
        return replace(self, values={**self.values, **values}, overrides=kept)

    def without(self, keys: Sequence[str]) -> "Stage":
        """The same stage with some keys left to upstream's config."""
        return replace(self, values={k: v for k, v in self.values.items() if k not in keys})

    @property
    def model(self) -> str:
        """The model's name on the hub, or its path; of upstream's own models, such as model=pythia28, that name."""
        return str(self.get("model.name_or_path") or self.get("model"))

    @property
    def trainer(self) -> str:
        return str(self.get("trainer") or "BasicTrainer")


def names() -> list[str]:
    """The recipes in the package, the default one first."""
    return sorted((path.stem for path in FOLDER.glob("*.yaml")), key=lambda name: (name != DEFAULT, name))


def path_of(name: str) -> Path:
    """The file of a packaged recipe, or of one given by its path. Raises RecipeError if there is neither."""
    if name in names():
        return FOLDER / f"{name}.yaml"
    path = expand(name)
    if not path.is_file():
        raise RecipeError(f"There is no recipe {name}.", f"Take {', '.join(names())}, or the path of a YAML file.")
    return path


def load(name: str) -> Recipe:
    """Read a recipe. Raises RecipeError naming the file and the key that is wrong."""
    path = path_of(name)
    hint = f"`ambersafe recipes {DEFAULT}` prints one to start from."
    try:
        document = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"Cannot read the recipe {path}: {error}", hint) from error
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this is none.", hint)
    unknown = set(document) - {"description", "data", "data_revision", "both", "sft", "dpo"}
    if unknown:
        raise RecipeError(f"{path}: unknown key {', '.join(sorted(map(str, unknown)))}.", hint)
    for part in ("both", "sft", "dpo"):
        _check_part(path, part, document.get(part, {}), hint)
    for key in ("description", "data", "data_revision"):
        if not isinstance(document.get(key), str | None):
            raise RecipeError(f"{path}: {key} must be a text, not {reprlib.repr(document[key])}.", hint)
    both = document.get("both", {})
    values = {stage: {**both, **document.get(stage, {})} for stage in ("sft", "dpo")}
    return Recipe(
        source=name if name in names() else str(path.resolve()),
        description=document.get("description") or "",
        data=document.get("data"),
        data_revision=document.get("data_revision"),
        values=cast("dict[StageName, dict[str, Value]]", values),
    )


def _check_part(path: Path, part: str, values: object, hint: str) -> None:
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{path}: {part} must be a mapping of upstream's keys.", hint)
    for key, value in values.items():
        if isinstance(value, dict):
            inner = reprlib.repr(next(iter(value), "KEY")).strip("'")
            raise RecipeError(f"{path}: {part}: write {key}.{inner}: … instead of a mapping.", hint)
        if not is_plain(value):
            what = "a plain value, or a list of them"
            raise RecipeError(f"{path}: {part}: {key} must be {what}, not {reprlib.repr(value)}.", hint)


def resolve(name: StageName, recipe: Recipe, flags: Flags, override_texts: Sequence[str]) -> Stage:
    """Bring recipe, flags and overrides together.

    Raises UsageError for what contradicts itself or is missing, DataError for data that is not there.
    """
    overrides = parse_overrides(override_texts)
    overridden = {override.key for override in overrides}
    # With another group, e.g. model=pythia28, the recipe's values for the old one (model.name_or_path, …) go too.
    group = "model." if "model" in overridden else None
    kept = {key: value for key, value in recipe.values[name].items() if not (group and key.startswith(group))}
    values = {key: value for key, value in {**kept, **flags.values}.items() if key not in overridden}
    given = {override.key: override.value for override in overrides}.get("datasets", values.get("datasets"))
    uses_saferlhf = isinstance(given, list) and "saferlhf" in given
    data, data_revision = resolve_data(recipe, flags) if uses_saferlhf else ("", None)
    stage = Stage(name, recipe.source, values, frozenset(flags.values), overrides, data, data_revision)
    _check(stage)
    if not stage.get("model.name_or_path"):
        return stage
    return stage.with_values({"model.name_or_path": _absolute_if_local(stage.model)})


def resolve_data(recipe: Recipe, flags: Flags) -> tuple[str, str | None]:
    """Where the rows come from: the flag, the environment, the recipe, the hub's PKU-SafeRLHF, in this order."""
    if flags.data == "":
        raise UsageError("--data is empty.", "Give a path, or the name of a dataset on the hub, or leave --data away.")
    environment = os.environ.get("SAFERLHF_DATASET"), os.environ.get("SAFERLHF_REVISION")
    if flags.data:
        data, revision = flags.data, flags.data_revision
    elif environment[0]:
        data, revision = environment[0], flags.data_revision or environment[1]
    else:
        data, revision = recipe.data or HUB_DATASET, flags.data_revision or environment[1] or recipe.data_revision
    if expand(data).exists():
        if flags.data_revision:
            raise UsageError(f"--data-revision picks a revision on the hub, but {data} is a local path.")
        _require_no_pattern(expand(data).resolve())
        return str(expand(data).resolve()), None
    if not _HUB_NAME.fullmatch(data) or data.startswith(".") or data.lower().endswith(_FILE_ENDINGS):
        raise DataError(
            f"There is no file or folder {data}.",
            "--data takes a path, or the name of a dataset on the hub (ORG/NAME).",
        )
    return data, revision


def _require_no_pattern(path: Path) -> None:
    """Raise DataError for a path that `datasets` does not take for the name of itself: it would read other files."""
    is_searched = path.is_dir() and not any((path / name).exists() for name in MADE_BY_SAVE_TO_DISK)
    marks = ("*", "?", "[", "\n", "::") if is_searched else ("::",)
    found = [(mark, path) for mark in marks if mark in str(path)]
    found += [("::", inner) for inner in path.rglob("*::*")] if is_searched else []
    if found:
        raise DataError(
            f"{str(found[0][1])!r} has {found[0][0]!r} in it, by which `datasets` means other files than the one of "
            "that name.",
            "Rename it.",
        )


def _check(stage: Stage) -> None:
    if not stage.get("model.name_or_path") and stage.get("model") in (None, "blank_model"):
        raise UsageError(f"The recipe {stage.recipe} names no model.", "Give --model NAME_OR_PATH.")
    if stage.get("loss") not in (stage.name, None):
        raise UsageError(f"`ambersafe {stage.name}` trains with loss={stage.name}, not loss={stage.get('loss')}.")
    beta = stage.get("loss.beta")
    if stage.name == "dpo" and (not isinstance(beta, int | float) or not 0 < beta < math.inf):
        raise UsageError(f"loss.beta must be a number above 0, it is {beta}.", "Give --beta, e.g. --beta 0.1.")
    if not isinstance(rate := stage.get("lr"), int | float | None) or not math.isfinite(rate or 0):
        raise UsageError(f"lr must be a number, it is {rate}.", "Give --lr, e.g. --lr 5e-7.")
    if stage.get("loss.name") == "ipo" and stage.get("loss.label_smoothing"):
        raise UsageError("Upstream's IPO loss has no label smoothing.", "Leave --label-smoothing or --loss ipo away.")
    if stage.trainer not in TRAINERS:
        raise UsageError(f"There is no trainer {stage.trainer}.", f"Upstream has {', '.join(TRAINERS)}.")
    if expand(stage.model).is_dir() and stage.get("model.revision"):
        raise UsageError(f"--model-revision picks a revision on the hub, but {stage.model} is a local folder.")
    longest, prompt = stage.get("max_length"), stage.get("max_prompt_length") or UPSTREAMS_MAX_PROMPT_LENGTH
    if isinstance(longest, int) and isinstance(prompt, int) and longest <= prompt:
        raise UsageError(
            f"max_length is {longest}, and max_prompt_length {prompt} of it: nothing is left for a response.",
            f"Add max_prompt_length={longest // 2} behind the flags." if longest > 3 else "Give a larger --max-length.",
        )
    _check_lora(stage)
    _check_template(stage.get("template"), stage.get("datasets"))
    exp_name = stage.get("exp_name")
    if not isinstance(exp_name, str) or not exp_name.strip(".") or "/" in exp_name or "\0" in exp_name:
        raise UsageError(f"exp_name names a folder, it cannot be {exp_name!r}.", "Give --exp-name NAME.")


def _check_lora(stage: Stage) -> None:
    if stage.get("lora") not in (None, True, False):
        raise UsageError(f"lora must be true or false, it is {stage.get('lora')!r}.", "--lora sets it.")
    if not stage.get("lora"):
        given = stage.explicit | {override.key for override in stage.overrides}
        if about := sorted(key for key in given if key.startswith("lora_")):
            raise UsageError(f"{about[0]} is about LoRA, which is not asked for.", "Add --lora.")
        if stage.get("quantize"):
            raise UsageError("quantize needs LoRA: weights of so few bits cannot be trained themselves.", "Add --lora.")
        return
    rank, alpha, dropout = (stage.get(f"lora_{name}") for name in ("rank", "alpha", "dropout"))
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise UsageError(f"lora_rank must be a whole number from 1 on, it is {rank!r}.", "Give --lora-rank.")
    if alpha is not None and (not isinstance(alpha, int | float) or not 0 < alpha < math.inf):
        raise UsageError(f"lora_alpha must be a number above 0, it is {alpha!r}.", "Give --lora-alpha.")
    if dropout is not None and (not isinstance(dropout, int | float) or not 0 <= dropout < 1):
        raise UsageError(f"lora_dropout must be a number from 0 to below 1, it is {dropout!r}.", "Give --lora-dropout.")
    targets = stage.get("lora_targets") or "all-linear"
    is_list = isinstance(targets, list) and all(isinstance(name, str) and name for name in targets)
    if targets != "all-linear" and not is_list:
        hint = f"Write lora_targets=[{targets}], or --lora-targets {targets}." if isinstance(targets, str) else ""
        raise UsageError(f"lora_targets must be all-linear or a list of names, it is {targets!r}.", hint)
    if "TensorParallel" in stage.trainer:
        raise UsageError("TensorParallelTrainer has no LoRA.", "--trainer takes FSDPTrainer or BasicTrainer.")
    if stage.get("quantize") not in (None, "4bit", "8bit"):
        raise UsageError(f"quantize must be 4bit or 8bit, it is {stage.get('quantize')!r}.", "--quantize sets it.")


def _check_template(template: Value, datasets: Value) -> None:
    if template not in (None, *TEMPLATES):
        raise UsageError(
            f"There is no template {template}.",
            f"--template takes none, {', '.join(TEMPLATES)}; in a recipe, and as template=…, none is written null.",
        )
    names = datasets if isinstance(datasets, list) else ["hh"]  # upstream's own default
    formed = [str(name) for name in names if name in COME_AS_HH]
    if template == "chat" and formed:
        raise UsageError(
            f"The prompts of {', '.join(formed)} come in the form hh, and chat cannot be applied to them.",
            "Take --template hh, which leaves them as they are.",
        )


def _absolute_if_local(model: str) -> str:
    """A local model by its absolute path, so that a run's record holds wherever it is read."""
    path = expand(model)
    if path.is_dir():
        return str(path.resolve())
    if model.startswith(("/", "./", "../", "~")):
        raise UsageError(f"There is no model folder {model}.", "--model takes a folder, or a name on the hub.")
    return model

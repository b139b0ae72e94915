"""What weights are used with after training, as training had it: its settings, its clone of upstream, its rows."""

import os
import reprlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ambersafe_cli import (
    by_hand,
    checkpoints,
    display,
    environment,
    hub,
    integrity,
    model_code,
    models,
    recorded,
    runs,
    upstream,
)
from ambersafe_cli import recipe as recipes
from ambersafe_cli.errors import CloneError, HubError, RunFolderError, TrainingEnvironmentError, UsageError
from ambersafe_cli.overrides import LARGEST
from ambersafe_cli.templates import TEMPLATES

# Where a run's config says nothing: upstream's own config, of which a bare model needs no more than this.
_UPSTREAMS: Mapping[str, Any] = {
    "max_length": 512,
    "max_prompt_length": recipes.UPSTREAMS_MAX_PROMPT_LENGTH,
    "keep_eos": False,
    "drop_eos": False,
    "shuffle_pairs": False,
    "template": None,
    "datasets": ["saferlhf"],
    "n_eval_examples": 256,
    "eval_batch_size": 16,
    "trainer": "BasicTrainer",
    "model.policy_dtype": "float32",
    "model.fsdp_policy_mp": None,
    "mixed_precision": None,
    "model.reference_dtype": "float16",
    "loss.beta": None,
    "lora_rank": None,
}
_TOKENIZING = ("max_length", "max_prompt_length", "keep_eos", "drop_eos", "shuffle_pairs", "template")


@dataclass(frozen=True)
class Rows:
    """Preference rows: upstream's names of the data sets, where those of saferlhf are (a path, or a name on the hub and
    its revision), and the environment variables that say so. `may_be_the_runs`: whether, for all that is known, the run
    was trained on rows of the same source."""

    datasets: tuple[str, ...]
    name: str
    revision: str | None
    environment: Mapping[str, str]
    may_be_the_runs: bool


def config(run: runs.Run | None, template: str | None = None) -> dict[str, Any]:
    """The settings of a run by upstream's keys, of a bare model those of the default recipe.

    A run's are those of its config.yaml, which train.py writes, or of its record. `template`, unless None, replaces
    the run's; "none" stands for no template.
    """
    chosen = recipes.load(recipes.DEFAULT).values["dpo"]
    found = {key: chosen.get(key, value) if run is None else value for key, value in _UPSTREAMS.items()}
    if run is not None:
        recorded_values = {key: value for key in found if (value := run.setting(key)) is not None}
        written = {key: value for key, value in by_hand.config(run.folder).items() if key in found}
        found |= recorded_values | written
    if template is not None:
        found["template"] = None if template == "none" else template
    for key, value in found.items():
        if run and not _is_usable(key, value):
            raise RunFolderError(
                f"{run.folder}: its {key} is {reprlib.repr(value)}, which no run can have.",
                "Its config.yaml, which train.py wrote, or its run.json says so: put back what was there.",
            )
    if found["max_length"] <= found["max_prompt_length"]:
        raise UsageError(
            f"max_length is {found['max_length']}, and max_prompt_length {found['max_prompt_length']} of it: "
            "no room is left for a response."
        )
    return found


def _is_usable(key: str, value: object) -> bool:
    """Whether a setting has the type of upstream's own; of what is null there a plain one."""
    own = _UPSTREAMS[key]
    if key == "template":
        return value in (None, *TEMPLATES)
    if own is None:
        numbers = {"loss.beta": int | float | None, "lora_rank": int | None}
        return isinstance(value, numbers.get(key, str | None))
    is_small = type(own) is not int or (isinstance(value, int) and 1 <= value <= LARGEST)
    return type(value) is type(own) and is_small


def tokenizing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the settings that upstream's data iterator takes."""
    return {key: config[key] for key in _TOKENIZING}


@dataclass(frozen=True)
class Precision:
    """What a model computes in: the type of its weights, whether its buffers have that type too, and the type that
    autocast computes in where it is on.

    With an adapter the model's own weights may be quantized, to 4bit or 8bit. An adapter has a type of its own, and
    what its rank is beyond `trained_rank` is the SFT stage's.
    """

    dtype: str
    casts_buffers: bool = False
    autocast: str | None = None
    quantize: str | None = None
    adapter_dtype: str = "float32"
    trained_rank: int | None = None


def policy_precision(config: Mapping[str, Any], adapter: checkpoints.Adapter | None = None) -> Precision:
    """Of the policy in training, which had this adapter or none (trainers.py, FSDPTrainer.__init__ and
    BasicTrainer.autocast; adapters.py).

    FSDP's mixed precision casts the weights, and upstream's fsdp_policy_mp the buffers as well.
    """
    found = _precision(config)
    if adapter is None:
        return found
    adapter_dtype = found.dtype if _is_cast_by_fsdp(config) else "float32"
    rank = config.get("lora_rank")
    return replace(
        found, quantize=adapter.quantize, adapter_dtype=adapter_dtype, trained_rank=rank if rank is None else int(rank)
    )


def _precision(config: Mapping[str, Any]) -> Precision:
    weights, mixed = str(config["model.policy_dtype"]), config["mixed_precision"]
    if "FSDP" not in str(config["trainer"]):
        return Precision(weights, autocast=mixed and str(mixed))
    if mixed:
        return Precision(str(mixed))
    mixed = config["model.fsdp_policy_mp"]
    return Precision(str(mixed), casts_buffers=True) if mixed else Precision(weights)


def _is_cast_by_fsdp(config: Mapping[str, Any]) -> bool:
    return "FSDP" in str(config["trainer"]) and bool(config["mixed_precision"] or config["model.fsdp_policy_mp"])


def reference_precision(config: Mapping[str, Any], adapter: checkpoints.Adapter | None = None) -> Precision:
    """Of the reference model in training, where the policy had this adapter or none: with one they are one model, and
    what the SFT stage trained is one adapter."""
    if adapter:
        return replace(policy_precision(config, adapter), trained_rank=None)
    mixed = None if "FSDP" in str(config["trainer"]) else config["mixed_precision"]
    return Precision(str(config["model.reference_dtype"]), autocast=mixed and str(mixed))


def adapter_of(weights: models.Weights) -> checkpoints.Adapter | None:
    """The adapter that weights have, None without one. Raises ArchiveError if their checkpoint is not whole."""
    return checkpoints.adapter_of(weights.checkpoint) if weights.checkpoint else None


def for_child(weights: models.Weights, precision: Precision, merges: bool = False) -> dict[str, Any]:
    """Weights as children/load_policy.py takes them. Only those of the model as published are quantized.

    `merges`: an adapter of theirs is added to the weights, as in the reference model of full fine-tuning.
    """
    adapter = adapter_of(weights)
    if weights.checkpoint and (adapter is None or adapter.on or merges):
        precision = replace(precision, quantize=None)
    return {
        "label": weights.label,
        "model": weights.model,
        "revision": weights.revision,
        "tokenizer": weights.tokenizer,
        "tokenizer_revision": weights.tokenizer_revision,
        "checkpoint": weights.checkpoint and str(weights.checkpoint),
        "merges": merges,
        **asdict(precision),
    }


def as_dictionary(weights: models.Weights | None) -> dict[str, Any] | None:
    """Weights as an answer names them: label, model, revision, checkpoint, and the run's name, where there is one."""
    if weights is None:
        return None
    return {
        "label": weights.label,
        "model": weights.model,
        "revision": weights.revision,
        "checkpoint": weights.checkpoint and str(weights.checkpoint),
        "run": weights.run.folder.name if weights.run and weights.checkpoint else None,
    }


def clone(run: runs.Run | None, folder: Path | None) -> Path:
    """The clone whose code reads the data: the one that is named, else the run's own at its commit, else the default.

    Raises CloneError if there is none.
    """
    if folder is None and run is not None and "upstream" in run.record:
        try:
            return recorded.clone(run.record["upstream"], allow_modified=False)
        except CloneError as error:
            raise CloneError(error.message, "`--dir CLONE` goes on with another one, as it is.") from error
    named = folder or Path(os.environ.get("AMBERSAFE_UPSTREAM_DIR") or upstream.DEFAULT_FOLDER)
    if not (named / "preference_datasets.py").is_file():
        raise CloneError(f"There is no clone of upstream in {named.absolute()}.", "`ambersafe setup` makes it.")
    return named.absolute()


def rows(
    run: runs.Run | None, config: Mapping[str, Any], data: str | None = None, data_revision: str | None = None
) -> Rows:
    """The rows that are meant: those of the flags, else the run's, at its commit, else the default recipe's, which is
    said. Raises UsageError or DataError for flags that name none."""
    names = tuple(map(str, config["datasets"]))
    if run is not None and not data and (names != ("saferlhf",) or "environment" in run.record):
        environment = recorded.pinned(run.record, run.folder)[1] if "environment" in run.record else {}
        name = str(run.record["data"].get("name") or ", ".join(names))
        if data_revision and names == ("saferlhf",):
            environment = {**environment, "SAFERLHF_REVISION": data_revision}
        revision = environment.get("SAFERLHF_REVISION") or None
        return Rows(names, name, revision, environment, may_be_the_runs=not data_revision)
    chosen = recipes.load(recipes.DEFAULT)
    name, revision = recipes.resolve_data(chosen, recipes.Flags({}, data, data_revision))
    if not data and run is not None:
        display.warn(f"nothing says which rows {run.folder.name} was trained on; these are {name} {revision or ''}")
    environment = {"SAFERLHF_DATASET": name, "SAFERLHF_REVISION": revision or ""}
    is_by_hand = run is not None and "environment" not in run.record
    return Rows(("saferlhf",), name, revision, environment, may_be_the_runs=is_by_hand)


def require_packages(python: str, every: Sequence[models.Weights], quantize: Sequence[str | None]) -> None:
    """Raise TrainingEnvironmentError if an interpreter lacks what it takes, adapters and quantized weights included,
    and HubError for a model that takes code of its own."""
    adapters = [weights.checkpoint for weights in every if adapter_of(weights)]
    needs = [("peft", "lora", f"the adapter of {adapters[0]}")] if adapters else []
    needs += [("bitsandbytes", "quantize", f"a model in {bits}") for bits in quantize if bits]
    there = environment.probe(python)
    others = [str(each.run.record["command"][0]) for each in every if each.run and each.run.record.get("command")]
    by = next((f" {shlex.quote(other)}, which trained this" for other in others if other != there.python), "")
    if there.missing:
        raise TrainingEnvironmentError(
            f"{there.python} lacks {', '.join(there.missing)}.",
            f"Install them there: `pip install 'ambersafe-cli[train]'`, or name another interpreter: --python{by}.",
        )
    for package, extra, what in needs:
        if package not in there.extras:
            raise TrainingEnvironmentError(
                f"{there.python} lacks {package}, which {what} needs.",
                f"Install it there: `pip install 'ambersafe-cli[{extra}]'`, or name another interpreter: --python{by}.",
            )
    for each in every:
        model_code.require_none(hub.Source("model", each.model, each.revision), there.python)
        model_code.require_none(hub.Source("tokenizer", each.tokenizer, each.tokenizer_revision), there.python)


def require_there(every: Sequence[models.Weights], rows: Rows | None) -> None:
    """Raise HubError for a folder that is not whole, or offline for what is not in the Hugging Face cache, and
    ArchiveError for a checkpoint that is not as it was written."""
    sources: list[hub.Source] = []
    for weights in every:
        if weights.checkpoint:
            integrity.require_whole(weights.checkpoint)
        sources.append(hub.Source("model", weights.model, weights.revision))
        sources.append(hub.Source("tokenizer", weights.tokenizer, weights.tokenizer_revision))
    if rows and rows.datasets == ("saferlhf",):
        sources.append(hub.Source("data", rows.name, rows.revision))
    for source in dict.fromkeys(sources):
        if (source.is_local or not source.could_be_fetched or hub.offline_by()) and (lacking := hub.lacking(source)):
            raise HubError(
                f"{hub.problem(source, lacking)}.",
                f"{hub.offline_by()} keeps it off the network: `ambersafe prefetch` fetches it where there is one."
                if source.could_be_fetched
                else "",
            )

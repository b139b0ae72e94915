"""Everything that can be known before a model is loaded: findings, all at once, and the plan of what a run will do."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ambersafe_cli import checkpoints, hub
from ambersafe_cli.environment import INSTALL_HINT
from ambersafe_cli.errors import ArchiveError, CloneError
from ambersafe_cli.overrides import Value, read_yaml
from ambersafe_cli.plans import Plan, in_gigabytes, make_plan

if TYPE_CHECKING:
    from ambersafe_cli.environment import TrainingEnvironment
    from ambersafe_cli.recipe import Stage
    from ambersafe_cli.upstream import CloneState

SAMPLE = 20_000
"""How many pairs of a split are tokenized to measure what is cut; all of them if there are no more."""

_LOOK_AT_DATA = Path(__file__).parent / "children" / "look_at_data.py"
_SAFERLHF = Path(__file__).parent / "saferlhf.py"


@dataclass(frozen=True)
class Finding:
    """Something that an error stops the run for, or that a user should know; and what to change."""

    level: Literal["error", "warning"]
    what: str
    mend: str


@dataclass(frozen=True)
class Report:
    findings: tuple[Finding, ...]
    plan: Plan | None

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]


@dataclass(frozen=True)
class Subject:
    """What preflight looks at: a stage fitted to clone and machine, and how many processes will train it."""

    stage: "Stage"
    clone: "CloneState"
    environment: "TrainingEnvironment"
    run_folder: Path
    processes: int
    expected_base: str
    allow_modified: bool


def check(subject: Subject) -> Report:
    """Look at everything, and return what was found. Raises CloneError if upstream's config cannot be read."""
    config = effective_config(subject)
    findings = [*_of_clone(subject), *_of_environment(subject), *_of_types(config)]
    if any(finding.level == "error" for finding in findings):
        return Report(tuple(findings), None)  # what follows reckons with these
    findings += _of_settings(subject, config)
    sources = hub.sources(config, subject.stage.data, subject.stage.data_revision)
    lacking = {source: hub.lacking(source) for source in sources}
    findings += _of_sources(subject, lacking)
    model = hub.folder_of(sources[0]) if "config.json" not in lacking[sources[0]] else None
    shapes = None
    try:
        shapes = checkpoints.model_shapes(model) if model and not lacking[sources[0]] else None
        findings += _of_archive(subject.stage, shapes)
    except ArchiveError as error:
        findings.append(Finding("error", error.message, error.hint))
    findings += _of_block(subject.stage, model, config)
    plan = None
    can_look = not hub.offline_by() or not any(lacking[source] for source in sources[1:])
    if config["datasets"] == ["saferlhf"] and not subject.environment.missing and can_look:
        data = look_at_data(subject, config, sources[1])
        findings += _of_data(subject, config, data)
        if "splits" in data:
            plan = make_plan(subject.stage.name, subject.processes, subject.run_folder, config, data, shapes)
            findings += _of_disk(plan)
    return Report(tuple(findings), plan)


def effective_config(subject: Subject) -> dict[str, Any]:
    """Upstream's own config of the clone, with what the stage sets over it; keys with dots, as recipes have them."""
    folder = subject.clone.folder / "config"
    config: dict[str, Any] = dict(_read_mapping(folder / "config.yaml"))
    for group in ("model", "loss"):
        name = subject.stage.get(group)
        values = _read_mapping(folder / group / f"{name}.yaml") if name else {}
        config |= {f"{group}.{key}": value for key, value in values.items()}
    config |= dict(subject.stage.values)
    config |= {override.key: override.value for override in subject.stage.overrides}
    return config


def _read_mapping(path: Path) -> Mapping[str, Value]:
    try:
        document = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CloneError(f"Cannot read upstream's config {path}: {error}", "`ambersafe setup` mends it.") from error
    return document if isinstance(document, dict) else {}


def _of_clone(subject: Subject) -> Iterator[Finding]:
    clone = subject.clone
    level: Literal["error", "warning"] = "warning" if subject.allow_modified else "error"
    go_on = "or go on with --allow-modified, which run.json records."
    if clone.edited or clone.foreign or any(p.state == "altered" for p in clone.patches):
        touched = [*clone.edited, *map(repr, clone.foreign)]
        touched += [p.patch.name for p in clone.patches if p.state == "altered"]
        yield Finding(
            level, f"{clone.folder} was edited: {', '.join(touched)}.", f"`ambersafe setup` mends it, {go_on}"
        )
    if clone.base != subject.expected_base:
        found = str(clone.base)[:12]
        yield Finding("warning", f"{clone.folder} is upstream at {found}, which is not the pinned commit.", "")
    missing = [p.patch.name for p in clone.patches if p.state == "missing"]
    if missing:
        yield Finding(
            "warning", f"{clone.folder} lacks {len(missing)} patches: {', '.join(missing)}.", "`ambersafe setup`"
        )


def _of_environment(subject: Subject) -> Iterator[Finding]:
    missing = subject.environment.missing
    if missing:
        yield Finding("error", f"{subject.environment.python} lacks {', '.join(missing)}.", INSTALL_HINT)


def _of_types(config: Mapping[str, Any]) -> Iterator[Finding]:
    counts = ["batch_size", "gradient_accumulation_steps", "eval_batch_size", "eval_every", "max_length"]
    counts += ["max_prompt_length", *(key for key in ("n_epochs", "n_examples") if config[key] is not None)]
    for key in counts:
        value = config[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield Finding("error", f"{key} must be a whole number from 1 on, it is {value!r}.", f"Change {key}.")
    if config["n_epochs"] is None and config["n_examples"] is None:
        yield Finding("error", "Neither n_epochs nor n_examples says when to end.", "Give --epochs.")


def _of_settings(subject: Subject, config: Mapping[str, Any]) -> Iterator[Finding]:
    batch, accumulate = config["batch_size"], config["gradient_accumulation_steps"]
    ranks, eval_batch = subject.processes, config["eval_batch_size"]
    if batch % (accumulate * ranks):
        yield Finding(
            "error",
            f"batch_size {batch} cannot be cut into {accumulate} microbatches on {ranks} ranks: "
            "examples would be dropped.",
            f"Take a multiple of {accumulate * ranks} for --batch-size, or another --grad-accum.",
        )
    if eval_batch % ranks:
        yield Finding(
            "error",
            f"eval_batch_size {eval_batch} cannot be cut for {ranks} ranks: examples would be dropped.",
            f"Add eval_batch_size={-(-eval_batch // ranks) * ranks} behind the flags.",
        )
    if config["eval_every"] < batch:
        yield Finding(
            "error",
            f"eval_every {config['eval_every']} is smaller than batch_size {batch}: upstream rounds it to 0 and fails.",
            f"Add eval_every={batch} behind the flags, or more.",
        )


def _of_sources(subject: Subject, lacking: Mapping[hub.Source, list[str]]) -> Iterator[Finding]:
    """What is not on this machine: an error without a network, and where no download would mend it."""
    offline = hub.offline_by()
    command = hub.prefetch_command(subject.stage, tuple(lacking), subject.environment.python)
    for source, files in lacking.items():
        problem = hub.problem(source, files)
        if not files:
            continue
        if not source.could_be_fetched:
            yield Finding("error", f"{problem}.", "--model takes a whole folder, or a name on the hub (ORG/NAME).")
        elif offline:
            yield Finding("error", f"{problem}, and {offline} is set.", f"Where there is a network: `{command}`.")
        else:
            yield Finding("warning", f"{problem}: it will be downloaded.", f"`{command}` does that beforehand.")


def _of_archive(stage: "Stage", model: checkpoints.Shapes | None) -> Iterator[Finding]:
    archive = stage.get("model.archive")
    if not archive:
        return
    shapes = checkpoints.policy_shapes(Path(str(archive)))
    wrong = checkpoints.differences(shapes, model) if model else []
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        yield Finding(
            "error",
            f"{archive} does not fit the model {stage.model}: {'; '.join(wrong[:3])}{more}.",
            "Give the --model that it was trained from, or another --archive.",
        )


def _of_block(stage: "Stage", model: Path | None, config: Mapping[str, Any]) -> Iterator[Finding]:
    """FSDPTrainer wraps layers of a class that the config names; transformers calls it as the model's type begins."""
    block = config.get("model.block_name")
    if "FSDP" not in stage.trainer or model is None:
        return
    if not block:
        yield Finding("error", "FSDPTrainer needs model.block_name.", "Add e.g. model.block_name=LlamaDecoderLayer.")
        return
    architectures = json.loads((model / "config.json").read_text()).get("architectures") or []
    name = architectures[0].removesuffix("ForCausalLM").removesuffix("LMHeadModel") if architectures else ""
    if name and not str(block).startswith(name):
        yield Finding(
            "error",
            f"model.block_name {block} is not a layer of {architectures[0]}.",
            f"Its name begins with {name}, e.g. model.block_name={name}DecoderLayer.",
        )


def look_at_data(subject: Subject, config: Mapping[str, Any], tokenizer: hub.Source) -> dict[str, Any]:
    """Have the training interpreter count and measure the rows; see children/look_at_data.py."""
    request = {
        "saferlhf": str(_SAFERLHF),
        "tokenizer": tokenizer.name,
        "revision": tokenizer.revision,
        "max_length": config["max_length"],
        "max_prompt_length": config["max_prompt_length"],
        "sample": SAMPLE,
    }
    rows = {"SAFERLHF_DATASET": subject.stage.data, "SAFERLHF_REVISION": subject.stage.data_revision or ""}
    child = subprocess.run(
        [subject.environment.python, str(_LOOK_AT_DATA), json.dumps(request)],
        env={**os.environ, **rows},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer = json.loads(child.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        answer = {"error": child.stderr.strip()}
    return answer if isinstance(answer, dict) else {"error": child.stdout}


def _of_data(subject: Subject, config: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[Finding]:
    source = subject.stage.data
    if "error" in data:
        yield Finding("error", f"Cannot read {source}: {data['error']}", "`ambersafe data` tries again and says more.")
        return
    train, test = data["splits"]["train"], data["splits"]["test"]
    n_train, n_test = train[subject.stage.name], test[subject.stage.name]
    what = "prompts" if subject.stage.name == "sft" else "pairs"
    for name, split in data["splits"].items():
        if not split["dpo"]:
            yield Finding(
                "error", f"{source} ({name} split): none of {split['rows']} rows has exactly one safe response.", ""
            )
        if split["rows_with_eos"]:
            yield Finding(
                "error",
                f"{source} ({name} split): {split['rows_with_eos']} rows hold the tokenizer's EOS {data['eos']!r}, "
                f"at which upstream stops while it trains; the first has the prompt {split['first_with_eos'][:60]!r}.",
                "Take it out of these rows, or leave them out.",
            )
    if 0 < n_train < config["batch_size"]:
        yield Finding(
            "error",
            f"There are {n_train} {what} to train on, fewer than batch_size {config['batch_size']}: no step is done.",
            f"Give --batch-size {n_train} or less.",
        )
    if 0 < n_test < config["eval_batch_size"]:
        yield Finding(
            "error",
            f"There are {n_test} {what} in the test split, fewer than eval_batch_size {config['eval_batch_size']}: "
            "no evaluation can be done.",
            f"Add eval_batch_size={n_test} behind the flags, or less.",
        )
    elif 0 < n_test < (config["n_eval_examples"] or 0):
        yield Finding(
            "warning",
            f"n_eval_examples is {config['n_eval_examples']}, but there are {n_test} {what} in the test split: "
            "an evaluation counts some of them twice.",
            f"Add n_eval_examples={n_test // config['eval_batch_size'] * config['eval_batch_size']} behind the flags.",
        )
    if n_train > config["batch_size"] and n_train % config["batch_size"]:
        yield Finding(
            "warning",
            f"The last {n_train % config['batch_size']} {what} of each epoch are dropped, as upstream does.",
            "",
        )
    cut = train["sampled"]
    if cut["responses_cut"] or cut["prompts_cut"]:
        yield Finding(
            "warning",
            f"Of {cut['pairs']} pairs looked at, {cut['responses_cut']} have their responses cut and "
            f"{cut['prompts_cut']} their prompt; {cut['eos_lost']} responses lose their EOS, "
            f"{cut['tokens_lost']} tokens are lost in all.",
            "A higher max_length or a lower max_prompt_length keeps more; the longest has "
            f"{cut['tokens_longest']} tokens after the cut.",
        )
    if cut["empty"]:
        yield Finding("error", f"{cut['empty']} pairs have no token of prompt or response left.", "Raise --max-length.")


def _of_disk(plan: Plan) -> Iterator[Finding]:
    if plan.disk_bytes and plan.disk_bytes > plan.disk_free_bytes:
        yield Finding(
            "error",
            f"The checkpoints need {in_gigabytes(plan.disk_bytes)}, and {in_gigabytes(plan.disk_free_bytes)} are free.",
            "Keep fewer (--keep 1), save less often (eval_every=…), or work on a larger disk.",
        )

"""Everything that can be known before a model is loaded: findings, all at once, and the plan of what a run will do."""

import difflib
import json
import netrc
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ambersafe_cli import (
    adapter_findings,
    checkpoints,
    clone_config,
    data_findings,
    files,
    hub,
    integrity,
    model_code,
    models,
)
from ambersafe_cli.environment import INSTALL_HINT
from ambersafe_cli.errors import ArchiveError
from ambersafe_cli.findings import Finding
from ambersafe_cli.plans import Plan, in_gigabytes, make_plan
from ambersafe_cli.speed_findings import of_speed
from ambersafe_cli.value_findings import of_values

if TYPE_CHECKING:
    from ambersafe_cli.environment import TrainingEnvironment
    from ambersafe_cli.recipe import Stage
    from ambersafe_cli.upstream import CloneState


@dataclass(frozen=True)
class Report:
    """What was found, the plan, and what children/look_at_data.py answered; None where it did not come so far."""

    findings: tuple[Finding, ...]
    plan: Plan | None
    data: Mapping[str, Any] | None = None

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]


@dataclass(frozen=True)
class Subject:
    """What preflight looks at: a stage fitted to clone and machine, and how many processes will train it.

    `clone_is_checked`: the clone is that of an older run, whose series need not be today's. `archive_to_come`: the
    archive will be there when the run begins.
    """

    stage: "Stage"
    clone: "CloneState"
    environment: "TrainingEnvironment"
    run_folder: Path
    processes: int
    expected_base: str
    allow_modified: bool
    clone_is_checked: bool = False
    archive_to_come: bool = False


def check(subject: Subject) -> Report:
    """Look at everything, and return what was found. Raises CloneError if upstream's config cannot be read."""
    config = clone_config.effective(subject.clone.folder, subject.stage)
    findings = [*_of_clone(subject), *_of_environment(subject), *_of_keys(subject)]
    findings += of_values(subject.stage.name, config)
    if any(finding.level == "error" for finding in findings):
        return Report(tuple(findings), None)  # what follows reckons with these
    findings += [*_of_settings(subject, config), *of_speed(subject.stage, config, subject.environment)]
    findings += adapter_findings.of_needs(subject.stage.name, config, subject.environment)
    findings += [*_of_template(subject, config), *_of_wandb(config)]
    sources = hub.sources(config, subject.stage.data, subject.stage.data_revision)
    lacking = {source: hub.lacking(source) for source in sources}
    findings += [*_of_sources(subject, lacking), *model_code.of_sources(sources[:2], subject.environment.python)]
    model = hub.folder_of(sources[0]) if "config.json" not in lacking[sources[0]] else None
    shapes = None
    try:
        shapes = checkpoints.model_shapes(model) if model and not lacking[sources[0]] else None
        findings += adapter_findings.of_targets(subject.stage, config, shapes) if shapes else []
        findings += [] if subject.archive_to_come else _of_archive(subject, config, shapes)
    except ArchiveError as error:
        findings.append(Finding("error", error.message, error.hint))
    try:
        findings += _of_block(subject.stage, model, config)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        findings.append(Finding("error", f"Cannot read {model}/config.json: {error}", "Download the model again."))
    plan, data = None, None
    can_look = not hub.offline_by() or not any(lacking[source] for source in sources[1:])
    if config["datasets"] == ["saferlhf"] and not subject.environment.missing and can_look:
        data = data_findings.look_at_data(subject.stage, subject.environment, config, sources[1])
        findings += data_findings.of_data(subject.stage, config, data)
        if "splits" in data:
            plan = make_plan(subject.stage.name, subject.processes, subject.run_folder, config, data, shapes)
            findings += [*_of_disk(plan), *_of_learning_rate(config, plan)]
    return Report(tuple(findings), plan, data)


def _of_clone(subject: Subject) -> Iterator[Finding]:
    clone = subject.clone
    if subject.clone_is_checked:
        return
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


def _of_keys(subject: Subject) -> Iterator[Finding]:
    """A key that upstream's config does not have: Hydra refuses it, once the run's folder is made."""
    config = clone_config.of_clone(subject.clone.folder, subject.stage)
    known = {key for key in config if key != "defaults"} | {"model", "loss"}
    known |= {f"{key}.{inner}" for key, value in config.items() if isinstance(value, dict) for inner in value}
    for override in subject.stage.overrides:
        is_hydras = (
            re.match(r"hydra\b", override.key) or "@" in override.key
        )  # its own settings, and where a group goes
        if override.key in known or is_hydras or override.text.startswith(("+", "~")):
            continue
        close = difflib.get_close_matches(override.key, sorted(known), n=1)
        mend = f"Is it {close[0]}? " if close else ""
        yield Finding(
            "error",
            f"Upstream's config has no key {override.key}.",
            f"{mend}+{override.text} would add it to the config.",
        )


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
    if config["seed"] and not config.get("seed_data"):
        yield Finding(
            "warning",
            f"seed {config['seed']} changes nothing: upstream does not pass it to the data, and has no dropout.",
            "seed_data=true orders the training data by it.",
        )
    if config["eval_every"] < batch:
        yield Finding(
            "error",
            f"eval_every {config['eval_every']} is smaller than batch_size {batch}: upstream rounds it to 0 and fails.",
            f"Add eval_every={batch} behind the flags, or more.",
        )


def _of_template(subject: Subject, config: Mapping[str, Any]) -> Iterator[Finding]:
    """A model that saw one form of prompts in SFT has to learn another one in DPO, beside what DPO is for."""
    archive = subject.stage.get("model.archive")
    run = models.run_of(Path(str(archive))) if archive else None
    if run is None:
        return
    then, now = (template or "none" for template in (run.setting("template"), config.get("template")))
    if then != now:
        yield Finding(
            "warning",
            f"{run.folder.name}, which this starts from, was trained with the template {then}, this run has {now}.",
            f"--template {then} goes on with that one.",
        )


def _of_wandb(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Without a login wandb asks for one, and as nobody can answer it ends the run once the models are loaded."""
    is_on = config.get("wandb.enabled", config["wandb"]["enabled"]) and not config["debug"]
    if not is_on or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        is_logged_in = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        is_logged_in = False
    if not is_logged_in:
        yield Finding(
            "error", f"wandb is not logged in at {host}.", "`wandb login`, WANDB_MODE=offline, or leave --wandb away."
        )


def _of_sources(subject: Subject, lacking: Mapping[hub.Source, list[str]]) -> Iterator[Finding]:
    """What is not on this machine: an error without a network, and where no download would mend it."""
    offline = hub.offline_by()
    command = hub.prefetch_command(subject.stage, tuple(lacking), subject.environment.python)
    for source, absent in lacking.items():
        problem = hub.problem(source, absent)
        if not absent:
            continue
        if not source.could_be_fetched:
            yield Finding("error", f"{problem}.", "--model takes a whole folder, or a name on the hub (ORG/NAME).")
        elif offline:
            yield Finding("error", f"{problem}, and {offline} is set.", f"Where there is a network: `{command}`.")
        else:
            yield Finding("warning", f"{problem}: it will be downloaded.", f"`{command}` does that beforehand.")


def _of_archive(subject: Subject, config: Mapping[str, Any], model: checkpoints.Shapes | None) -> Iterator[Finding]:
    stage = subject.stage
    archive = stage.get("model.archive")
    if not archive:
        return
    shapes = checkpoints.policy_shapes(Path(str(archive)))
    integrity.require_whole(Path(str(archive)))
    applied = {p.patch.subject for p in subject.clone.patches if p.state != "missing"}
    yield from adapter_findings.of_archive(stage, config, subject.environment, model, applied)
    is_adapter = checkpoints.adapter_of(Path(str(archive))) is not None
    wrong = checkpoints.differences(shapes, model) if model and not is_adapter else []
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        yield Finding(
            "error",
            f"{archive} does not fit the model {stage.model}: {'; '.join(wrong[:3])}{more}.",
            "Give the --model that it was trained from, or another --archive.",
        )


def _architectures(model: Path) -> list[str]:
    found = json.loads(files.read_text(model / "config.json")).get("architectures")
    return [str(each) for each in found or []]


def _of_block(stage: "Stage", model: Path | None, config: Mapping[str, Any]) -> Iterator[Finding]:
    """FSDPTrainer wraps layers of a class that the config names; transformers calls it as the model's type begins."""
    block = config.get("model.block_name")
    architectures = _architectures(model) if model else []
    if "FSDP" not in stage.trainer or model is None:
        return
    if not block:
        yield Finding("error", "FSDPTrainer needs model.block_name.", "Add e.g. model.block_name=LlamaDecoderLayer.")
        return
    name = architectures[0].removesuffix("ForCausalLM").removesuffix("LMHeadModel") if architectures else ""
    if name and not str(block).startswith(name):
        yield Finding(
            "error",
            f"model.block_name {block} is not a layer of {architectures[0]}.",
            f"Its name begins with {name}, e.g. model.block_name={name}DecoderLayer.",
        )


def _of_disk(plan: Plan) -> Iterator[Finding]:
    if plan.disk_bytes and plan.disk_bytes > plan.disk_free_bytes:
        yield Finding(
            "error",
            f"The checkpoints need {in_gigabytes(plan.disk_bytes)}, and {in_gigabytes(plan.disk_free_bytes)} are free.",
            "Keep fewer (--keep 1), save less often (eval_every=…), or work on a larger disk.",
        )


def _of_learning_rate(config: Mapping[str, Any], plan: Plan) -> Iterator[Finding]:
    warmup = config["warmup_steps"]
    if plan.steps <= warmup:
        yield Finding(
            "warning",
            f"The learning rate warms up for {warmup} steps, and there are {plan.steps}: it never reaches lr.",
            f"Add warmup_steps={plan.steps // 10} behind the flags.",
        )
    elif config.get("lr_decay") is None:
        yield Finding(
            "warning",
            f"The learning rate does not decay: {plan.steps - warmup:,} of {plan.steps:,} steps are at {config['lr']}.",
            "lr_decay=cosine takes it to 0.",
        )

"""Where trained weights come from, in Markdown for their card: names, data and licence, settings, provenance.

No path of this machine gets into a card, as it is published: of a local file or folder it has the last part.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ambersafe_cli import by_hand, metrics, models, runs
from ambersafe_cli import recipe as recipes
from ambersafe_cli.errors import UsageError
from ambersafe_cli.overrides import parse_overrides

_HUB = "https://huggingface.co"
LICENCES = {recipes.HUB_DATASET: "cc-by-nc-4.0"}
"""Of data, by its card on the hub."""

_NEEDED_BY = {"lora": "peft", "quantize": "bitsandbytes"}
"""Packages that took part where a setting asked for it."""

_TOLD_ELSEWHERE = re.compile(
    r"(wandb\b.*|local_.*|hydra\b.*|debug|fsdp_port|model|model\.(name_or_path|archive|revision)|datasets)"
)
"""Settings that the card has in other places, or that are of the machine it was trained on."""


def stages_of(run: runs.Run | None) -> list[runs.Run]:
    """The runs that the weights went through, the first one first, as far as their folders are there."""
    found = [run] if run else []
    while found and len(found) < 8 and (archive := found[0].record.get("archive")):
        earlier = models.run_of(Path(str(archive)))
        if earlier is None:
            break
        found.insert(0, earlier)
    return found


def name_of(run: runs.Run) -> str:
    """The stage's name for people."""
    return {"sft": "SFT", "dpo": "DPO"}.get(str(run.record["stage"]), str(run.record["stage"]))


def is_on_hub(name: str) -> bool:
    """Whether a name is none of a local path: runs have those as absolute ones."""
    is_there = os.path.exists(name)  # noqa: PTH110, which raises for a name that is too long
    return bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name, re.ASCII)) and not is_there


def link(name: str, kind: str = "") -> str:
    """A model, or with the kind `datasets/` data, by its page on the hub, or by the end of its path."""
    if is_on_hub(name):
        return f"[{name}]({_HUB}/{kind}{name})"
    return f"{code(Path(name).name)}, {'local data' if kind else 'a local folder'}"


def plain(value: object) -> str:
    """A value as text on one line, with nothing in it that Markdown or HTML would take for more."""
    return re.sub(r"([\\`*\[\]<>|&~])", r"\\\1", " ".join(str(value).split()))


def code(value: object) -> str:
    """A value as it stands, on one line, whatever it holds."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "/")
    return f"`{text}`"


def number(value: object) -> str:
    """A count with its thousands apart, a metric to the five digits that upstream prints."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) else "not recorded"


def commit_of(run: runs.Run, what: str) -> str | None:
    """The commit that a run's model or data was at: by its record, or where that was not made final, by its log."""
    commit = _mapping(run.record, what).get("commit")
    if commit or run.status == by_hand.STATUS or run.record.get("ended"):
        return str(commit) if commit else None
    log = metrics.read_log(run.folder / "train.log")
    return log.model_commit if what == "model" else log.data_commit


def data_name(run: runs.Run) -> str | None:
    """What the rows of a run are called, a name on the hub or a path; None if that is not recorded."""
    name = _mapping(run.record, "data").get("name")
    return str(name) if name else None


def data(stages: Sequence[runs.Run]) -> Iterator[str]:
    """The rows of each stage, as they were counted, and their licence."""
    if not stages:
        yield "Not recorded; so is its licence, which may restrict how these weights can be used."
        return
    for run in stages:
        name = data_name(run)
        if name is None:
            own = run.setting("datasets")
            said = f" on, which its config calls {code(', '.join(map(str, own)))}," if isinstance(own, list) else " on"
            yield f"{name_of(run)}: which rows it was trained{said} is not recorded."
            continue
        found = _mapping(run.record, "data")
        at = f", revision {code(found['revision'])}" if found.get("revision") else ""
        at += f", commit {code(commit)}" if (commit := commit_of(run, "data")) else ""
        yield f"{name_of(run)}: {link(name, 'datasets/')}{at}."
        yield "\n".join(_counts(found)) or "How many rows these were is not recorded."
    yield _licence(stages)


def _counts(data: Mapping[str, Any]) -> Iterator[str]:
    """A table of the splits; nothing if they were not counted."""
    fingerprints = _mapping(data, "fingerprint")
    for index, (split, counts) in enumerate(_mapping(data, "counts").items()):
        if index == 0:
            yield "| split | rows | prompts | pairs | SHA-256 of the rows |\n|---|--:|--:|--:|---|"
        cells = [number(counts.get(key)) for key in ("rows", "prompts", "pairs")]
        yield f"| {plain(split)} | {' | '.join(cells)} | {code(fingerprints.get(split) or 'not recorded')} |"


def _licence(stages: Sequence[runs.Run]) -> str:
    names = list(dict.fromkeys(map(data_name, stages)))
    known = [f"{link(name, 'datasets/')} is under {LICENCES[name].upper()}" for name in names if name in LICENCES]
    lines = [f"{', '.join(known)}, which allows no commercial use."] if known else []
    if any(name not in LICENCES for name in names):
        lines.append(f"The licence of the {'other ' if known else ''}data is not known to the program that wrote this.")
    return " ".join([*lines, "That of the base model holds as well; its own card states it."])


def training(stages: Sequence[runs.Run]) -> Iterator[str]:
    """The recipe of each stage, what was changed in it, and the settings that it came to."""
    if not stages:
        yield "Not recorded."
    for run in stages:
        recipe = _mapping(run.record, "recipe")
        if run.status == by_hand.STATUS:
            yield f"{name_of(run)}, with the settings of its config.yaml:"
        else:
            of_recipe = _mapping(_mapping(recipe, "values"), str(run.record["stage"]))
            differs = [f"{key}={value}" for key, value in settings(run).items() if of_recipe.get(key) != value]
            description = f" ({plain(recipe['description'])})" if recipe.get("description") else ""
            yield (
                f"{name_of(run)}: the recipe {code(Path(str(recipe.get('source'))).name)}{description} of ambersafe-cli"
                f"{', changed in ' + ', '.join(map(code, differs)) if differs else ', with nothing changed'}. "
                "What is not here is as the training code has it:"
            )
        shown = yaml.safe_dump(settings(run), sort_keys=False, allow_unicode=True, width=100)
        fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", shown)), 3)
        yield f"{fence}yaml\n{shown}{fence}"


def settings(run: runs.Run) -> dict[str, Any]:
    """A run's settings by upstream's keys, KEY=VALUE among them, without those of its machine."""
    values = dict(_mapping(run.record, "values"))
    values |= {key: run.setting(key) for key in _overridden(run)}
    return {
        key: Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value
        for key, value in values.items()
        if value is not None and not _TOLD_ELSEWHERE.fullmatch(key)
    }


def _overridden(run: runs.Run) -> list[str]:
    try:
        return [each.key for each in parse_overrides([str(text) for text in run.record.get("overrides") or ()])]
    except UsageError:
        return []


def provenance(stages: Sequence[runs.Run]) -> Iterator[str]:
    """Code, versions and machine of each stage, one thing a line; what two stages share is said once."""
    said: dict[str, list[str]] = {}
    for run in stages:
        for line in _provenance(run):
            said.setdefault(line, []).append(name_of(run))
    for line, names in said.items():
        yield f"{' and '.join(dict.fromkeys(names))} {line}"
    if not stages:
        yield "Nothing else is recorded beside the checkpoint."


def _provenance(run: runs.Run) -> Iterator[str]:
    record = run.record
    if run.status == by_hand.STATUS:
        yield (
            "was run without ambersafe-cli: the commit of the training code, its changes, the versions of packages, "
            "and the machine are not recorded."
        )
        return
    ended = f" to {_minute(record['ended'])}" if record.get("ended") else ""
    yield f"({plain(run.status)}) ran from {_minute(record.get('started'))}{ended}."
    if record.get("archive_fingerprint"):
        yield f"began from the checkpoint with the fingerprint {code(record['archive_fingerprint'])}."
    gpus = [plain(each) for each in _mapping(record, "python").get("gpus") or ()]
    where = f"{len(gpus)} x {', '.join(dict.fromkeys(gpus))}" if gpus else "the CPU"
    processes = record.get("processes")
    yield f"ran on {where}{f', in {processes} processes' if isinstance(processes, int) and processes > 1 else ''}."
    yield f"ran the code of {'; '.join(_code(_mapping(record, 'upstream')))}."
    yield f"used {', '.join(_versions(run))}."


def _code(clone: Mapping[str, Any]) -> Iterator[str]:
    url = plain(clone.get("url") or "")
    yield f"{url.removesuffix('.git') if url.startswith('https://') else 'a local clone'} at {code(clone.get('base'))}"
    applied = [
        plain(name.removesuffix(".patch")) for name, state in _mapping(clone, "patches").items() if state == "applied"
    ]
    patches = f"patched by ambersafe-cli with {', '.join(applied)}" if applied else "without a patch"
    yield f"{patches}, at {code(clone.get('head'))}"
    if touched := [*(clone.get("edited") or ()), *(clone.get("on_top") or ())]:
        yield f"which had been edited: {', '.join(map(code, touched))}"


def _versions(run: runs.Run) -> Iterator[str]:
    python = _mapping(run.record, "python")
    yield f"ambersafe-cli {plain(run.record.get('ambersafe_version'))}"
    yield f"Python {plain(python.get('version'))}"
    packages = _mapping(python, "packages")
    of_adapters = [package for key, package in _NEEDED_BY.items() if run.setting(key)]
    for name in ("torch", "transformers", "tokenizers", "accelerate", "datasets", *of_adapters):
        if packages.get(name):
            yield f"{name} {plain(packages[name])}"


def _minute(moment: object) -> str:
    return f"{plain(str(moment)[:16].replace('T', ' '))} UTC"


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of a record; empty where an older version, or another hand, wrote none."""
    found = record.get(key)
    return found if isinstance(found, dict) else {}

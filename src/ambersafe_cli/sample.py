"""`ambersafe sample`: the same prompts through the base model, the SFT and the DPO weights, side by side.

What it finds is kept in the run's folder as `samples.json`, one object:

- `schema` (1), `time` (UTC, ISO 8601), `ambersafe_version`
- `settings`: `max_new_tokens`, `temperature` (0: always the likeliest token), `seed`, `prompts` (the file, or what rows
  they are the first of)
- `models`: each `label`, `model`, `revision`, `checkpoint`, `run` (see evaluate.py) and `template`
- `samples`, which is also what `--json` prints: for each prompt `prompt` and `answers`, in the order of `models`, each
  `label`, `model`, `run`, `text`, `tokens` (how many were generated, the EOS not counted), `stopped` (whether it came
  to its end, and was not cut off)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ambersafe_cli import __version__, as_trained, asking, display, files, models, prompts, runs
from ambersafe_cli.errors import UsageError

FILE = "samples.json"
DEFAULT_PROMPTS = 4
"""How many held-out prompts are taken where none are given."""


@dataclass(frozen=True)
class Request:
    """What a user asked for with `ambersafe sample`, by its flags."""

    run: str
    prompts: Path | None
    compare: tuple[str, ...]
    of_model: str | None
    max_new_tokens: int
    temperature: float
    seed: int
    batch_size: int
    template: str | None
    as_json: bool
    clone: Path | None
    python: str


def run(request: Request) -> None:
    """Have every model answer, show the answers, and keep them in the run's folder. Raises AmberSafeError."""
    if not math.isfinite(request.temperature):
        raise UsageError(f"--temperature must be a number, it is {request.temperature}.")
    given = prompts.read(request.prompts) if request.prompts else None
    sampled = models.find(request.run, request.of_model)
    every = labelled(_models(request, sampled))
    config = as_trained.config(sampled.run, request.template or sampled.template)
    rows = None if given else as_trained.rows(sampled.run, config)
    as_trained.require_there(every, rows)
    # What the adapter of the run was trained on is what its base model is quantized to as well.
    own = as_trained.adapter_of(sampled)
    precisions = [as_trained.policy_precision(config, as_trained.adapter_of(each) or own) for each in every]
    children = [as_trained.for_child(each, precision) for each, precision in zip(every, precisions, strict=True)]
    clone = as_trained.clone(sampled.run, request.clone)
    display.say(f"runs the code of {clone} with {request.python}")
    as_trained.require_packages(request.python, every, [child["quantize"] for child in children])
    templates = [_template(request, each, config["template"]) for each in every]
    answer = asking.ask(
        request.python,
        "generate.py",
        {
            "clone": str(clone),
            "models": [{**child, "template": template} for child, template in zip(children, templates, strict=True)],
            "prompts": given,
            "rows": rows and {"datasets": rows.datasets, "split": "test", "count": DEFAULT_PROMPTS},
            "max_new_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
            "batch_size": request.batch_size,
        },
        rows.environment if rows else {},
        "sample",
    )
    source = f"the first held-out prompts of {rows.name}" if rows else str(request.prompts)
    if rows:
        display.say(f"{source}; --prompts FILE takes others")
    samples = _samples(answer, every)
    if request.as_json:
        display.write_json(samples)
    else:
        show(samples)
    if sampled.run is not None:
        result = {
            "schema": 1,
            "time": runs.now(),
            "ambersafe_version": __version__,
            "settings": {
                "max_new_tokens": request.max_new_tokens,
                "temperature": request.temperature,
                "seed": request.seed,
                "prompts": source,
            },
            "models": [
                {**(as_trained.as_dictionary(each) or {}), "template": template}
                for each, template in zip(every, templates, strict=True)
            ],
            "samples": samples,
        }
        files.write_json(sampled.run.folder / FILE, result)
        display.say(f"kept: {sampled.run.folder / FILE}")


def _models(request: Request, sampled: models.Weights) -> list[models.Weights]:
    """Those that answer: what is named, or else what the run was trained from, step by step."""
    if request.compare:
        return [sampled, *(models.find(each, request.of_model) for each in request.compare)]
    if sampled.run is None or sampled.checkpoint is None:
        return [sampled]
    return [*models.lineage(sampled.run)[:-1], sampled]


def labelled(every: Sequence[models.Weights]) -> list[models.Weights]:
    """The same with labels of their own: those that are called alike, by run and checkpoint, or else by number."""
    found = list(every)
    for describe in (_by_place, _by_number):
        labels = [each.label for each in found]
        found = [
            replace(each, label=describe(each, number)) if labels.count(each.label) > 1 else each
            for number, each in enumerate(found, start=1)
        ]
    return found


def _by_place(weights: models.Weights, number: int) -> str:
    if weights.run is None or weights.checkpoint is None:
        return str(weights.checkpoint or weights.model)
    return f"{weights.run.folder.name}, {weights.checkpoint.parent.name}"


def _by_number(weights: models.Weights, number: int) -> str:
    return f"{weights.label} ({number})"


def _template(request: Request, weights: models.Weights, of_run: str | None) -> str | None:
    """The form that a model gets its prompts in: that of its own training, or else of the run's."""
    if request.template or weights.run is None:
        return of_run
    return weights.template


def _samples(answer: dict[str, Any], every: Sequence[models.Weights]) -> list[dict[str, Any]]:
    """The answers by prompt."""
    named = [as_trained.as_dictionary(each) or {} for each in every]
    return [
        {
            "prompt": prompt,
            "answers": [
                {**{key: name[key] for key in ("label", "model", "run")}, **by_model[index]}
                for name, by_model in zip(named, answer["answers"], strict=True)
            ],
        }
        for index, prompt in enumerate(answer["prompts"])
    ]


def show(samples: Sequence[dict[str, Any]]) -> None:
    """Show samples, of the shape that `--json` prints."""
    for number, sample in enumerate(samples, start=1):
        parts = [
            (each["label"], (each["text"].strip() or "(nothing)") + ("" if each["stopped"] else " …"))
            for each in sample["answers"]
        ]
        display.write_texts(f"prompt {number} of {len(samples)}", sample["prompt"].strip(), parts)

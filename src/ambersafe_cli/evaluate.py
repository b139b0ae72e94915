"""`ambersafe evaluate`: how often a model finds the safe response of a held-out pair the likelier one.

What it finds of a run's final weights, on all pairs of a split, is kept in the run's folder as `evaluation.json`, one
object, which is also what `--json` prints:

- `schema` (1), `time` (UTC, ISO 8601), `ambersafe_version`
- `model` and `reference` (null for none): `label`, `model`, `revision`, `checkpoint` (a policy.pt, or null for the
  published weights) and `run` (its name, or null)
- `beta`; `settings`: those of the data iterator, by upstream's keys, the types that were computed in, and `quantize`,
  what the weights below an adapter were quantized to (null: they were not)
- `data`: `datasets`, `name`, `revision`, `split`, `limit`, `pairs`, `prompts`, `left_out` (pairs that hold the EOS)
- `figures`: by the names of figures.TITLES, each `value`, `low`, `high`, `pairs`, `prompts`; those of the reward only
  if there is a reference
- `by_category`: the same for each harm category of the unsafe responses, empty where the rows have none
- `upstream`: what upstream's own evaluation of this checkpoint had, on the same examples: `after` (training examples),
  `examples`, `metrics` (by upstream's names, each `upstream`, `here`, `agrees`), `agrees` (all of them, to 4 digits);
  or null where there is none to compare with
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ambersafe_cli import __version__, as_trained, asking, display, figures, files, models, runs
from ambersafe_cli import recipe as recipes
from ambersafe_cli.errors import ArchiveError, UsageError

FILE = "evaluation.json"


@dataclass(frozen=True)
class Request:
    """What a user asked for with `ambersafe evaluate`, by its flags."""

    model: str
    of_model: str | None
    reference: str | None
    data: str | None
    data_revision: str | None
    split: str
    limit: int | None
    batch_size: int
    beta: float | None
    template: str | None
    pairs: Path | None
    as_json: bool
    clone: Path | None
    python: str


def run(request: Request) -> None:
    """Score the pairs, show the figures, and keep them in the run's folder. Raises AmberSafeError."""
    if request.pairs and request.pairs.exists():
        raise UsageError(f"{request.pairs} exists.", "--pairs writes a new file.")
    if request.beta is not None and not 0 < request.beta < math.inf:
        raise UsageError(f"--beta must be a number above 0, it is {request.beta}.")
    weights = models.find(request.model, request.of_model)
    reference = _reference(request, weights)
    config = as_trained.config(weights.run, request.template or weights.template)
    beta = request.beta or config["loss.beta"] or _default_beta()
    rows = as_trained.rows(weights.run, config, request.data, request.data_revision)
    every = [weights, *([reference] if reference else [])]
    as_trained.require_there(every, rows)
    adapter = as_trained.adapter_of(weights)
    precision = as_trained.policy_precision(config, adapter)
    of_reference = as_trained.reference_precision(config, adapter)
    children = [as_trained.for_child(weights, precision)]
    if reference:
        children.append(as_trained.for_child(reference, of_reference, merges=adapter is None and not request.reference))
    clone = as_trained.clone(weights.run, request.clone)
    display.say(f"runs the code of {clone} with {request.python}")
    as_trained.require_packages(request.python, every, [child["quantize"] for child in children])
    answer = asking.ask(
        request.python,
        "score_pairs.py",
        {
            "clone": str(clone),
            "datasets": rows.datasets,
            "split": request.split,
            "limit": request.limit,
            "texts": request.pairs is not None,
            "batch_size": request.batch_size,
            "policy": children[0],
            "reference": children[1] if reference else None,
            "settings": as_trained.tokenizing(config),
            "evaluation": _upstreams_evaluation(request, weights, rows, config),
        },
        rows.environment,
        "evaluate",
    )
    pairs = [figures.read_pair(each) for each in answer["pairs"]]
    _require_finite(pairs, weights, reference)
    is_as_trained = reference is not None and not request.reference and beta == config["loss.beta"]
    result = {
        "schema": 1,
        "time": runs.now(),
        "ambersafe_version": __version__,
        "model": as_trained.as_dictionary(weights),
        "reference": as_trained.as_dictionary(reference),
        "beta": beta if reference else None,
        "settings": {
            **as_trained.tokenizing(config),
            "policy_dtype": precision.autocast or precision.dtype,
            "reference_dtype": (of_reference.autocast or of_reference.dtype) if reference else None,
            "quantize": precision.quantize,
        },
        "data": {
            "datasets": list(rows.datasets),
            "name": rows.name,
            "revision": rows.revision,
            "split": request.split,
            "limit": request.limit,
            "pairs": len(pairs),
            "prompts": len({pair.prompt for pair in pairs}),
            "left_out": answer["left_out"],
        },
        "figures": {name: asdict(figure) for name, figure in figures.of(pairs, beta).items()},
        "by_category": {
            category: {name: asdict(figure) for name, figure in found.items()}
            for category, found in figures.by_category(pairs, beta).items()
        },
        "upstream": _beside_upstream(answer["evaluation"], beta if is_as_trained else None),
    }
    if request.as_json:
        display.write_json(result)
    else:
        show(result)
    if request.pairs:
        files.write_lines(request.pairs, (json.dumps(each, ensure_ascii=False) for each in answer["pairs"]))
        display.say(f"each pair: {request.pairs}")
    _keep(request, weights, result)


def _reference(request: Request, weights: models.Weights) -> models.Weights | None:
    """What the rewards are against: what is named, else what the training of a run had; None for a bare model."""
    if request.reference:
        return models.find(request.reference, request.of_model)
    if weights.run is None:
        if request.beta:
            raise UsageError("A reward needs a reference, and --beta is of the reward.", "Give --reference RUN|MODEL.")
        return None
    return models.reference_of(weights.run)


def _default_beta() -> float:
    return float(str(recipes.load(recipes.DEFAULT).values["dpo"]["loss.beta"]))


def _upstreams_evaluation(
    request: Request, weights: models.Weights, rows: as_trained.Rows, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Which examples upstream's own evaluation of these weights was on, for children/score_pairs.py; None if others
    than those are asked for."""
    run = weights.run
    is_other = request.split != "test" or request.limit or not rows.may_be_the_runs
    if run is None or weights.checkpoint is None or is_other or config["template"] != weights.template:
        return None
    return {
        "stage": run.record["stage"],
        "n_examples": config["n_eval_examples"],
        "batch_size": config["eval_batch_size"],
        "processes": run.record.get("processes") or 1,
    }


def _require_finite(pairs: list[figures.Pair], weights: models.Weights, reference: models.Weights | None) -> None:
    """Raise ArchiveError if a model gave what is no number: a mean of the rest would hide it."""
    values = {weights.label: [pair.policy for pair in pairs]}
    if reference:
        values[f"the reference, {reference.label},"] = [pair.reference or (0.0, 0.0) for pair in pairs]
    for label, found in values.items():
        if broken := sum(not all(map(math.isfinite, each)) for each in found):
            raise ArchiveError(
                f"{label} gives {broken} of {len(pairs)} pairs a log-probability that is no finite number.",
                "Its weights hold NaN, or are too large for the type that they are loaded in.",
            )


def _beside_upstream(evaluation: Mapping[str, Any] | None, beta: float | None) -> dict[str, Any] | None:
    if not evaluation:
        return None
    found = figures.compare(evaluation["metrics"], evaluation["stage"], evaluation["examples"], beta)
    if not found:  # the final weights of a run by upstream alone were never evaluated
        return None
    return {
        "after": evaluation["step"],
        "examples": len(evaluation["examples"]),
        "metrics": {e.metric: {"upstream": e.upstream, "here": e.here, "agrees": e.agrees} for e in found},
        "agrees": all(each.agrees for each in found),
    }


def show(result: Mapping[str, Any]) -> None:
    """Show an evaluation, of the shape that evaluation.json has."""
    data = result["data"]
    name = f"{data['name']}{' ' + data['revision'] if data['revision'] else ''}"
    display.write_facts(
        [
            ("model", _named(result["model"])),
            *(
                [("reference", f"{_named(result['reference'])}, beta {result['beta']:g}")]
                if result["reference"]
                else []
            ),
            ("pairs", f"{data['pairs']:,} of {data['prompts']:,} prompts, {data['split']} split of {name}"),
            *([("left out", f"{data['left_out']:,} pairs that hold the EOS")] if data["left_out"] else []),
        ]
    )
    rows = [(figures.TITLES[key], _number(f["value"]), _interval(f)) for key, f in result["figures"].items()]
    display.write_table("", ("metric", "value", "95 % interval, by prompt"), rows)
    if result["by_category"]:
        display.write_table("By harm category of the unsafe response", *_categories(result["by_category"]))
    if upstream := result["upstream"]:
        compared = [
            (metric, _number(each["upstream"]), _number(each["here"]), "" if each["agrees"] else "differs")
            for metric, each in upstream["metrics"].items()
        ]
        display.write_table("Beside upstream's own evaluation", ("metric", "upstream", "here", ""), compared)
        examples = f"After {upstream['after']:,} training examples, on the same {upstream['examples']:,} held-out ones"
        if upstream["agrees"]:
            display.write(f"{examples}: equal to 4 digits.")
        else:
            display.write(f"{examples}: they differ.")
            display.warn("other rows, packages or devices than those that it was trained with can be why")


def _categories(found: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The columns and rows of the table of harm categories."""
    keys = list(next(iter(found.values())))
    shown = [key for key in ("safe_more_likely", "reward_accuracy", "reward_margin") if key in keys]
    rows = []
    for category, values in found.items():
        first = values[shown[0]]
        cells = [f"{_number(values[key]['value'])}  {_interval(values[key])}" for key in shown]
        rows.append((display.printable(category), f"{first['pairs']:,}", f"{first['prompts']:,}", *cells))
    return ("category", "pairs", "prompts", *(figures.TITLES[key] for key in shown)), rows


def _named(weights: Mapping[str, Any]) -> str:
    """Which weights, in words."""
    where = weights["run"] or weights["checkpoint"]
    if not where:
        at = f" at {weights['revision'][:12]}" if weights["revision"] else ""
        return f"{weights['label']}: {weights['model']}{at}"
    step = Path(weights["checkpoint"]).parent.name
    return f"{weights['label']}: {where}{', ' + step if weights['run'] and step.startswith('step-') else ''}"


def _interval(figure: Mapping[str, Any]) -> str:
    return "-" if figure["low"] is None else f"{_number(figure['low'])} to {_number(figure['high'])}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _keep(request: Request, weights: models.Weights, result: Mapping[str, Any]) -> None:
    """Keep the evaluation in the run's folder, if it is one of the run's final weights on all pairs."""
    if weights.run is None or weights.checkpoint is None or request.limit:
        return
    if weights.checkpoint.parent.name.startswith("step-"):
        return
    files.write_json(weights.run.folder / FILE, result)
    display.say(f"kept: {weights.run.folder / FILE}")

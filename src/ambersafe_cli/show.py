"""Runs for people: one of them in full, and all of them as a table."""

import datetime
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ambersafe_cli import by_hand, display, metrics, runs, standstill

_SHORT = 12
"""Digits of a commit or fingerprint that are shown; --json has all."""

_MISSING = object()


def run(name: str | None, as_json: bool) -> None:
    """Show one run, by default the newest. Raises UsageError if there is none."""
    found = runs.open_run(name)
    if as_json:
        display.write_json(as_dictionary(found))
        return
    display.write(f"{found.folder.name}: {found.record['stage']}, {found.status}")
    display.write(f"{found.folder}\n")
    display.write_facts([*what_was_run(found.record), *how_it_went(found), *where_it_came_from(found.record)])
    display.write(f"\nnext: {_next(found)}")


def table(as_json: bool) -> None:
    """List the runs of this working folder, the newest last, with the last evaluation of each."""
    found = runs.list_runs()
    if as_json:
        display.write_json([as_dictionary(each) for each in found])
        return
    rows = []
    for each in found:
        values = last_metrics(each)
        loss, accuracy = values.get("loss/eval"), values.get("rewards_eval/accuracies")
        rows.append((each.folder.name, str(each.record["stage"]), each.status, _number(loss), _number(accuracy)))
    display.write_table(str(runs.folder_of_runs()), ("run", "stage", "status", "loss", "accuracy"), rows)


def as_dictionary(run: runs.Run) -> dict[str, Any]:
    """A run for a program: its record, its folder, and its status of now."""
    return {"folder": str(run.folder), **run.record, "status": run.status}


def last_metrics(run: runs.Run) -> Mapping[str, object]:
    """The values of a run's last evaluation: its record's, or its log's where the record was not made final."""
    if run.record.get("ended"):
        return _mapping(run.record, "last_metrics")
    evaluations = metrics.read_log(run.folder / "train.log").evaluations
    return evaluations[-1].values if evaluations else {}


def what_was_run(record: runs.Record) -> Iterator[tuple[str, str]]:
    """What was trained, on what, and how."""
    yield "model", _named(_mapping(record, "model"))
    data = _mapping(record, "data")
    if data.get("name"):
        yield "data", _named(data)
    fingerprints = _mapping(data, "fingerprint")
    for split, counts in _mapping(data, "counts").items():
        if isinstance(counts, dict):
            words = [f"{_number(counts.get(key))} {of}" for key, of in _COUNTED.items()]
            yield f"  {split}", f"{', '.join(words)}; sha256 {_short(fingerprints.get(split))}"
    if record.get("archive"):
        sft_run = record.get("sft_run")
        start = f"the SFT run {Path(str(sft_run)).name}" if sft_run else str(record["archive"])
        yield "from", f"{start}{_fingerprint(record, 'archive_fingerprint')}"
    recipe = _mapping(record, "recipe")
    yield "recipe", str(recipe.get("source", "not recorded"))
    if given := [*_changed(record, recipe), *map(str, record.get("overrides") or ())]:
        yield "set", ", ".join(given)


_OF_HAND = (
    "loss.name", "loss.beta", "lr", "batch_size", "gradient_accumulation_steps", "n_epochs", "n_examples", "max_length",
    "max_prompt_length", "optimizer", "warmup_steps", "trainer", "datasets",
)  # fmt: skip
_COUNTED = {"rows": "rows", "prompts": "prompts", "pairs": "pairs"}


def _changed(record: runs.Record, recipe: Mapping[str, Any]) -> Iterator[str]:
    """The settings that are not the recipe's: of flags, or fitted to the machine. Made by hand: the usual ones."""
    if record["status"] == by_hand.STATUS:
        yield from (f"{key}={_plain(record['values'][key])}" for key in _OF_HAND if key in record["values"])
        return
    recipes = _mapping(_mapping(recipe, "values"), str(record["stage"]))
    told_elsewhere = ("model.name_or_path", "model.archive")
    for key, value in _mapping(record, "values").items():
        if recipes.get(key, _MISSING) != value and key not in told_elsewhere:
            yield f"{key}={_plain(value)}"


def how_it_went(run: runs.Run) -> Iterator[tuple[str, str]]:
    """How it went: attempts, checkpoints, the last evaluation, what preflight had said."""
    record = run.record
    for number, attempt in enumerate(record.get("attempts") or (), start=1):
        words = [time(attempt.get("started")), _duration(attempt.get("started"), attempt.get("ended"))]
        words += [f"on {attempt['host']}"] if attempt.get("host") else []
        status = attempt.get("exit_status")
        words.append("no exit status" if status is None else f"exit status {status}")
        yield f"attempt {number}", ", ".join(filter(None, words))
    if run.status != "finished" and (last := metrics.read_log(run.folder / "train.log").last_step):
        planned = record.get("planned_examples")
        of = f" of {_number(planned)}" if planned else ""
        yield "so far", f"{last.examples:,}{of} examples, loss {_number(last.values.get('loss/train'))}"
    if run.status != "finished" and (said := standstill.of_run(run.folder)):
        yield "stuck", said
    for name, what in _checkpoints(run):
        yield "checkpoint", f"{name}{what}"
    if values := last_metrics(run):
        shown = [f"{key.replace('_eval', '').replace('/eval', '')} {_number(value)}" for key, value in values.items()]
        yield "held out", ", ".join(shown)
    findings = record.get("preflight", _MISSING)
    if findings is None:
        yield "preflight", "left away"
    elif isinstance(findings, list):
        for finding in findings:
            if isinstance(finding, dict):
                yield "preflight", f"{finding.get('level')}: {finding.get('what')}"


def _checkpoints(run: runs.Run) -> Iterator[tuple[str, str]]:
    """The checkpoints that are there, the newest first, and what each is."""
    metric = run.setting("keep_best")
    best, value = (isinstance(metric, str) and runs.best_checkpoint(run.folder, metric)) or (None, None)
    by = f", the best by {metric}: {_number(value)}"
    if runs.checkpoint(run.folder).is_file():
        what = f", the final weights{_fingerprint(run.record, 'checkpoint_fingerprint')}"
        yield "LATEST/policy.pt", what + (by if best == run.folder / "LATEST" else "")
    for step in runs.steps(run.folder):
        yield step.name, by if step == best else ""


def where_it_came_from(record: runs.Record) -> Iterator[tuple[str, str]]:
    """Where it came from: the clone, the interpreter, the machine, the user's own repository."""
    clone = _mapping(record, "upstream")
    if not clone:
        yield "clone", "not known: the run has no run.json"
        return
    patches = _mapping(clone, "patches")
    applied = sum(state == "applied" for state in patches.values())
    words = [
        f"{_short(clone.get('head'))}: upstream {_short(clone.get('base'))}",
        f"{applied} of {len(patches)} patches",
    ]
    edited = [*_list(clone, "edited"), *_list(clone, "on_top")]
    words += [f"edited: {' '.join(map(str, edited))}"] if edited else []
    yield "clone", ", ".join(words)
    python = _mapping(record, "python")
    if python:
        packages = _mapping(python, "packages")
        named = [f"{name} {packages[name]}" for name in ("torch", "transformers", "datasets") if name in packages]
        yield "python", ", ".join([str(python.get("version")), *named, f"ambersafe {record.get('ambersafe_version')}"])
        machine = _mapping(record, "machine")
        gpus = ", ".join(map(str, _list(python, "gpus"))) or "no GPU"
        yield "machine", f"{machine.get('system')}, {machine.get('machine')}, {machine.get('cpus')} CPUs, {gpus}"
    git = _mapping(record, "working_folder_git")
    if git:
        names = " ".join(map(str, _list(git, "changed_files")))
        changed = f", {_number(git.get('changed'))} files changed: {names}" if names else ", nothing changed"
        yield "git", f"{_short(git.get('commit'))} on {git.get('branch') or 'no branch'}{changed}"
    variables = [f"{name}={value}" for name, value in _mapping(record, "variables").items()]
    if variables:
        yield "variables", " ".join(variables)


def _next(run: runs.Run) -> str:
    """What to do with the run now."""
    if run.status == "running":
        return f"it is running; what it prints is in {run.folder / 'train.log'}"
    command = (
        _list(run.record, "next_command")
        if run.status in ("finished", by_hand.STATUS)
        else ["ambersafe", "resume", run.folder.name]
    )
    return shlex.join(map(str, command))


def _mapping(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of a record; empty where an older version, or another hand, wrote none."""
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    return found if isinstance(found, list) else []


def _named(what: Mapping[str, Any]) -> str:
    """A model or data: its name, the revision that was asked for, and its commit."""
    revision, commit = what.get("revision"), what.get("commit")
    at = f" at {_short(commit)}" if commit else ""
    return f"{what.get('name')}{f' {revision}' if revision and revision != commit else ''}{at}"


def _fingerprint(record: runs.Record, key: str) -> str:
    return f", fingerprint {_short(record[key])}" if record.get(key) else ""


def _short(value: object) -> str:
    return str(value)[:_SHORT] if value else "not known"


def _plain(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool | list | None) else str(value)


def _number(value: object) -> str:
    """A count with its thousands apart, a metric to the five digits that upstream prints."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) else "-"


def time(text: object) -> str:
    return str(text)[:19].replace("T", " ") + " UTC" if text else ""


def _duration(start: object, end: object) -> str:
    """The time between two moments of ISO 8601, to the second."""
    try:
        seconds = datetime.datetime.fromisoformat(str(end)) - datetime.datetime.fromisoformat(str(start))
    except (ValueError, TypeError):
        return ""
    return f"took {datetime.timedelta(seconds=round(seconds.total_seconds()))}"

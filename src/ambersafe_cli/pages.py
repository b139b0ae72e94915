"""What a report says of a run, as plain values for report.html: all of it text that was written by someone else."""

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from ambersafe_cli import (
    curves,
    display,
    figures,
    files,
    following,
    health,
    journal,
    metrics,
    models,
    panels,
    plot,
    runs,
    show,
)
from ambersafe_cli.errors import AmberSafeError

_EVALUATION, _SAMPLES = "evaluation.json", "samples.json"  # the names in evaluate.py and sample.py, which import git
_TITLES = {"sft": "SFT", "dpo": "DPO"}

Facts = list[tuple[str, str]]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Table:
    """The first cell of a row says what the row is about; the others are `numbers`, or text."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: bool = True


@dataclass(frozen=True)
class Curve:
    """A picture of one panel: `svg` is an element for the page, made by drawing.inline."""

    title: str
    unit: str
    svg: str


@dataclass(frozen=True)
class Stage:
    """One run: the facts of `ambersafe show`, its curves, and what is wrong with them in `problems`."""

    anchor: str
    title: str
    name: str
    folder: str
    status: str
    what: Facts
    again: str
    command: str
    how: Facts
    evaluations: Table | None
    curves: list[Curve]
    advice: tuple[health.Advice, ...]
    origin: Facts
    tables: list[Table]
    problems: list[str]


@dataclass(frozen=True)
class Answer:
    label: str
    text: str
    note: str


@dataclass(frozen=True)
class Sample:
    prompt: str
    answers: list[Answer]


@dataclass(frozen=True)
class Part:
    """What another command found and kept in the run's folder, or in `problems` what makes it."""

    facts: Facts = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    prompts: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def with_earlier(run: runs.Run) -> tuple[list[runs.Run], list[str]]:
    """A run behind those that it was trained from, the first one first; and what is missing of them."""
    found = [run]
    while archive := found[0].record.get("archive"):
        path = Path(str(archive)).absolute()
        earlier = models.run_of(path)
        if earlier is None:
            return found, [f"{found[0].folder.name} was trained from {path}. That lies in no run that can be read."]
        if earlier.folder in [each.folder for each in found]:
            break
        found.insert(0, earlier)
    return found, []


def of_stage(run: runs.Run, anchor: str, drawing: ModuleType) -> Stage:
    """All there is to say of a run."""
    record = run.record
    name = str(record["stage"])
    problems: list[str] = []
    seen = following.of(run.folder, record, run.status)
    _or_problem(lambda: _follow(seen, run), None, problems)
    read = seen.curves
    if read.unreadable:
        problems.append(f"{read.unreadable} lines of metrics cannot be read, and are left away.")
    how: Facts = _or_problem(lambda: list(show.how_it_went(run)), list[tuple[str, str]](), problems)
    table = _evaluations(name, read.evaluations)
    is_by_hand = not (run.folder / "run.json").exists()
    return Stage(
        anchor=anchor,
        title=_TITLES.get(name, name),
        name=run.folder.name,
        folder=str(run.folder),
        status=run.status,
        what=list(show.what_was_run(record)),
        again="" if is_by_hand else shlex.join(["ambersafe", "reproduce", named(run)]),
        command="" if is_by_hand else shlex.join(map(str, record["command"])),
        how=[fact for fact in how if not (table and fact[0] == "held out")],
        evaluations=table,
        curves=list(_curves(name, run, read, anchor, drawing, problems)),
        advice=health.look(name, read.steps, read.evaluations, seen.planned_examples),
        origin=list(show.where_it_came_from(record)),
        tables=list(_provenance(record)),
        problems=problems,
    )


def _follow(seen: following.Following, run: runs.Run) -> None:
    for entry in journal.read(run.folder):
        seen.take_entry(entry)
    plot.require_some(run, seen.curves)


def named(run: runs.Run) -> str:
    """A run as a command takes it: its name if it is one of this working folder, else its folder."""
    return run.folder.name if run.folder.parent == runs.folder_of_runs() else str(run.folder)


def _or_problem(get: Callable[[], _T], otherwise: _T, problems: list[str]) -> _T:
    try:
        return get()
    except AmberSafeError as error:
        problems.append(f"{error.message} {error.hint}".strip())
    except OSError as error:
        problems.append(f"Cannot read {error.filename}: {error.strerror}")
    return otherwise


def _evaluations(stage: str, found: list[metrics.Record]) -> Table | None:
    """The first and the last evaluation, by what the panels of the stage draw of them."""
    if not found:
        return None
    first, last = found[0], found[-1]
    shown = [last] if first.examples == last.examples else [first, last]
    rows = []
    for panel in panels.PANELS.get(stage, ()):
        for series in panel.series:
            key = series.evaluation
            if key and any(key in each.values for each in shown):
                title = ", ".join(filter(None, (panel.title, series.label)))
                values = (_number(each.values.get(key)) for each in shown)
                rows.append((f"{title} ({panel.unit})", *values))
    columns = ("", *(f"after {each.examples:,} examples" for each in shown))
    return Table("On held-out rows", columns, rows) if rows else None


def _number(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, int | float) and math.isfinite(value) else "-"


def _curves(
    stage: str, run: runs.Run, read: curves.Curves, anchor: str, drawing: ModuleType, problems: list[str]
) -> Iterator[Curve]:
    if stage not in panels.PANELS:
        problems.append(f"There is no plot of the stage {stage!r}.")
        return
    subject = drawing.Subject(run.folder.name, stage, read)
    for panel in panels.of_stage(stage, [read]):
        yield Curve(panel.title, panel.unit, drawing.inline(panel, subject, f"{anchor}-{panel.name}"))


def _provenance(record: runs.Record) -> Iterator[Table]:
    """What the run can be told by, in full, as far as it was recorded."""
    model, data, clone, python = (_mapping(record.get(key)) for key in ("model", "data", "upstream", "python"))
    prints = _mapping(data.get("fingerprint"))
    marks = {
        "commit of the model": model.get("commit"),
        "commit of the data": data.get("commit"),
        **{f"rows, {split} (SHA-256)": value for split, value in prints.items()},
        "archive that it started from": record.get("archive_fingerprint"),
        "final weights": record.get("checkpoint_fingerprint"),
        "commit of upstream": clone.get("base"),
        "commit of the patched clone": clone.get("head"),
    }
    if rows := [(name, str(value)) for name, value in marks.items() if value]:
        yield Table("Commits and fingerprints", ("of", "is"), rows, numbers=False)
    series = clone.get("series")
    patches = [each for each in series if isinstance(each, dict)] if isinstance(series, list) else []
    if patches:
        cells = [tuple(str(each.get(key, "-")) for key in ("name", "state", "sha256")) for each in patches]
        yield Table("Patches", ("patch", "state", "SHA-256 of its file"), cells, numbers=False)
    if packages := _mapping(python.get("packages")):
        cells = [(name, str(each)) for name, each in packages.items()]
        yield Table("Packages", ("package", "version"), cells, numbers=False)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _read(run: runs.Run, file: str, command: str, parse: Callable[[Any], _T], problems: list[str]) -> _T | None:
    """What a command kept in a run's folder, in our words; None, and why in `problems`, if that cannot be had."""
    path = run.folder / file
    how = f"`{shlex.join(['ambersafe', command, named(run)])}` makes it, then make this report again."
    try:
        return parse(json.loads(files.read_text(path)))
    except FileNotFoundError:
        problems.append(f"There is no {file} of {run.folder.name} yet: {how}")
    except OSError as error:
        problems.append(f"Cannot read {path}: {error.strerror}")
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        problems.append(f"{path} is damaged, or of another version of ambersafe: {how}")
    return None


def samples(run: runs.Run) -> Part:
    """What `ambersafe sample` kept."""
    problems: list[str] = []
    return _read(run, _SAMPLES, "sample", _samples, problems) or Part(problems=problems)


def _samples(found: Any) -> Part:
    asked = found["settings"]
    temperature = float(asked["temperature"])
    how = f"at temperature {temperature:g}, seed {int(asked['seed'])}" if temperature else "always the likeliest token"
    facts = [
        ("prompts", str(asked["prompts"])),
        ("answers", f"of at most {int(asked['max_new_tokens']):,} tokens, {how}"),
        ("made", show.time(found["time"])),
    ]
    prompts = [
        Sample(display.printable(str(each["prompt"])), list(map(_answer, each["answers"]))) for each in found["samples"]
    ]
    return Part(facts=facts, prompts=prompts)


def _answer(found: Mapping[str, Any]) -> Answer:
    note = "" if found["stopped"] else f"cut off after {int(found['tokens']):,} tokens"
    return Answer(str(found["label"]), display.printable(str(found["text"])), note)


def evaluation(stages: list[runs.Run]) -> Part:
    """What `ambersafe evaluate` kept of each run, the last run's by harm category as well."""
    problems: list[str] = []
    parts = [_read(each, _EVALUATION, "evaluate", _evaluation, problems) for each in stages]
    facts = [fact for part in parts if part for fact in part.facts]
    tables = [part.tables[0] for part in parts[:-1] if part]
    return Part(facts=facts, tables=tables + (parts[-1].tables if parts[-1] else []), problems=problems)


def _evaluation(found: Any) -> Part:
    data, model = found["data"], found["model"]
    label = str(model["label"]).upper()
    pairs = f"{int(data['pairs']):,} pairs of {int(data['prompts']):,} prompts, {data['split']} split of {data['name']}"
    against = f", against {found['reference']['label']}" if found["reference"] else ""
    facts = [(label, f"{pairs}{against}")]
    if upstream := found["upstream"]:
        says = "is the same to 4 digits" if upstream["agrees"] else "differs"
        facts.append((label, f"upstream's own evaluation, on {int(upstream['examples']):,} of them, {says}"))
    rows = [(figures.TITLES.get(key, str(key)), *_figure(each)) for key, each in found["figures"].items()]
    tables = [Table(f"{label}, on held-out pairs", ("", "value", "95 % interval, by prompt"), rows)]
    if by_category := found["by_category"]:
        shown = [key for key in ("safe_more_likely", "reward_accuracy") if key in next(iter(by_category.values()))]
        heads = [each for key in shown for each in (figures.TITLES[key], "95 % interval")]
        cells = [
            (str(name), f"{int(each[shown[0]]['pairs']):,}", *(cell for key in shown for cell in _figure(each[key])))
            for name, each in by_category.items()
        ]
        title = f"{label}, by harm category of the unsafe response"
        tables.append(Table(title, ("category", "pairs", *heads), cells))
    return Part(facts=facts, tables=tables)


def _figure(figure: Mapping[str, Any]) -> tuple[str, str]:
    """A value, and its interval."""
    low, high = figure["low"], figure["high"]
    interval = "-" if low is None else f"{float(low):.4f} to {float(high):.4f}"
    return f"{float(figure['value']):.4f}", interval

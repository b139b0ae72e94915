"""`ambersafe reproduce`: do a run again as its record says, and compare what came out."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ambersafe_cli import (
    display,
    environment,
    launch,
    machines,
    metrics,
    patches,
    preflight,
    provenance,
    recipe,
    recorded,
    runs,
    stages,
    upstream,
)
from ambersafe_cli.errors import NotReproducedError, UsageError
from ambersafe_cli.overrides import parse_overrides

_TIME = re.compile(r"_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d+$")


def run(name: str, python: str | None, allow_modified: bool, plain: bool, dry_run: bool) -> int:
    """Check as before a new run, list what is no longer as it was, train again in a new run folder, compare.

    Returns train.py's exit status. Raises UsageError for a run that cannot be done again, CloneError if the series that
    it was started with is gone, PreflightError, NotReproducedError.
    """
    folder = runs.find(name)
    record = runs.read(folder)
    try:
        assert record is not None  # noqa: S101, find has read it
        prepared = _prepare(folder, record, python, allow_modified)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{folder / 'run.json'} does not say all that it takes: {error}.", "Another version may have written it."
        ) from error
    report = preflight.check(stages.subject(prepared, clone_is_checked=True))
    for what, then, now in differences(record, prepared, report.data):
        display.warn(f"{what} was {then}, and is {now}")
    stages.require(report)
    if dry_run:
        display.write(prepared.launch.as_shell())
        return 0
    status = stages.start(prepared, report, plain=plain)
    if status == 0:
        compare(folder, prepared.launch.run_folder)
    return status


def _prepare(folder: Path, record: runs.Record, python: str | None, allow_modified: bool) -> stages.Prepared:
    """What `stages.prepare` makes of flags, from a record: the same command in a new folder."""
    clone = recorded.clone(record["upstream"], allow_modified)
    new = runs.folder_for(_TIME.sub("", folder.name))
    pins, settings = recorded.pinned(record, folder)
    stage = recipe.Stage(
        name=record["stage"],
        recipe=record["recipe"]["source"],
        values=dict(record["values"]),
        explicit=frozenset(),
        overrides=parse_overrides([*record["overrides"], *pins]),
        data=record["data"]["name"],
        data_revision=settings.get("SAFERLHF_REVISION") or None,
    )
    of = machines.Machines(**(record.get("machines") or {}))
    processes = int(record.get("processes") or 1)
    python = recorded.interpreter(record, python)
    display.say(f"runs {clone / 'train.py'} with {python}")
    training = environment.probe(python, ask_torch=True)
    start = []
    if launch.TORCHRUN in record["command"]:
        start = launch.torchrun(training.python_version, of, max(1, processes // of.count))
        settings |= machines.settings(of)
    words = [*recorded.words(record, new, allow_modified), *pins]
    command = (training.python, *start, str(clone / "train.py"), *words)
    known = {field.name for field in fields(recipe.Recipe)}
    return stages.Prepared(
        stage=stage,
        launch=launch.Launch(new, clone, command, settings, processes, (), of),
        clone=upstream.inspect(clone, patches.read_series()),
        recipe=recipe.Recipe(**{key: value for key, value in record["recipe"].items() if key in known}),
        environment=training,
        sft_run=Path(record["sft_run"]) if record.get("sft_run") else None,
        next_command=[word.replace(str(folder), str(new)) for word in record["next_command"]],
        allow_modified=allow_modified,
    )


def differences(
    record: runs.Record, prepared: stages.Prepared, looked: Mapping[str, Any] | None
) -> Iterator[tuple[str, object, object]]:
    """What is no longer as it was when the run was started: its name, then and now. What no record has is not told."""
    clone = prepared.clone
    now: dict[str, Any] = {
        "upstream": {"head": clone.head, "edits": clone.edits},
        "python": provenance.of_python(prepared.environment),
        "machine": provenance.of_machine(),
        "variables": provenance.of_variables(),
        "data": {key: provenance.of_data(prepared.stage, looked)[key] for key in ("counts", "fingerprint")},
        "archive": {"fingerprint": provenance.of_checkpoint(prepared.stage.get("model.archive"))},
    }
    then = {**record, "archive": {"fingerprint": record.get("archive_fingerprint")}}
    for part, values in now.items():
        yield from _differ(part, then.get(part), values)


def _differ(name: str, then: object, now: object) -> Iterator[tuple[str, object, object]]:
    if then == now or (then is None and name != "upstream.edits"):
        return
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({**then, **now} if name == "variables" else then.keys() & now.keys()):
            if name == "variables" and then.get(key) != now.get(key):
                yield f"{name}.{key}", then.get(key, "not set"), now.get(key, "not set")
            else:
                yield from _differ(f"{name}.{key}", then.get(key), now.get(key))
    else:
        yield name, then, now


def compare(first: Path, second: Path) -> None:
    """Compare the last evaluation that both runs did, after as many examples. Raises NotReproducedError."""
    before, after = (
        {record.examples: record.values for record in metrics.read_log(folder / "train.log").evaluations}
        for folder in (first, second)
    )
    common = sorted(before.keys() & after.keys())
    if not common:
        display.say("the first run was not evaluated where this one was: there is nothing to compare")
        return
    examples = common[-1]
    then, now = before[examples], after[examples]
    differ = [key for key in {**then, **now} if str(then.get(key)) != str(now.get(key))]
    if not differ:
        how = f"all {len(then)} metrics held out after {examples} examples are the same to every printed digit"
        display.say(f"reproduced: {how}")
        return
    rows = [(key, str(then.get(key, "")), str(now.get(key, ""))) for key in {**then, **now}]
    display.write_table(f"Held out, after {examples} examples", ("metric", "then", "now"), rows)
    raise NotReproducedError(
        f"Not reproduced: {len(differ)} of {len(rows)} metrics differ.", "What is no longer as it was is listed above."
    )

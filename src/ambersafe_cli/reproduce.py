"""`ambersafe reproduce`: do a run again as its record says, and compare what came out."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ambersafe_cli import (
    attempts,
    data_findings,
    display,
    environment,
    hub,
    launch,
    patches,
    preflight,
    provenance,
    recipe,
    runs,
    stages,
    upstream,
)
from ambersafe_cli.errors import UsageError
from ambersafe_cli.overrides import assign, parse_overrides

_TIME = re.compile(r"_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d+$")


def run(name: str, python: str | None, allow_modified: bool, dry_run: bool) -> int:
    """List what is no longer as it was, train again in a new run folder, compare the last metrics.

    Returns train.py's exit status. Raises UsageError for a run that cannot be done again, CloneError if the series that
    it was started with is gone.
    """
    folder = runs.find(name)
    record = runs.read(folder)
    if record is None or not record.get("command"):
        raise UsageError(f"{folder} does not say how it was run.", "Its run.json was made by another version.")
    prepared = _prepare(folder, record, python, allow_modified)
    config = preflight.effective_config(stages.subject(prepared))
    looked = None
    if prepared.stage.data:
        tokenizer = hub.sources(config, prepared.stage.data, prepared.stage.data_revision)[1]
        looked = data_findings.look_at_data(prepared.stage, prepared.environment, config, tokenizer)
    for what, then, now in differences(record, prepared, looked):
        display.warn(f"{what} was {then}, and is {now}")
    if dry_run:
        display.write(prepared.launch.as_shell())
        return 0
    status = stages.start(prepared, preflight.Report((), None, looked))
    if status == 0:
        compare(record, runs.read(prepared.launch.run_folder) or {})
    return status


def _prepare(folder: Path, record: runs.Record, python: str | None, allow_modified: bool) -> stages.Prepared:
    """What `stages.prepare` makes of flags, from a record: the same command in a new folder."""
    clone = attempts.recorded_clone(record["upstream"], allow_modified)
    new = runs.folder_for(_TIME.sub("", folder.name))
    command = attempts.command_in(record, clone, new, python)
    overrides = [*record["overrides"]]
    if commit := record["model"].get("commit"):
        command.append(assign("model.revision", commit))
        overrides.append(assign("model.revision", commit))
    data = record["data"]
    revision = data.get("commit") or data["revision"]
    stage = recipe.Stage(
        name=record["stage"],
        recipe=record["recipe"]["source"],
        values=record["values"],
        explicit=frozenset(),
        overrides=parse_overrides(overrides),
        data=data["name"],
        data_revision=revision,
    )
    settings = {**record["environment"], "SAFERLHF_REVISION": revision or ""}
    child = environment.probe(command[0], ask_torch=True)
    return stages.Prepared(
        stage=stage,
        launch=launch.Launch(new, clone, tuple(command), settings, record.get("processes", 1), ()),
        clone=upstream.inspect(clone, patches.read_series()),
        recipe=recipe.Recipe(**record["recipe"]),
        environment=child,
        sft_run=Path(record["sft_run"]) if record["sft_run"] else None,
        next_command=[word.replace(str(folder), str(new)) for word in record["next_command"]],
        allow_modified=allow_modified,
    )


def differences(
    record: runs.Record, prepared: stages.Prepared, looked: Mapping[str, Any] | None
) -> Iterator[tuple[str, object, object]]:
    """What is no longer as it was when the run was started: its name, then and now. What no record has is not told."""
    stage, archive = prepared.stage, prepared.stage.get("model.archive")
    now: dict[str, Any] = {
        "python": provenance.of_python(prepared.environment),
        "machine": provenance.of_machine(),
        "variables": provenance.of_variables(),
        "data": {key: provenance.of_data(stage, looked)[key] for key in ("counts", "fingerprint")},
        "archive": {"fingerprint": provenance.of_checkpoint(archive)},
    }
    then = {**record, "archive": {"fingerprint": record.get("archive_fingerprint")}}
    for part, values in now.items():
        yield from _differ(part, then.get(part), values)


def _differ(name: str, then: object, now: object) -> Iterator[tuple[str, object, object]]:
    if then is None or then == now:
        return
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({**then, **now} if name == "variables" else then.keys() & now.keys()):
            if name == "variables" and then.get(key) != now.get(key):
                yield f"{name}.{key}", then.get(key, "not set"), now.get(key, "not set")
            else:
                yield from _differ(f"{name}.{key}", then.get(key), now.get(key))
    else:
        yield name, then, now


def compare(before: runs.Record, after: runs.Record) -> None:
    """Show the last metrics of both runs, as printed, and whether they are the same."""
    then, now = before.get("last_metrics") or {}, after.get("last_metrics") or {}
    if not then:
        display.say("the first run has no evaluation to compare with")
        return
    differ = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    if not differ:
        display.say(f"reproduced: all {len(then)} metrics of the last evaluation are the same to every printed digit")
        return
    rows = [(key, str(then.get(key, "")), str(now.get(key, ""))) for key in {**then, **now}]
    display.write_table("The last evaluation", ("metric", "then", "now"), rows)
    display.say(f"not reproduced: {len(differ)} of {len(rows)} metrics differ")

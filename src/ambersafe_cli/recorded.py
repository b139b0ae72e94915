"""What a run's record says, for whoever goes on with the run or does it again: its clone, command, commits, inputs."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ambersafe_cli import data_findings, display, metrics, patches, provenance, runs, upstream, worktrees
from ambersafe_cli.errors import AmberSafeError, ArchiveError, CloneError, DataError
from ambersafe_cli.overrides import assign


def clone(upstreams: Mapping[str, Any], allow_modified: bool) -> Path:
    """The folder that holds upstream as a run was started with it: the clone, or a worktree if that has moved on.

    Raises CloneError where that cannot be had, unless it is allowed: the numbers would not be the run's.
    """
    folder = Path(upstreams["folder"])
    state = upstream.inspect(folder, patches.read_series())
    if (state.head, state.edits) == (upstreams["head"], upstreams.get("edits")):
        return folder
    now = f"{folder} is at {state.head[:12]}{' with edits' if state.edited else ''}"
    then = f"the run was started with {upstreams['head'][:12]}{' with edits' if upstreams['edited'] else ''}"
    try:
        if upstreams["edited"]:
            raise CloneError(f"{now}; {then}.", "--allow-modified goes on with it as it is.")
        worktree = worktrees.folder_at(folder, upstreams["head"])
    except CloneError as error:
        if not allow_modified:
            raise
        display.warn(f"{error.message} It goes on with that.")
        return folder
    display.warn(f"{now}, and {then}: that is in {worktree}")
    return worktree


def pinned(record: runs.Record, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The words and the variables by which a run's model and data are the commits that it was started with, whatever
    their branches are at now. A run that was killed has them in its log alone."""
    log = metrics.read_log(folder / "train.log")
    model = record["model"].get("commit") or log.model_commit
    data = record["data"].get("commit") or log.data_commit
    settings = {**record["environment"], **({"SAFERLHF_REVISION": data} if data else {})}
    return [assign("model.revision", model)] if model else [], settings


def changed_inputs(record: runs.Record, settings: Mapping[str, str], python: str) -> Iterator[AmberSafeError]:
    """An error for an archive, and one for rows, that are not those of the run, as far as it recorded them."""
    then = record.get("archive_fingerprint")
    if then and provenance.of_checkpoint(record.get("archive")) != then:
        yield ArchiveError(
            f"{record['archive']} is not the checkpoint that the run was started from.",
            "Put that back, or start the stage again; --allow-modified goes on with this one.",
        )
    fingerprints = record["data"].get("fingerprint")
    if fingerprints and data_findings.fingerprints(python, settings) != fingerprints:
        yield DataError(
            f"The rows of {record['data'].get('name')} are not those that the run was started with.",
            "Put those back, or start the stage again; --allow-modified goes on with these.",
        )


def command(record: runs.Record, clone: Path, folder: Path, python: str | None) -> list[str]:
    """The command of a run's first attempt, in another run folder, with another clone's train.py and another Python."""
    places = {"local_run_dir": folder, "hydra.run.dir": folder / "hydra"}
    words = [python or record["command"][0]]
    for word in record["command"][1:]:
        key = word.partition("=")[0]
        if key in places:
            word = assign(key, str(places[key]))
        words.append(str(clone / "train.py") if key == word and Path(word).name == "train.py" else word)
    return words

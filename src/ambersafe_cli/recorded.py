"""What a run's record may say to whoever goes on with the run or does it again: KEY=VALUE, a clone, inputs.

A record may be another's: it says what is trained, and decides neither which program is started, nor with which
environment; see "What is trusted" in scripts/README.md.
"""

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ambersafe_cli import data_findings, display, launch, metrics, patches, provenance, runs, upstream, worktrees
from ambersafe_cli.errors import AmberSafeError, ArchiveError, CloneError, DataError, RunFolderError, UsageError
from ambersafe_cli.overrides import assign, parse_overrides
from ambersafe_cli.untouched import require_known, require_untouched

# Hydra starts what its own keys name; a key that begins with _ is its for making objects; and of a group it reads a
# file, which may lie anywhere.
_KEY = re.compile(r"(?!(?:hydra|defaults|local_dirs)\b)[A-Za-z]\w*(?:\.[A-Za-z]\w*)*")
_GROUPS = ("model", "loss")
_REFERENCE = re.compile(r"\$\{[\w.]+\}")


def clone(upstreams: Mapping[str, Any], allow_modified: bool) -> Path:
    """The folder that holds upstream as a run was started with it: the clone, or a worktree if that has moved on.

    Raises CloneError where that cannot be had, or is not what the series makes, unless it is allowed.
    """
    folder = Path(upstreams["folder"])
    state = upstream.inspect(folder, patches.read_series())
    is_as_then = (state.head, state.edits) == (upstreams["head"], upstreams.get("edits"))
    now = f"{folder} is at {state.head[:12]}{' with edits' if state.edited else ''}"
    then = f"the run was started with {upstreams['head'][:12]}{' with edits' if upstreams['edited'] else ''}"
    try:
        if not is_as_then and upstreams["edited"]:
            raise CloneError(f"{now}; {then}.", "--allow-modified goes on with it as it is.")
        require_known(folder, upstreams["head"], patches.read_series())
        found = folder if is_as_then else worktrees.folder_at(folder, upstreams["head"])
        require_untouched(found, upstreams["head"], patches.read_series())
    except CloneError as error:
        if not allow_modified:
            raise
        display.warn(f"{error.message} It goes on with that.")
        return folder
    if not is_as_then:
        display.warn(f"{now}, and {then}: that is in {found}")
    return found


def interpreter(record: runs.Record, given: str | None) -> str:
    """The Python that a run goes on with: the one that is given, else this one.

    Raises UsageError if the run was trained with another: what it names is not started before somebody says so.
    """
    then = record["command"][0]
    if given is not None or is_this(then):
        return given or sys.executable
    raise UsageError(
        f"The run was trained with {then}, and this is {sys.executable}.",
        f"Name the one to go on with: --python {shlex.quote(then)}, or --python {shlex.quote(sys.executable)}.",
    )


def is_this(python: str) -> bool:
    """Whether an interpreter is this one, by whatever name in the same folder."""
    then, this = Path(python), Path(sys.executable)
    try:
        return then == this or (then.parent.resolve() == this.parent.resolve() and then.resolve() == this.resolve())
    except (OSError, RuntimeError):
        return False


def words(record: runs.Record, folder: Path, allow_modified: bool = False) -> list[str]:
    """What train.py was told, KEY=VALUE each, with another run folder.

    Raises RunFolderError for what could have it start or read something else than a training does; with
    `allow_modified` only for what is not KEY=VALUE.
    """
    own = {"local_run_dir": folder, "hydra.run.dir": folder / "hydra"}
    found = []
    for word in _behind_the_script(record["command"]):
        if _key(word) in own:  # in whatever form
            continue
        if not is_setting(word) and not (allow_modified and _key(word)):
            raise RunFolderError(
                f"The run's record has {word!r} for train.py, which may start or read something else than a training "
                "does.",
                "If you have given it yourself, --allow-modified goes on with it.",
            )
        found.append(word)
    return [*found, *(assign(key, str(path)) for key, path in own.items())]


def _behind_the_script(command: list[str]) -> list[str]:
    """The words of a command behind train.py; none if it does not run that."""
    scripts = [place for place, word in enumerate(command) if "=" not in word and Path(word).name == "train.py"]
    return command[scripts[0] + 1 :] if scripts else []


def _key(word: str) -> str | None:
    try:
        return parse_overrides([word])[0].key
    except UsageError:
        return None


def is_setting(word: str) -> bool:
    """Whether a KEY=VALUE only sets a value of upstream's config, so that it may come from anybody's record."""
    key, (prefix, _, text) = _key(word), word.partition("=")
    if not key or prefix not in (key, f"+{key}") or re.search(r"\$\\*\{", _REFERENCE.sub("", text)):
        return False
    if key in _GROUPS or key.endswith("attn_implementation"):  # of which transformers would fetch ORG/NAME, and run it
        return bool(re.fullmatch(r"[\w-]+", text))
    return bool(_KEY.fullmatch(key))


def settings(record: runs.Record) -> dict[str, str]:
    """What a run adds to the environment of train.py: where its rows are, and nothing else that the record says."""
    then = record["environment"]
    return launch.settings(then.get("SAFERLHF_DATASET", ""), then.get("SAFERLHF_REVISION"))


def pinned(record: runs.Record, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The words and the variables by which a run's model and data are the commits that it was started with, whatever
    their branches are at now. A run that was killed has them in its log alone."""
    log = metrics.read_log(folder / "train.log")
    model = record["model"].get("commit") or log.model_commit
    data = record["data"].get("commit") or log.data_commit
    found = settings(record) | ({"SAFERLHF_REVISION": data} if data else {})
    return [assign("model.revision", model)] if model else [], found


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

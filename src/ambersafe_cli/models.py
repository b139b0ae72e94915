"""Which weights are meant: by a run, a checkpoint of one, a policy.pt, or the name of a model."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ambersafe_cli import display, files, runs
from ambersafe_cli.errors import ArchiveError, UsageError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Weights:
    """Weights that can be loaded: those of a model as it was published, or of a checkpoint that was trained from it.

    `label` is what a table calls them; `model` a name on the hub or a folder, at `revision`; `tokenizer` the same, at
    `tokenizer_revision`; `checkpoint` a policy.pt, or None for the model itself; `template` how prompts were rendered
    in training (None, "hh" or "chat"); `run` the run that they come from, if it is known.
    """

    label: str
    model: str
    revision: str | None
    tokenizer: str
    tokenizer_revision: str | None
    checkpoint: Path | None = None
    template: str | None = None
    run: runs.Run | None = None


def find(text: str, model: str | None = None) -> Weights:
    """What a user means by RUN, its step-N, a policy.pt, a model's folder or a name on the hub.

    `model` says what a policy.pt is of that lies outside of its run's folder.
    Raises UsageError if nothing is meant by it, ArchiveError for a run without a checkpoint.
    """
    path = Path(os.path.expanduser(text)).absolute()  # noqa: PTH111, which fails for a user that there is not
    if _is_file(path):
        return _of_file(path, model)
    if path.name.startswith(("step-", "LATEST")) and _is_file(path / "policy.pt"):
        return _of_file(path / "policy.pt", model)
    if _is_file(path / "config.json"):
        return of_model(str(path), None)
    try:
        run = runs.open_run(text)
    except UsageError as error:
        if os.path.lexists(path) or not _HUB_NAME.fullmatch(text) or "/" not in text:
            raise UsageError(
                error.message, f"{error.hint} A model is named by its folder, or as ORG/NAME on the hub."
            ) from error
        return of_model(text, None)
    return of_run(run)


def _is_file(path: Path) -> bool:
    """Also of a name that is too long, or a folder that may not be looked at: then it is none."""
    return os.path.isfile(path)  # noqa: PTH113


def of_model(name: str, revision: str | None) -> Weights:
    """A model as it was published."""
    return Weights(Path(name).name, name, revision, name, revision)


def base_of(run: runs.Run) -> Weights:
    """The model that a run's weights were trained from in the first place."""
    name = str(run.record["model"]["name"])
    revision = run.record["model"].get("commit") or run.record["model"].get("revision")
    tokenizer = run.setting("model.tokenizer_name_or_path")
    template = run.setting("template")
    return Weights(
        "base",
        name,
        revision and str(revision),
        str(tokenizer or name),
        None if tokenizer or not revision else str(revision),  # upstream takes the revision for its own tokenizer only
        None,
        str(template) if template else None,
        run,
    )


def of_run(run: runs.Run, checkpoint: Path | None = None) -> Weights:
    """The final weights of a run, or where it has none yet, those of its newest checkpoint, which is said.

    Raises ArchiveError if it has neither.
    """
    found = checkpoint or runs.checkpoint(run.folder)
    if not found.is_file():
        places = [run.folder, *runs.steps(run.folder)]
        found = next((place / "policy.pt" for place in places if (place / "policy.pt").is_file()), found)
        if not found.is_file():
            raise ArchiveError(f"{run.folder} has no checkpoint yet.", "`ambersafe show` tells how far it is.")
        display.warn(f"{run.folder.name} has no final weights: these are those of {found}")
    return replace(base_of(run), label=str(run.record["stage"]), checkpoint=found)


def lineage(run: runs.Run) -> list[Weights]:
    """The base model, what was trained from it in between, and the run itself, in this order.

    Raises ArchiveError if the run has no checkpoint. An archive that is gone is said, and left away.
    """
    found = [of_run(run)]
    archive = run.record.get("archive")
    while archive and len(found) < 8:
        path = Path(str(archive))
        if not files.is_file(path):
            display.warn(f"{path}, which {found[0].label} was trained from, is gone: it is left away")
            break
        earlier = run_of(path)
        if earlier is None:
            found.insert(0, replace(base_of(run), label="archive", checkpoint=path))
            break
        found.insert(0, of_run(earlier, path))
        archive = earlier.record.get("archive")
    return [base_of(run), *found]


def reference_of(run: runs.Run) -> Weights:
    """What a run's weights are compared with: in DPO the reference model of the training, which had the weights of the
    archive, and in SFT the base model. Raises ArchiveError if the archive is gone."""
    archive = run.record.get("archive")
    if run.record["stage"] != "dpo" or not archive:
        return base_of(run)
    path = Path(str(archive))
    if not files.is_file(path):
        raise ArchiveError(
            f"{path} is gone, which {run.folder.name} was trained from, and which its rewards are against.",
            "--reference names other weights, e.g. --reference the SFT run's folder.",
        )
    earlier = run_of(path)
    return of_run(earlier, path) if earlier else replace(base_of(run), label="archive", checkpoint=path)


def run_of(checkpoint: Path) -> runs.Run | None:
    """The run that a policy.pt lies in, or None."""
    for folder in (checkpoint.parent.parent, checkpoint.parent):
        if found := runs.look(folder, by_hand=True):
            return found
    return None


def _of_file(path: Path, model: str | None) -> Weights:
    run = run_of(path)
    if run is not None:
        return of_run(run, path)
    if model is None:
        raise UsageError(
            f"{path} lies in no run's folder: nothing says what model it is of.", "Give --model NAME_OR_FOLDER."
        )
    return replace(of_model(model, None), label=path.parent.name, checkpoint=path)

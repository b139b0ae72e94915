"""`ambersafe export`: a checkpoint as a folder that transformers, and all that reads its folders, loads."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ambersafe_cli import (
    asking,
    checkpoints,
    display,
    folders,
    hub,
    integrity,
    model_card,
    models,
    origins,
    pushing,
    runs,
)
from ambersafe_cli.errors import ArchiveError, ExportError, HubError, UsageError
from ambersafe_cli.plans import in_gigabytes

FOLDER = "hugging_face"
SHARD_BYTES = 5 * 10**9
"""How large a file of weights may get, as huggingface_hub has it by default."""


@dataclass(frozen=True)
class Request:
    """What a user asked for with `ambersafe export`, by its flags."""

    checkpoint: str
    out: Path | None
    dtype: str | None
    model: str | None
    force: bool
    push: str | None
    private: bool
    python: str | None
    as_json: bool


def run(request: Request) -> None:
    """Export, upload if that is asked for, and say where it is. Raises AmberSafeError."""
    if request.private and not request.push:
        raise UsageError("--private is about the repository of --push, which is not given.")
    if request.push:
        pushing.require_name(request.push)
    weights, checkpoint = find(request.checkpoint, request.model)
    out = request.out or default_folder(weights, checkpoint)
    folder = Path(os.path.expanduser(out)).resolve()  # noqa: PTH111, which fails for a user that there is not
    dtype = write(weights, checkpoint, folder, request)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    size = sum((folder / file).stat().st_size for file in files)
    display.say(f"{len(files)} files, {in_gigabytes(size)}, weights in {dtype}")
    answer = {"folder": str(folder), "files": files, "bytes": size, "dtype": dtype, "url": None}
    if not request.as_json:
        display.write(str(folder))
    try:
        if request.push:
            answer["url"] = pushing.push(folder, request.push, request.private)
    finally:
        if request.as_json:
            display.write_json(answer)
    if answer["url"] and not request.as_json:
        display.write(str(answer["url"]))


def find(text: str, model: str | None) -> tuple[models.Weights, Path]:
    """The checkpoint that is meant, and its policy.pt. `model` says what it is of, if no run does or the run's model
    lies elsewhere now.

    Raises UsageError for what is no checkpoint, ArchiveError.
    """
    if model and os.path.isdir(place := os.path.expanduser(model)):  # noqa: PTH111, PTH112, as above
        model = os.path.abspath(place)  # noqa: PTH100
    weights = models.find(text, model)
    if (found := weights.checkpoint) is None:
        raise UsageError(f"{text} names a model as it was published, no checkpoint.", "Name a run, or a policy.pt.")
    has_own = weights.tokenizer != weights.model  # a tokenizer
    if model:
        weights = replace(weights, model=model, revision=None)
    elif weights.run and (commit := origins.commit_of(weights.run, "model")):
        weights = replace(weights, revision=commit)  # a run that was killed has it in its log alone
    if not has_own:
        weights = replace(weights, tokenizer=weights.model, tokenizer_revision=weights.revision)
    return weights, found


def default_folder(weights: models.Weights, checkpoint: Path) -> Path:
    """`hugging_face` in the run's folder, named after the step if it is not of the final weights; or beside a policy.pt
    that lies in no run."""
    place = checkpoint.parent
    if weights.run is None:
        return place / FOLDER
    is_final = place in (weights.run.folder, runs.checkpoint(weights.run.folder).parent)
    return weights.run.folder / (FOLDER if is_final else f"{FOLDER}-{place.name}")


def write(weights: models.Weights, checkpoint: Path, folder: Path, request: Request) -> str:
    """Fill the folder, or leave it as it was. Returns the dtype of the weights in it. Raises AmberSafeError."""
    places = [Path(name) for name in (weights.model, weights.tokenizer) if Path(name).is_dir()]
    needed = (checkpoint, *places)
    folders.require_free(folder, request.force, needed)
    _require_sources(weights)
    shapes = checkpoints.policy_shapes(checkpoint)
    display.say(f"reading {checkpoint}, whether every byte is as it was written …")
    integrity.require_whole(checkpoint)
    asked = {
        "checkpoint": str(checkpoint),
        "model": weights.model,
        "revision": weights.revision,
        "tokenizer": weights.tokenizer,
        "tokenizer_revision": weights.tokenizer_revision,
        "dtype": request.dtype,
        "shard_bytes": SHARD_BYTES,
        "buffers": checkpoints.BUFFER.pattern,
    }
    with folders.filling(folder, request.force, needed) as new:
        python = _interpreter(weights, request.python)
        answer = asking.ask(python, "export_checkpoint.py", {**asked, "folder": str(new)}, {}, "export")
        subject = model_card.Subject(
            weights=weights,
            name=request.push or f"./{folder.name}",
            step=answer["step_idx"] if isinstance(answer["step_idx"], int) else None,
            metrics=answer["metrics"],
            fingerprint=checkpoints.fingerprint(checkpoint),
            dtype=answer["dtype"],
            parameters=checkpoints.parameters({name: tuple(shape) for name, (shape, _) in answer["tensors"].items()}),
            base_commit=answer["commit"],
        )
        (new / "README.md").write_text(model_card.render(subject), encoding="utf-8", errors="backslashreplace")
        require_whole(new, answer, shapes)
    return str(answer["dtype"])


def _interpreter(weights: models.Weights, python: str | None) -> str:
    """The one that is asked for, or the one that the run was trained with, if that is there, or this one."""
    command = weights.run.record.get("command") if weights.run else None
    trained_with = str(command[0]) if command else ""
    return python or (trained_with if os.access(trained_with, os.X_OK) else sys.executable)


def _require_sources(weights: models.Weights) -> None:
    """Raise HubError if the config or the tokenizer is not on this machine and cannot be fetched."""
    model = hub.Source("model", weights.model, weights.revision)
    tokenizer = hub.Source("tokenizer", weights.tokenizer, weights.tokenizer_revision)
    folder = hub.folder_of(model)
    found = {
        model: [] if folder and (folder / "config.json").is_file() else ["config.json"],
        tokenizer: hub.lacking(tokenizer),
    }
    for source, files in found.items():
        if files and not source.could_be_fetched:
            raise HubError(f"{hub.problem(source, files)}.", "--model says where it is now: a folder, or ORG/NAME.")
        if files and (offline := hub.offline_by()):
            at = f" --revision {source.revision}" if source.revision else ""
            command = f"hf download {source.name}{at} --exclude '*.safetensors' --exclude '*.bin'"
            said = f"{hub.problem(source, files)}, and {offline} is set."
            raise HubError(said, f"Where there is a network: `{command}`")


def require_whole(folder: Path, answer: Mapping[str, Any], policy: checkpoints.Shapes) -> None:
    """Open an exported folder again. Raises ExportError if it does not hold the weights of the policy.pt."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        entries: dict[str, tuple[tuple[int, ...], str]] = {}
        for path in checkpoints.weight_files(folder):
            entries |= checkpoints.safetensors_entries(path)
        shapes = {name: shape for name, (shape, _) in entries.items()}
        kept = {name: shape for name, shape in policy.items() if name not in answer["left_out"]}
        said = {name: (tuple(shape), dtype) for name, (shape, dtype) in answer["tensors"].items()}
        is_whole = (
            config["dtype"] == answer["dtype"]
            and entries == said
            and checkpoints.parameters(shapes) == checkpoints.parameters(kept)
            and (answer["renamed"] or shapes == kept)
            and (folder / "generation_config.json").is_file()
            and (folder / "tokenizer_config.json").is_file()
        )
    except (OSError, ValueError, KeyError, TypeError, ArchiveError) as error:
        raise ExportError(f"{folder} cannot be read again: {error}", "Export it again.") from error
    if not is_whole:
        raise ExportError(f"{folder} does not hold what the checkpoint does.", "Export it again.")

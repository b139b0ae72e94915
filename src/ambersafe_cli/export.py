"""`ambersafe export`: a checkpoint as a folder that transformers, and all that reads its folders, loads.

Of a LoRA checkpoint it is the adapter, as peft loads it, or with `--merge` a model that has the adapter in its weights.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ambersafe_cli import (
    as_trained,
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
    merge: bool
    model: str | None
    force: bool
    push: str | None
    private: bool
    python: str
    as_json: bool


def run(request: Request) -> None:
    """Export, upload if that is asked for, and say where it is. Raises AmberSafeError."""
    if request.private and not request.push:
        raise UsageError("--private is about the repository of --push, which is not given.")
    if request.push:
        pushing.require_name(request.push)
    weights, checkpoint = find(request.checkpoint, request.model)
    out = request.out or default_folder(weights, checkpoint, request.merge)
    if request.out is None and out.is_symlink():
        raise UsageError(f"{out} is a link, which may lead anywhere.", f"If that is meant: --out {out.resolve()}")
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


def default_folder(weights: models.Weights, checkpoint: Path, merge: bool = False) -> Path:
    """`hugging_face` in the run's folder, named after the step if it is not of the final weights, and so that a merged
    one lies beside its adapter; or beside a policy.pt that lies in no run."""
    place, name = checkpoint.parent, f"{FOLDER}-merged" if merge else FOLDER
    if weights.run is None:
        return place / name
    is_final = place in (weights.run.folder, runs.checkpoint(weights.run.folder).parent)
    return weights.run.folder / (name if is_final else f"{name}-{place.name}")


def write(weights: models.Weights, checkpoint: Path, folder: Path, request: Request) -> str:
    """Fill the folder, or leave it as it was. Returns the dtype of the weights in it. Raises AmberSafeError."""
    places = [Path(name) for name in (weights.model, weights.tokenizer) if Path(name).is_dir()]
    needed = (checkpoint, *places)
    folders.require_free(folder, request.force, needed)
    adapter = checkpoints.adapter_of(checkpoint)
    _require_way(checkpoint, adapter, request.merge)
    _require_sources(weights, with_weights=request.merge and adapter is not None and adapter.on is None)
    shapes = checkpoints.policy_shapes(checkpoint)
    display.say(f"reads it with {request.python}")
    as_trained.require_packages(request.python, [weights], [])
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
        "merge": request.merge,
        # No path of this machine gets onto the hub.
        "base": Path(weights.model).name if request.push and not origins.is_on_hub(weights.model) else weights.model,
    }
    with folders.filling(folder, request.force, needed) as new:
        answer = asking.ask(request.python, "export_checkpoint.py", {**asked, "folder": str(new)}, {}, "export")
        subject = model_card.Subject(
            weights=weights,
            name=request.push or f"./{folder.name}",
            step=answer["step_idx"] if isinstance(answer["step_idx"], int) else None,
            metrics=answer["metrics"],
            fingerprint=checkpoints.fingerprint(checkpoint),
            dtype=answer["dtype"],
            parameters=checkpoints.parameters({name: tuple(shape) for name, (shape, _) in answer["tensors"].items()}),
            base_commit=answer["commit"],
            adapter=adapter,
            is_merged=request.merge,
        )
        (new / "README.md").write_text(model_card.render(subject), encoding="utf-8", errors="backslashreplace")
        if adapter and not request.merge:
            require_whole_adapter(new, answer, adapter)
        else:
            require_whole(new, answer, shapes if adapter is None else _shapes(answer["shapes"]))
    return str(answer["dtype"])


def _require_way(checkpoint: Path, adapter: checkpoints.Adapter | None, merge: bool) -> None:
    """Raise UsageError if a checkpoint cannot be exported as it is asked for."""
    if merge and adapter is None:
        raise UsageError(
            f"{checkpoint} holds whole weights, no adapter: there is nothing to merge.", "Without --merge."
        )
    if adapter and adapter.on and not merge:
        raise UsageError(
            f"The adapter of {checkpoint} is for the weights of {adapter.on}, which no published model has: by itself "
            "it is of no use.",
            "--merge writes one model of both.",
        )


def _shapes(lists: Mapping[str, list[int]]) -> checkpoints.Shapes:
    return {name: tuple(shape) for name, shape in lists.items()}


def _require_sources(weights: models.Weights, with_weights: bool) -> None:
    """Raise HubError if the config, the tokenizer or, where they are asked for, the weights of the model are not on
    this machine and cannot be fetched."""
    model = hub.Source("model", weights.model, weights.revision)
    tokenizer = hub.Source("tokenizer", weights.tokenizer, weights.tokenizer_revision)
    folder = hub.folder_of(model)
    of_model = [] if folder and (folder / "config.json").is_file() else ["config.json"]
    found = {
        model: hub.lacking(model) if with_weights else of_model,
        tokenizer: hub.lacking(tokenizer),
    }
    for source, files in found.items():
        if files and not source.could_be_fetched:
            raise HubError(f"{hub.problem(source, files)}.", "--model says where it is now: a folder, or ORG/NAME.")
        if files and (offline := hub.offline_by()):
            at = f" --revision {source.revision}" if source.revision else ""
            command = f"hf download {source.name}{at}"
            command += "" if with_weights else " --exclude '*.safetensors' --exclude '*.bin'"
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


def require_whole_adapter(folder: Path, answer: Mapping[str, Any], adapter: checkpoints.Adapter) -> None:
    """Open an exported adapter again. Raises ExportError if it does not hold that of the checkpoint: in its own dtype
    the same bytes, in another the same tensors."""
    weights, config = checkpoints.ADAPTER_FILES
    try:
        entries = checkpoints.safetensors_entries(folder / weights)
        of_checkpoint = checkpoints.safetensors_entries(adapter.folder / weights)
        said = {name: (tuple(shape), dtype) for name, (shape, dtype) in answer["tensors"].items()}
        with (folder / weights).open("rb") as file:
            is_same_file = hashlib.file_digest(file, "sha256").hexdigest() == adapter.sha256[weights]
        is_whole = (
            entries == said
            and {name: shape for name, (shape, _) in entries.items()} == checkpoints.adapter_shapes(adapter)
            and (is_same_file or entries != of_checkpoint)
            and json.loads((folder / config).read_text(encoding="utf-8"))["peft_type"] == "LORA"
            and (folder / "tokenizer_config.json").is_file()
        )
    except (OSError, ValueError, KeyError, TypeError, ArchiveError) as error:
        raise ExportError(f"{folder} cannot be read again: {error}", "Export it again.") from error
    if not is_whole:
        raise ExportError(f"{folder} does not hold what the checkpoint does.", "Export it again.")

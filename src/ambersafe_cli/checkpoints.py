"""What a policy.pt or a model's folder holds, read from their headers: names and shapes, never the weights.

Neither needs torch. A policy.pt is a zip archive (torch.save since 1.6) with one pickle, of which only tensors, plain
values and containers are accepted; a safetensors file begins with a JSON header.
"""

import collections
import hashlib
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambersafe_cli.errors import ArchiveError
from ambersafe_cli.hub import shards

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Storage:
    pass


class _ShapesOnly(pickle.Unpickler):
    """Unpickles tensors as their shapes, and refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, *rest: tuple(size)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda shape, *rest: shape
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):  # FSDP saves tensors of a class of their own
            return lambda function, kind, arguments, state: function(*arguments)
        if (module, name) in (("torch.nn.parameter", "Parameter"), ("torch", "Tensor")):
            return _Storage
        if module == "torch" and name.endswith("Storage"):
            return _Storage
        raise pickle.UnpicklingError(f"it holds {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return _Storage()


def policy_shapes(path: Path) -> Shapes:
    """The shape of each tensor in a policy.pt. Raises ArchiveError if it is cut off or not upstream's."""
    hint = "It was cut off, or it is another kind of file: take another checkpoint, or train it again."
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            with archive.open(name) as file:
                content = _ShapesOnly(file).load()
    except (
        OSError,
        ValueError,
        zipfile.BadZipFile,
        EOFError,
        pickle.UnpicklingError,
        AttributeError,
        TypeError,
    ) as error:
        raise ArchiveError(f"{path} is not a whole checkpoint of upstream's: {error}", hint) from error
    state = content.get("state") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not {"step_idx", "metrics"} <= content.keys():
        raise ArchiveError(f"{path} is not a checkpoint of upstream's: it lacks step_idx, state or metrics.", hint)
    shapes = {name: shape for name, shape in state.items() if isinstance(shape, tuple)}
    if len(shapes) != len(state):
        raise ArchiveError(f"{path} is an optimizer.pt or the like, not a policy.pt.", "Give the policy.pt beside it.")
    return shapes


def fingerprint(path: Path) -> str | None:
    """A SHA-256 by which a policy.pt is known again, of its zip directory: nothing of the weights is read.

    It is over the sorted (name without the archive's top folder, size in bytes, CRC-32) of the members, so it does not
    depend on what the file is called, and equal tensors have equal ones. None for what is no zip archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [(m.filename.partition("/")[2], m.file_size, m.CRC) for m in archive.infolist()]
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return None
    lines = "".join(f"{name}\0{size}\0{crc:08x}\n" for name, size, crc in sorted(members))
    return hashlib.sha256(lines.encode(errors="backslashreplace")).hexdigest()


def model_shapes(folder: Path) -> Shapes | None:
    """The shape of each tensor in a model's safetensors files; None without any. Raises ArchiveError for a bad one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weights(folder):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except (OSError, struct.error, ValueError, MemoryError, OverflowError) as error:
            raise ArchiveError(
                f"{path} is not a whole safetensors file: {error}", "Download the model again."
            ) from error
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes or None


def _weights(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from a folder; others, as consolidated.safetensors, are not it."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    try:
        return [folder / name for name in shards(index)]
    except (OSError, ValueError) as error:
        raise ArchiveError(f"{index} is not a whole index: {error}", "Download the model again.") from error


def parameters(shapes: Shapes) -> int:
    """How many numbers the tensors hold."""
    return sum(math.prod(shape) for shape in shapes.values())


def differences(archive: Shapes, model: Shapes) -> list[str]:
    """Where a checkpoint does not fit a model, in words. A tied output layer is in checkpoints, but not in models."""
    found = [f"{name} is missing" for name in model if name not in archive]
    found += [
        f"{name} is not the model's" for name in archive if name not in model and not name.endswith("lm_head.weight")
    ]
    found += [
        f"{name} is {'x'.join(map(str, archive[name]))}, not {'x'.join(map(str, shape))}"
        for name, shape in model.items()
        if name in archive and archive[name] != shape
    ]
    return found

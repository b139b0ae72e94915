"""What a policy.pt or a model's folder holds, read from their headers: names and shapes, never the weights.

Neither needs torch. A policy.pt is a zip archive (torch.save since 1.6) with one pickle, of which only tensors, plain
values and containers are accepted; a safetensors file begins with a JSON header.
"""

import collections
import hashlib
import io
import json
import math
import pickle
import re
import reprlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ambersafe_cli import files
from ambersafe_cli.errors import ArchiveError
from ambersafe_cli.hub import WEIGHTS, shards
from ambersafe_cli.overrides import LARGEST

LONGEST_HEADER = 100_000_000
"""Bytes of the longest header that a safetensors file can have: https://github.com/huggingface/safetensors."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Storage:
    pass


def _shape(size: Any) -> tuple[int, ...]:
    """A tensor's shape. Raises ValueError for what is none."""
    if not isinstance(size, tuple | list) or not all(type(each) is int and 0 <= each <= LARGEST for each in size):
        raise ValueError(f"{reprlib.repr(size)} is no shape of a tensor")
    return tuple(size)


# Not C's: that one makes room for as many memos as a damaged file says that there are, up to 32 GB.
class _ShapesOnly(pickle._Unpickler):
    """Unpickles tensors as their shapes, and refuses everything that could run code. `kinds`: of each storage that they
    lie in, by its name in the archive, torch's class."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.kinds: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, *rest: _shape(size)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda shape, *rest: shape
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):  # FSDP saves tensors of a class of their own
            return lambda function, kind, arguments, state: function(*arguments)
        if (module, name) in (("torch.nn.parameter", "Parameter"), ("torch", "Tensor")):
            return _Storage
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"it holds {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) > 2:
            self.kinds[str(pid[2])] = str(pid[1])
        return _Storage()


ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
"""What lies beside the policy.pt of a LoRA run, in peft's format."""

_QUANTIZED = (None, "4bit", "8bit")
_HINT = "It was cut off, or it is another kind of file: take another checkpoint, or train it again."


@dataclass(frozen=True)
class Adapter:
    """What the policy.pt of a LoRA run says of its adapter: the folder that it lies in, beside the policy.pt; the
    SHA-256 of each of its files (ADAPTER_FILES); `on`, the policy.pt with the weights below it, None for those of the
    model as it was published, and what its fingerprint was; and how those of the model were quantized in training:
    "4bit", "8bit" or None."""

    folder: Path
    sha256: Mapping[str, str]
    on: Path | None
    on_fingerprint: str | None
    quantize: str | None


def adapter_of(path: Path) -> Adapter | None:
    """The adapter that a policy.pt goes with; None for one with weights of its own. Its files are not looked at.

    Raises ArchiveError if it is cut off or not upstream's.
    """
    said = _read_policy(path).get("adapter")
    if said is None:
        return None
    try:
        sha256, on, quantize = dict(said["sha256"]), said["on"], said["quantize"]
        below = said["on_fingerprint"]
        is_known = set(sha256) == set(ADAPTER_FILES) and isinstance(on, str | None) and quantize in _QUANTIZED
        is_known = is_known and (isinstance(below, str) if on else below is None)
    except (KeyError, TypeError, ValueError):
        is_known = False
    if not is_known:
        raise ArchiveError(f"{path} tells of an adapter of a kind that is not known here.", _HINT)
    return Adapter(path.parent, sha256, Path(on) if on else None, below, quantize)


def adapter_shapes(adapter: Adapter) -> Shapes:
    """The shape of each tensor of an adapter, by peft's names. Raises ArchiveError if its file is not whole."""
    path = adapter.folder / ADAPTER_FILES[0]
    try:
        return {name: shape for name, (shape, _) in safetensors_entries(path).items()}
    except Exception as error:
        raise ArchiveError(f"{path} is not a whole adapter: {error}", "Copy its folder again.") from error


def policy_shapes(path: Path) -> Shapes:
    """The shape of each tensor in a policy.pt, none where it goes with an adapter.

    Raises ArchiveError if it is cut off or not upstream's.
    """
    state = _read_policy(path)["state"]
    shapes = {str(name): shape for name, shape in state.items() if isinstance(shape, tuple)}
    if len(shapes) != len(state):
        raise ArchiveError(f"{path} is an optimizer.pt or the like, not a policy.pt.", "Give the policy.pt beside it.")
    return shapes


def _read_policy(path: Path) -> dict[str, Any]:
    try:
        content = _read_pickle(path)
    except Exception as error:
        raise ArchiveError(f"{path} is not a whole checkpoint of upstream's: {error}", _HINT) from error
    is_policy = isinstance(content, dict) and {"step_idx", "state", "metrics"} <= content.keys()
    if not is_policy or not isinstance(content["state"], dict):
        raise ArchiveError(f"{path} is not a checkpoint of upstream's: it lacks step_idx, state or metrics.", _HINT)
    return dict(content)


def _read_pickle(path: Path) -> Any:
    """What torch.save wrote, with shapes in place of tensors.

    Raises an exception of any kind for a file that is damaged: those of zipfile and pickle are nowhere written down.
    """
    with files.open_to_read(path) as file, zipfile.ZipFile(file) as archive:
        return _unpickle(archive)[0]


def _unpickle(archive: zipfile.ZipFile) -> tuple[Any, dict[str, str]]:
    """What an archive of torch.save's holds, and of each member with numbers the class of its storage."""
    (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile("it is compressed")  # torch.save does not, and it could become any size
    if archive.getinfo(name).file_size > files.LARGEST:
        raise zipfile.BadZipFile("it says more of its tensors than is read")
    unpickler = _ShapesOnly(io.BytesIO(archive.read(name)))  # all of it, and its CRC-32, before any is gone by
    content = unpickler.load()
    folder = name.removesuffix("data.pkl")
    return content, {f"{folder}data/{key}": kind for key, kind in unpickler.kinds.items()}


def weights_of_policy(archive: zipfile.ZipFile) -> Mapping[str, str]:
    """The members of a policy.pt that hold its weights, and of each the class of its storage, such as FloatStorage.

    None for an optimizer.pt or the like, whose state is nested. Raises as _read_pickle does.
    """
    content, kinds = _unpickle(archive)
    state = content.get("state") if isinstance(content, dict) else None
    is_policy = isinstance(state, dict) and all(isinstance(shape, tuple) for shape in state.values())
    return kinds if is_policy else {}


def fingerprint(path: Path) -> str | None:
    """A SHA-256 by which a policy.pt is known again, of its zip directory: nothing of the weights is read.

    It is over the sorted (name without the archive's top folder, size in bytes, CRC-32) of the members, so it does not
    depend on what the file is called, and equal tensors have equal ones. None for what is no zip archive.
    """
    try:
        with files.open_to_read(path) as file, zipfile.ZipFile(file) as archive:
            members = [(m.filename.partition("/")[2], m.file_size, m.CRC) for m in archive.infolist()]
    except Exception:  # of any kind, see _read_pickle
        return None
    lines = "".join(f"{name}\0{size}\0{crc:08x}\n" for name, size, crc in sorted(members))
    return hashlib.sha256(lines.encode(errors="backslashreplace")).hexdigest()


def model_shapes(folder: Path) -> Shapes | None:
    """The shape of each tensor in the files of weights that transformers loads from a folder.

    None where there are none, or only ones from before torch 1.6. Raises ArchiveError for one that is not whole.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            shapes |= (
                {name: shape for name, (shape, _) in safetensors_entries(path).items()}
                if path.suffix == ".safetensors"
                else _read_pickle(path)
            )
        except Exception as error:
            if path.suffix == ".bin" and _is_no_archive(path):
                return None
            said = f"{path} is not a whole file of weights: {error}"
            raise ArchiveError(said, "Download the model again.") from error
    return {str(name): shape for name, shape in shapes.items() if isinstance(shape, tuple)} or None


def _is_no_archive(path: Path) -> bool:
    """Whether a file is there that does not begin as zip archives do."""
    try:
        with files.open_to_read(path) as file:
            return file.read(2) != b"PK"
    except OSError:
        return False


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that transformers loads from a folder, whether they are there or not; none without any.

    Others that lie beside them, as consolidated.safetensors, are not it. Raises ArchiveError for a bad index.
    """
    first = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        return []
    try:
        return [folder / name for name in shards(first)] or [first]
    except (OSError, ValueError) as error:
        raise ArchiveError(f"{first} is not a whole index: {error}", "Download the model again.") from error


def safetensors_entries(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape and dtype (F32, BF16, …) of each tensor in a safetensors file, by its header.

    Raises OSError, or ValueError for a file that is cut off, or another kind of file.
    """
    size = path.stat().st_size
    with files.open_to_read(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size, LONGEST_HEADER):
            raise ValueError(f"it has {size} bytes, and a header of {length}")
        try:
            header = dict(json.loads(file.read(length)))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            entries = {name: (_shape(entry["shape"]), str(entry["dtype"])) for name, entry in header.items()}
        except (LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"its header is none: {error}") from error
    if size != 8 + length + end:
        raise ValueError(f"it has {size} bytes of {8 + length + end}")
    return entries


def parameters(shapes: Shapes) -> int:
    """How many numbers the tensors hold."""
    return sum(math.prod(shape) for shape in shapes.values())


# What files of older models hold besides weights; transformers makes these anew.
BUFFER = re.compile(r"\.(inv_freq|masked_bias|attn\.bias|attention\.bias)$")
_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out)\.")


def differences(archive: Shapes, model: Shapes) -> list[str]:
    """Where a checkpoint does not fit a model, in words.

    A tied output layer is in checkpoints, but not in models; and some models' names lack the prefix of the part that
    is not the output layer, e.g. `transformer.`, as transformers allows.
    """
    prefixes = {name.partition(".")[0] for name in archive if not _OUTPUT.search(name)}
    wanted = {}
    for name, shape in model.items():
        if not BUFFER.search(name):
            known = (each for each in (name, *(f"{prefix}.{name}" for prefix in prefixes)) if each in archive)
            wanted[next(known, name)] = shape
    found = [f"{name} is missing" for name in wanted if name not in archive and not _OUTPUT.search(name)]
    found += [
        f"{name} is not the model's"
        for name in archive
        if name not in wanted and not _OUTPUT.search(name) and not BUFFER.search(name)
    ]
    found += [
        f"{name} is {'x'.join(map(str, archive[name]))}, not {'x'.join(map(str, shape))}"
        for name, shape in wanted.items()
        if name in archive and archive[name] != shape
    ]
    return found

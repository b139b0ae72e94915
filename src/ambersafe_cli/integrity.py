"""Whether what torch.save wrote is still as it was written. Without torch: the file is a zip archive, not compressed.

Together with the CRC-32 of each member this covers every byte that torch.load goes by: a test flips them one by one.
The files of an adapter lie beside the policy.pt, which has their SHA-256.
"""

import errno
import hashlib
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, BinaryIO

from ambersafe_cli import checkpoints, files
from ambersafe_cli.errors import ArchiveError

# What the end of an archive says of its directory, in a record of 16 and 32 bits and, always with torch, one of 64.
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
# An entry of the directory, and the lengths of its name, extra field and comment in it.
_ENTRY_SIZE, _LENGTHS, _LENGTHS_AT = 46, struct.Struct("<3H"), 28
_FLAGS = 0x0808  # names in UTF-8, sizes behind the data


def damage(path: Path) -> str | None:
    """Why a file of torch.save's is not as it was written: missing, cut off, or a byte is another; or why nothing goes
    on from it: a weight of a policy.pt is not finite. None if it is whole.

    Of a policy.pt that goes with an adapter, the same of the adapter's files. It reads the whole file, at the speed of
    the disk or of CRC-32, which the archive holds of each of its members.
    """
    try:
        with files.open_to_read(path) as file, zipfile.ZipFile(file) as archive:
            _require_sound_directory(file, archive.infolist())
            weights = {} if path.name in _NO_POLICY else checkpoints.weights_of_policy(archive)
            for member in archive.infolist():
                with archive.open(member) as read:
                    if not _are_finite(read, weights.get(member.filename, "")):
                        return _NOT_FINITE
    except FileNotFoundError:
        return "it is missing"
    except zipfile.BadZipFile as error:
        what = "a byte of it is not what was written" if "CRC-32" in str(error) else "it is cut off or damaged"
        return f"{what} ({error})"
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # which zipfile meets in a damaged file
            raise  # of the disk: what is there may be whole
        return f"it is cut off or damaged ({error})"
    except MemoryError:
        raise
    except Exception as error:  # what the reader of a zip archive raises for arbitrary bytes is nowhere written down
        return f"it is cut off or damaged ({error or type(error).__name__})"
    return _damage_of_adapter(path)


def _are_finite(file: IO[bytes], kind: str) -> bool:
    """Read a file to its end, and say whether the numbers in it, of a storage of this class, are all finite.

    Raises BadZipFile for another CRC-32.
    """
    import numpy

    mask = _EXPONENTS.get(kind)
    is_finite = True
    nothing = numpy.zeros(1 << 18, numpy.float32)
    while chunk := file.read(1 << 20):
        if kind == "FloatStorage" and len(chunk) % 4 == 0:
            # 0 times what is not finite is no number; this takes little beside the CRC-32.
            numbers = numpy.frombuffer(chunk, "<f4")
            with numpy.errstate(invalid="ignore"):
                is_finite = is_finite and bool(numpy.dot(numbers, nothing[: len(numbers)]) == 0)
        elif mask is not None:
            bits = numpy.frombuffer(chunk[: len(chunk) // 8 * 8], f"<u{mask[0]}")
            is_finite = is_finite and not bool(((bits & mask[1]) == mask[1]).any())
    return is_finite


_NO_POLICY = ("optimizer.pt", "scheduler.pt")
_NOT_FINITE = "it holds weights that are not finite"
_KINDS = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}
_EXPONENTS = {
    "HalfStorage": (2, 0x7C00),
    "BFloat16Storage": (2, 0x7F80),
    "FloatStorage": (4, 0x7F800000),
    "DoubleStorage": (8, 0x7FF0000000000000),
}
"""Bytes of a number, and the bits of its exponent, which are all set in one that is not finite (IEEE 754)."""


def _damage_of_adapter(path: Path) -> str | None:
    """Why the files of the adapter beside a policy.pt are not those that were saved with it."""
    try:
        adapter = checkpoints.adapter_of(path)
    except ArchiveError:  # an optimizer.pt or the like, which has none
        return None
    for name, digest in adapter.sha256.items() if adapter else ():
        try:
            with files.open_to_read(path.parent / name) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"its adapter's {name} is not beside it ({error.strerror})"
        if found != digest:
            return f"the {name} beside it is not the one that was saved with it"
    if adapter and not _is_finite_adapter(adapter.folder / checkpoints.ADAPTER_FILES[0]):
        return _NOT_FINITE
    return None


def _is_finite_adapter(path: Path) -> bool:
    kinds = {kind for _, kind in checkpoints.safetensors_entries(path).values()}
    with files.open_to_read(path) as file:
        file.seek(8 + struct.unpack("<Q", file.read(8))[0])
        return _are_finite(file, _KINDS.get(kinds.pop(), "") if len(kinds) == 1 else "")


def require_whole(path: Path) -> None:
    """Raise ArchiveError for a checkpoint that is not as it was written, or whose adapter is on one that is not."""
    try:
        _require_whole(path)
    except OSError as error:
        raise ArchiveError(f"{path} cannot be read: {error.strerror}.", "Look at its disk.") from error


def _require_whole(path: Path) -> None:
    if found := damage(path):
        hint = "Take another checkpoint, or train it again."
        if "beside it" in found:
            hint = f"Copy {' and '.join(checkpoints.ADAPTER_FILES)} together with it, or take another checkpoint."
        raise ArchiveError(f"{path}: {found}.", hint)
    adapter = checkpoints.adapter_of(path)
    if adapter and adapter.on:
        found = damage(adapter.on)
        if not found and checkpoints.fingerprint(adapter.on) != adapter.on_fingerprint:
            found = "it holds others than the adapter was trained on"
        if found:
            raise ArchiveError(
                f"{adapter.on}, whose weights are below the adapter of {path}: {found}.", "Put back what was there."
            )


def _require_sound_directory(file: BinaryIO, members: Sequence[zipfile.ZipInfo]) -> None:
    """Raise BadZipFile where the archive's directory contradicts itself: zipfile overlooks what torch.load does not."""
    file.seek(-_END.size, 2)
    end_at = file.tell()
    signature, disk, first_disk, here, count, size, offset, comment = _END.unpack(file.read())
    sound = signature == b"PK\5\6" and (disk, first_disk, comment) == (0, 0, 0) and here == count
    directory_end = end_at
    file.seek(max(end_at - _LOCATOR_64.size, 0))
    if (locator := file.read(_LOCATOR_64.size)).startswith(b"PK\6\7"):  # the fields of 32 bits say nothing then
        directory_end = end_at - _LOCATOR_64.size - _END_64.size
        file.seek(max(directory_end, 0))
        end_64 = _END_64.unpack(file.read(_END_64.size))
        sound = sound and _LOCATOR_64.unpack(locator)[1:] == (0, directory_end, 1)
        sound = sound and (end_64[0], end_64[1], *end_64[4:6]) == (b"PK\6\6", _END_64.size - 12, 0, 0)
        sound = sound and all(
            small in (large, most)
            for small, large, most in zip(
                (here, count, size, offset), end_64[6:], (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), strict=True
            )
        )
        here, count, size, offset = end_64[6:]
    # Members that share bytes could take any time to read.
    sound = sound and sum(m.compress_size for m in members) <= offset
    sound = sound and here == count == len({m.filename for m in members}) and offset + size == directory_end
    if not sound:
        raise zipfile.BadZipFile("its directory contradicts itself")
    file.seek(offset)
    directory = file.read(size)
    walked = 0
    for _ in members:
        walked += _ENTRY_SIZE + sum(_LENGTHS.unpack_from(directory, walked + _LENGTHS_AT)) if walked < size else 0
    plain = all(m.compress_size == m.file_size and not (m.comment or m.volume or m.external_attr) for m in members)
    if not (plain and walked == size) or any(m.flag_bits & ~_FLAGS for m in members):
        raise zipfile.BadZipFile("its directory contradicts itself")

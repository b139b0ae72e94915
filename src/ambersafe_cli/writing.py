"""Files that are made for people to look at: written whole or not at all, and never over one that is not ours."""

import contextlib
import os
from pathlib import Path

from ambersafe_cli import files
from ambersafe_cli.errors import RunFolderError, UsageError

_HEAD = 4096
"""Bytes of a file in which the mark has to be."""


def write(path: Path, data: bytes, mark: str) -> None:
    """Write a file, in place of an earlier one that holds `mark` near its beginning.

    Raises UsageError if there is something else in its place, RunFolderError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        if path.is_dir() or (path.exists() and mark.encode() not in _head(path)):
            raise UsageError(
                f"{path} is there, and was not made by ambersafe.", "Move it away, or name another file with --out."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(files.create(temporary), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RunFolderError(f"Cannot write {path}: {error.strerror}", "Name another place with --out.") from error


def _head(path: Path) -> bytes:
    with files.open_to_read(path) as file:
        return file.read(_HEAD)

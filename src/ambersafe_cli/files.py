"""Files in folders that others may have filled: written under another name first, so that they are whole or not there.

No link that lies there is followed to write, and what is read is a file of a size that fits its purpose: not a pipe, at
which reading waits for ever.
"""

import contextlib
import errno
import functools
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ambersafe_cli.errors import RunFolderError, UsageError

LONGEST_LINE = 1 << 20
"""Characters of a line of a log that are looked at at once."""

LARGEST = 1 << 26
"""Bytes of a file of settings, as run.json, that are read."""


def expand(text: str | Path) -> Path:
    """A path with the home folder in place of its `~`. Raises UsageError for a user that there is not, and for a path
    that the system does not look at: its name is too long, or it lies in a folder that may not be looked into."""
    try:
        path = Path(text).expanduser()
        path.exists()
        return path
    except OSError as error:
        raise UsageError(f"{text} cannot be looked at: {error.strerror}.", "Give another path.") from error
    except RuntimeError as error:
        raise UsageError(
            f"{text} begins with the home folder of a user that is not known here.",
            "Give the path in full; a file or folder whose name begins with ~ is written ./~…",
        ) from error


def is_file(path: Path) -> bool:
    """Whether there is such a file; a path that the system does not look at, as its name is too long, is none."""
    return os.path.isfile(path)  # noqa: PTH113, which raises for it


def place_in(folder: Path, name: str) -> Path:
    """A place in a run's folder to write to. Raises RunFolderError for a link there, which whoever made the folder may
    have left, and which may lead anywhere."""
    path = folder / name
    if path.is_symlink():
        raise RunFolderError(f"{path} is a link.", "Delete it, or name another place.")
    return path


def create(path: Path) -> int:
    """Open a new file to write, in place of whatever has its name, and return the descriptor. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def append(path: Path) -> int:
    """Open a file to write at its end, and return the descriptor. Raises OSError, for a link or what is no file too."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    info = os.fstat(handle)
    if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
        os.close(handle)
        raise OSError(errno.EPERM, "it is no file of its own", str(path))
    return handle


def open_to_read(path: Path) -> io.BufferedReader:
    """Open a file to read its bytes. Raises OSError, also for what is no file."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return os.fdopen(handle, "rb")


def read_text(path: Path, largest: int = LARGEST) -> str:
    """Read a file of settings. Raises OSError, also for what is no file or larger than such a file is; ValueError."""
    with open_to_read(path) as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise OSError(errno.EFBIG, "it is too large", str(path))
    return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a log, with their ends as line feeds, and none in whole that is longer than LONGEST_LINE.

    Raises OSError, also for what is no file.
    """
    with io.TextIOWrapper(open_to_read(path), encoding="utf-8", errors="replace") as file:
        yield from iter(functools.partial(file.readline, LONGEST_LINE), "")


def write_json(path: Path, value: Any) -> None:
    """Write an object as JSON, in place of an earlier one. Raises RunFolderError."""
    write_lines(path, [json.dumps(value, indent=2, ensure_ascii=False)])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, each with its line feed, in place of an earlier file. Raises RunFolderError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with os.fdopen(create(temporary), "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RunFolderError(f"Cannot write {path}: {error.strerror}") from error

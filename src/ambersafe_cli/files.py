"""Files of answers: written under another name first, so that they are whole or not there."""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ambersafe_cli.errors import RunFolderError, UsageError


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


def write_json(path: Path, value: Any) -> None:
    """Write an object as JSON, in place of an earlier one. Raises RunFolderError."""
    write_lines(path, [json.dumps(value, indent=2, ensure_ascii=False)])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, each with its line feed, in place of an earlier file. Raises RunFolderError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RunFolderError(f"Cannot write {path}: {error.strerror}") from error

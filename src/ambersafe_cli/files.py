"""Files of answers: written under another name first, so that they are whole or not there."""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ambersafe_cli.errors import RunFolderError


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

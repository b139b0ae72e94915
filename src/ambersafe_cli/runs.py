"""Run folders: where a run lives, and `run.json`, which says what was run and how it ended."""

import datetime
import getpass
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ambersafe_cli.errors import ArchiveError, RunFolderError, UsageError

SCHEMA = 1
"""The version of run.json's layout; see the README. It goes up when a key changes its meaning or goes away."""

Record = dict[str, Any]


def user_name() -> str:
    """The user's name as upstream takes it, or the user's number where a container has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{os.getuid()}"


def folder_of_runs() -> Path:
    """Where the runs of this working folder are, as upstream has it: `.cache/<user>`."""
    return Path.cwd() / ".cache" / user_name()


def now() -> str:
    """The time in UTC, ISO 8601 to the microsecond: in a record it sorts as it reads."""
    return datetime.datetime.now(datetime.UTC).isoformat()


def folder_for(exp_name: str) -> Path:
    """The folder that a run with this exp_name gets if it starts now."""
    return folder_of_runs() / f"{exp_name}_{datetime.datetime.now().astimezone():%Y-%m-%d_%H-%M-%S_%f}"


def make(folder: Path) -> None:
    """Make a run's folder. Raises RunFolderError if that cannot be done, UsageError if it holds something already."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"The run folder {folder} is not empty.", "Give another local_run_dir, or none.")
    except OSError as error:
        raise RunFolderError(
            f"Cannot make the run folder {folder}: {error.strerror}", "Run from a folder that you can write."
        ) from error


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Write run.json, whole or not at all. Raises RunFolderError."""
    temporary = folder / "run.json.new"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"schema": SCHEMA, **record}, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / "run.json")
    except OSError as error:
        raise RunFolderError(f"Cannot write {folder / 'run.json'}: {error.strerror}") from error


def read(folder: Path) -> Record | None:
    """Read a run's record; None if it has none, or one that is not whole or of another schema."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("schema") == SCHEMA else None


def host() -> str:
    return socket.gethostname()


def checkpoint(folder: Path) -> Path:
    """Where a run that came to its end leaves its weights."""
    return folder / "LATEST" / "policy.pt"


def newest_finished_sft(model: str) -> Path:
    """The folder of the newest SFT run of this model that came to its end. Raises ArchiveError if there is none."""
    found = []
    for path in folder_of_runs().glob("*/run.json"):
        record = read(path.parent)
        if record and record.get("stage") == "sft" and record.get("status") == "finished":
            same_model = record.get("model", {}).get("name") == model
            if same_model and checkpoint(path.parent).is_file():
                found.append((str(record.get("started")), path.parent))
    if not found:
        raise ArchiveError(
            f"There is no finished SFT run of {model} under {folder_of_runs()}.",
            "Run `ambersafe sft` first, or name a checkpoint with --archive PATH.",
        )
    return max(found)[1]

"""Run folders: where a run lives, and `run.json`, which says what was run and how it ended."""

import contextlib
import datetime
import difflib
import fcntl
import getpass
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
            file.write(_as_json({"schema": SCHEMA, **record}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / "run.json")
    except OSError as error:
        raise RunFolderError(f"Cannot write {folder / 'run.json'}: {error.strerror}") from error


def _as_json(record: Mapping[str, Any]) -> str:
    """Texts as they stand, or escaped if one is no UTF-8, as the name of a folder may be."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(record, indent=2)
    return text


# What the other modules rely on; the keys of the first line are in every record.
_KINDS: dict[str, type] = {
    "stage": str, "status": str, "started": str, "model": dict,
    "ended": str, "data": dict, "upstream": dict, "recipe": dict, "values": dict, "environment": dict,
    "command": list, "next_command": list, "overrides": list, "attempts": list, "last_metrics": dict,
}  # fmt: skip
_REQUIRED = ("stage", "status", "started", "model")


def read(folder: Path) -> Record | None:
    """Read a run's record; None if it has none, or one that is not whole, of another schema, or no record of ours."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        return None
    is_ours = all(record.get(key) is None or isinstance(record[key], kind) for key, kind in _KINDS.items())
    is_ours = is_ours and all(record.get(key) is not None for key in _REQUIRED)
    return record if is_ours and all(isinstance(each, dict) for each in record.get("attempts") or ()) else None


def host() -> str:
    return socket.gethostname()


def checkpoint(folder: Path) -> Path:
    """Where a run that came to its end leaves its weights."""
    return folder / "LATEST" / "policy.pt"


def ask_to_stop(folder: Path) -> None:
    """Leave a word for the process that has the run, on whatever machine it is. Raises RunFolderError."""
    try:
        (folder / "stop").touch()
    except OSError as error:
        raise RunFolderError(f"Cannot write {folder / 'stop'}: {error.strerror}") from error


def take_stop_request(folder: Path) -> bool:
    """Whether somebody asked the run to stop since it was last looked for."""
    try:
        (folder / "stop").unlink()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's folder for this process. Raises UsageError if another one has it."""
    deadline = time.monotonic() + 1  # who only asks whether it is running has the lock for a moment
    while True:
        with _folder_lock(folder) as is_ours:
            if is_ours:
                yield
                return
        if time.monotonic() > deadline:
            raise UsageError(f"The run {folder} is still running.", f"Stop it: `ambersafe stop {folder.name}`.")
        time.sleep(0.02)


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[bool]:
    """Try to lock a folder; the lock goes with the process, however it ends. True where there are no locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    except OSError:
        yield True
    finally:
        os.close(handle)


def is_running(folder: Path) -> bool:
    """Whether a process on this machine (or on a shared disk with locks) has the run."""
    with _folder_lock(folder) as is_ours:
        return not is_ours


@dataclass(frozen=True)
class Run:
    """A run's folder and its record; `status` is the record's, or "died" if it says running and no process has it."""

    folder: Path
    record: Record
    status: str


def look(folder: Path) -> Run | None:
    """The run in a folder, with its status of now; None if `read` finds no record there."""
    record = read(folder)
    if record is None:
        return None
    died = record["status"] == "running" and not is_running(folder)
    return Run(folder, record, "died" if died else record["status"])


def list_runs() -> list[Run]:
    """The runs of this working folder, the oldest first."""
    found = [look(path.parent) for path in folder_of_runs().glob("*/run.json")]
    return sorted(filter(None, found), key=lambda run: run.record["started"])


def newest() -> Run:
    """The run of this working folder that was started last. Raises UsageError if there is none."""
    found = list_runs()
    if not found:
        raise UsageError(f"There is no run under {folder_of_runs()}.", "Give the folder of one.")
    return found[-1]


def find(text: str) -> Path:
    """The folder of the run that is meant by a path, or by a name of this working folder's runs or its beginning.

    Raises UsageError, with the names that come near, if there is none such or more than one.
    """
    places = (Path(text).absolute(), folder_of_runs() / text)
    for folder in places:
        if read(folder) is not None:
            return folder
    names = [run.folder.name for run in list_runs()]
    begun = [name for name in names if text and name.startswith(text)]
    if len(begun) == 1:
        return folder_of_runs() / begun[0]
    for folder in places:
        with contextlib.suppress(OSError):  # a name that is too long, or a folder that may not be looked at
            if folder.is_dir() and not begun:
                raise UsageError(f"{folder} is not the folder of a run.", "`ambersafe runs` lists them.")
    near = begun[-3:] or difflib.get_close_matches(text, names, n=3, cutoff=0.3)
    raise UsageError(
        f"{len(begun)} runs begin with {text}." if begun else f"There is no run {text} under {folder_of_runs()}.",
        f"There {'are' if len(near) > 1 else 'is'} {', '.join(near)}." if near else "`ambersafe runs` lists them.",
    )


def steps(folder: Path) -> list[Path]:
    """The step-N checkpoints of a run, the newest first, whole or not."""
    numbered = [(int(path.name[5:]), path) for path in folder.glob("step-*") if path.name[5:].isdecimal()]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_finished_sft(model: str, revision: str | None) -> Path:
    """The folder of the newest SFT run of this model that came to its end. Raises ArchiveError if there is none."""
    found = [
        run.folder
        for run in list_runs()
        if (run.record["stage"], run.status) == ("sft", "finished")
        and (run.record["model"].get("name"), run.record["model"].get("revision")) == (model, revision)
        and checkpoint(run.folder).is_file()
    ]
    if not found:
        raise ArchiveError(
            f"There is no finished SFT run of {model} under {folder_of_runs()}.",
            "Run `ambersafe sft` first, or name a checkpoint with --archive PATH.",
        )
    return found[-1]

"""Run folders: where a run lives, and `run.json`, which says what was run and how it ended."""

import contextlib
import datetime
import errno
import fcntl
import getpass
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambersafe_cli import display, records
from ambersafe_cli.errors import ArchiveError, RunFolderError, UsageError

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
        require_empty(folder)
    except OSError as error:
        raise RunFolderError(
            f"Cannot make the run folder {folder}: {error.strerror}", "Run from a folder that you can write."
        ) from error


def require_empty(folder: Path) -> None:
    """Raise UsageError if a run's folder holds something."""
    if any(folder.iterdir()):
        raise UsageError(f"The run folder {folder} is not empty.", "Give another local_run_dir, or none.")


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Write run.json, whole or not at all. Raises RunFolderError."""
    temporary = folder / "run.json.new"
    try:
        # A path that is not UTF-8 has code points of its own in Python; their escapes are JSON's.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump({"schema": records.SCHEMA, **record}, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / "run.json")
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RunFolderError(f"Cannot write {folder / 'run.json'}: {error.strerror}") from error


def read(folder: Path) -> Record | None:
    """Read a run's record; None if it has none.

    Raises RunFolderError for one that cannot be read, is not whole or is of another schema: it is the user's to mend.
    """
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        wrong = records.problem(record)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        wrong = f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        wrong = f"is cut off, or not JSON: {error}"
    if wrong:
        raise RunFolderError(
            f"{path} {wrong}.",
            "It is left as it is. What the run has saved lies beside it; put a good run.json there to go on with it.",
        )
    return dict(record)


def read_or_warn(folder: Path) -> Record | None:
    """The same, where a damaged record is said and then passed over."""
    try:
        return read(folder)
    except RunFolderError as error:
        display.warn(f"{error.message} The run is passed over.")
        return None


def host() -> str:
    return socket.gethostname()


def checkpoint(folder: Path) -> Path:
    """Where a run that came to its end leaves its weights."""
    return folder / "LATEST" / "policy.pt"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's folder for this process. Raises UsageError if another one has it."""
    with _folder_lock(folder) as is_ours:
        if not is_ours:
            raise UsageError(f"The run {folder} is still running.", "Stop it: `ambersafe stop RUN`.")
        yield


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


def list_runs() -> list[Run]:
    """The runs of this working folder, the oldest first. A run whose record is damaged is said, and not among them."""
    found = []
    for path in folder_of_runs().glob("*/run.json"):
        if record := read_or_warn(path.parent):
            died = record["status"] == "running" and not is_running(path.parent)
            found.append(Run(path.parent, record, "died" if died else record["status"]))
    return sorted(found, key=lambda run: run.record["started"])


def newest_finished_sft(model: str, revision: str | None) -> Path:
    """The folder of the newest SFT run of this model that came to its end. Raises ArchiveError if there is none."""
    found = [
        run.folder
        for run in list_runs()
        if (run.record["stage"], run.status) == ("sft", "finished")
        and (run.record["model"]["name"], run.record["model"]["revision"]) == (model, revision)
        and checkpoint(run.folder).is_file()
    ]
    if not found:
        raise ArchiveError(
            f"There is no finished SFT run of {model} under {folder_of_runs()}.",
            "Run `ambersafe sft` first, or name a checkpoint with --archive PATH.",
        )
    return found[-1]

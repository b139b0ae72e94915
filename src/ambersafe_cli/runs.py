"""Run folders: where a run lives, and `run.json`, which says what was run and how it ended."""

import contextlib
import datetime
import difflib
import errno
import getpass
import json
import math
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambersafe_cli import by_hand as handmade
from ambersafe_cli import display, files, locks, records, sharing
from ambersafe_cli.errors import ArchiveError, RunFolderError, UsageError
from ambersafe_cli.overrides import parse_overrides

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


def seconds(moment: object) -> float | None:
    """A time of a record in seconds since 1970; None for what is none."""
    try:
        return datetime.datetime.fromisoformat(str(moment)).timestamp()
    except (ValueError, OverflowError):
        return None


def folder_for(exp_name: str) -> Path:
    """The folder that a run with this exp_name gets if it starts now."""
    return folder_of_runs() / f"{exp_name}_{datetime.datetime.now().astimezone():%Y-%m-%d_%H-%M-%S_%f}"


def make(folder: Path) -> None:
    """Make a run's folder. Raises RunFolderError if that cannot be done, UsageError if it holds something already."""
    try:
        sharing.share_cache(folder)
        sharing.require_no_link_of_others(folder)
        folder.mkdir(parents=True, exist_ok=True)
        require_empty(folder)
    except OSError as error:
        raise RunFolderError(
            f"Cannot make the run folder {folder}: {error.strerror}", "Run from a folder that you can write."
        ) from error


def require_empty(folder: Path) -> None:
    """Raise UsageError if a run's folder holds something."""
    if any(path.name != locks.FILE for path in folder.iterdir()):
        raise UsageError(f"The run folder {folder} is not empty.", "Give another local_run_dir, or none.")


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Write run.json, whole or not at all. Raises RunFolderError."""
    # A name of its own: where the disk has no locks, another process may be writing its record too.
    temporary = folder / f"run.json.{secrets.token_hex(4)}.new"
    try:
        # A path that is not UTF-8 has code points of its own in Python; their escapes are JSON's.
        with os.fdopen(files.create(temporary), "w", encoding="utf-8", errors="backslashreplace") as file:
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
        record = records.parse(files.read_text(path))
        wrong = records.problem(record)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # not even a folder
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


def is_running(folder: Path) -> bool:
    """Whether a process has the run: by its lock, or, on another machine that may not see that, by its sign of life."""
    return locks.is_held(folder) or _is_elsewhere(read_or_warn(folder), folder)


def require_not_elsewhere(folder: Path) -> None:
    """Raise UsageError if another machine seems to have the run, whose lock was got: not every disk tells of locks."""
    record = read_or_warn(folder)
    if record and _is_elsewhere(record, folder) and not _is_same_job(record):
        raise UsageError(
            f"The run {folder} is still running on {record['attempts'][-1].get('host')}.",
            f"If that machine is gone, try again in {locks.SIGN_OF_LIFE} s.",
        )


def _is_elsewhere(record: Record | None, folder: Path) -> bool:
    if record is None or record["status"] != "running" or not record["attempts"]:
        return False
    return record["attempts"][-1].get("host") != host() and locks.gave_sign_of_life(folder)


def _is_same_job(record: Record) -> bool:
    """Whether the last attempt was of the Slurm job that this process is of: Slurm ends that before it starts again."""
    job = os.environ.get("SLURM_JOB_ID")
    return job is not None and record["attempts"][-1].get("slurm_job") == job


@dataclass(frozen=True)
class Run:
    """A run's folder and its record; `status` is the record's, or "died" if it says running and no process has it."""

    folder: Path
    record: Record
    status: str

    def setting(self, key: str) -> Any:
        """What a key of upstream's config was in this run: KEY=VALUE, else the recipe's or a flag's; None if unset."""
        values = self.record.get("values")
        found = values.get(key) if isinstance(values, dict) else None
        with contextlib.suppress(UsageError):
            for override in parse_overrides([str(text) for text in self.record.get("overrides") or ()]):
                found = override.value if override.key == key else found
        return found


def look(folder: Path, by_hand: bool = False) -> Run | None:
    """The run in a folder, with its status of now; None if it has no record, or a damaged one, which is said.

    `by_hand`: one that upstream made without us is one too.
    """
    record = read_or_warn(folder)
    if record is None:
        made = handmade.read(folder) if by_hand else None
        return Run(folder, made, handmade.STATUS) if made else None
    died = record["status"] == "running" and not (locks.is_held(folder) or _is_elsewhere(record, folder))
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


def open_run(text: str | None) -> Run:
    """The run that is meant by a path or a name, also one that upstream made by hand; by default the newest.

    Raises UsageError if there is none such, RunFolderError for a run.json that is damaged.
    """
    if text is None:
        return newest()
    made = handmade.read(Path(text).absolute()) or handmade.read(folder_of_runs() / text)
    folder = (Path(text).absolute() if Path(text).exists() else folder_of_runs() / text) if made else find(text)
    found = look(folder, by_hand=True)
    if found is None:
        raise UsageError(f"{folder} is not the folder of a run.", "`ambersafe runs` lists them.")
    return found


def steps(folder: Path, suffix: str = "") -> list[Path]:
    """The checkpoints `step-N` of a run, whole or not, or its folders `step-N<suffix>`, the newest first."""
    found = {path: path.name.removeprefix("step-").removesuffix(suffix) for path in folder.glob(f"step-*{suffix}")}
    return sorted((path for path, n in found.items() if n.isdecimal()), key=lambda path: -int(found[path]))


def best_checkpoint(folder: Path, metric: str) -> tuple[Path, float] | None:
    """Of a run's checkpoints, LATEST among them, the one whose evaluation was best by a metric, and that; or None."""
    values = {}
    for path in (folder / "LATEST", *steps(folder)):
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError, OverflowError):
            value = json.loads(files.read_text(path / "metrics.json")).get(metric)
            if isinstance(value, int | float) and math.isfinite(value):
                values[path] = float(value)
    if not values:
        return None
    best = (min if metric.startswith("loss") else max)(values, key=values.__getitem__)
    return best, values[best]


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

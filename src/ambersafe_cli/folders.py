"""A folder that is there whole or not at all: filled under another name beside its place, then put there at once."""

import contextlib
import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ambersafe_cli.errors import ExportError, UsageError

_NEW, _OLD, _LOCK = "ambersafe-new", "ambersafe-old", "ambersafe-lock"
_NOT_OURS = (".git", "run.json", "config.yaml")
"""What a folder holds, at any depth, that is never replaced: a repository, or a run."""


def require_free(folder: Path, force: bool, needed: tuple[Path, ...] = ()) -> None:
    """Raise UsageError if a folder cannot be filled: it holds something, and that may not be replaced.

    Even with `force` it may not be one that holds a repository, a run, the working folder or what is `needed`.
    """
    if Path.cwd().is_relative_to(folder):
        raise UsageError(f"{folder} is where you work, or above it: it cannot be replaced.", "--out takes another.")
    if not folder.exists() or (folder.is_dir() and not any(_entries(folder))):
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file.", "--out takes a folder.")
    if not force:
        raise UsageError(
            f"{folder} is not empty.", "--force replaces it, once the new one is whole; --out takes another."
        )
    home = os.path.expanduser("~")  # noqa: PTH111, which fails where there is none
    held = next((path for path in (Path(home), *needed) if path.resolve().is_relative_to(folder)), None)
    held = held or next((path for path in folder.rglob("*") if path.name in _NOT_OURS), None)
    if held:
        raise UsageError(f"{folder} holds {held}, which --force does not replace.", "--out takes another folder.")


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise ExportError(f"Cannot read {folder}: {error.strerror}", "--out takes another folder.") from error


@contextlib.contextmanager
def filling(folder: Path, force: bool, needed: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Give an empty folder on the same disk; when the block ends well, that is flushed to the disk and takes the place
    of `folder`, and with `force` of all that it holds. However it ends, `folder` is the old one or the new one.

    What an earlier process left that was killed is cleaned up first. Raises UsageError as `require_free` does, or if
    another process is filling the same folder; ExportError.
    """
    new, old = _beside(folder, _NEW), _beside(folder, _OLD)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _tidy(folder, new, old)
            require_free(folder, force, needed)
            new.mkdir()
            try:
                yield new
                _flush(new)
                require_free(folder, force, needed)  # much may have happened since
                _put(new, folder, old)
            finally:
                _tidy(folder, new, old)
    except OSError as error:
        raise ExportError(
            f"Cannot write {folder}: {error.strerror or error}.", "--out takes a folder that you can write."
        ) from error


def _tidy(folder: Path, new: Path, old: Path) -> None:
    """Take away what is not, or no longer, the folder; if it has just lost its place, it gets that back."""
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left in (new, old):
        if left.exists():
            shutil.rmtree(left)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock for this process, on a file beside the folder that goes with it."""
    path = _beside(folder, _LOCK)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UsageError(f"Another process is writing {folder}.", "Wait for it, or give another --out.") from None
        except OSError:  # a disk without locks
            break
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(handle).st_ino:  # noqa: PTH116, of a handle
                break
        os.close(handle)  # its holder took it away while we opened it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _flush(folder: Path) -> None:
    """Write a folder and its files through to the disk."""
    for place, _, files in os.walk(folder):
        for path in (*(Path(place) / file for file in files), Path(place)):
            _flush_one(path)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(new: Path, folder: Path, old: Path) -> None:
    """Put a folder in the place of another one, which may be there, at once where the disk can do that.

    Where it cannot, as NFS, there is a moment without either; `_tidy` puts the old one back if it ends in that.
    """
    if not folder.exists() or not any(folder.iterdir()):
        new.replace(folder)
    elif not _exchange(new, folder):
        folder.rename(old)
        new.rename(folder)
    _flush_one(folder.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Have two paths change their names at once. False where the system or the disk cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0

"""Who has a run: a lock on a file in its folder, a sign of life there, and a word that asks it to stop."""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ambersafe_cli.errors import RunFolderError, UsageError

FILE = ".lock"
SIGN_OF_LIFE = 120
"""Seconds after which a launcher on another machine counts as gone: it gives a sign every second, and network disks
tell of one with some delay."""

_STOP = "stop"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process; the lock goes with it, however it ends.

    The lock is on a file, not on the folder: only of files does NFS tell other machines. Raises UsageError if another
    process has it, RunFolderError.
    """
    deadline = time.monotonic() + 1  # who only asks whether it is held has it for a moment
    try:
        handle = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise RunFolderError(f"Cannot write {folder / FILE}: {error.strerror}") from error
    try:
        while not _try(handle, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise UsageError(f"The run {folder} is still running.", f"Stop it: `ambersafe stop {folder.name}`.")
            time.sleep(0.02)
        yield
    finally:
        os.close(handle)


def _try(handle: int, kind: int) -> bool:
    """Try to lock an open file. True where there are no locks at all."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def is_held(folder: Path) -> bool:
    """Whether a process has the run, on this machine or on a shared disk that has locks."""
    try:
        handle = os.open(folder / FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return not _try(handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def give_sign_of_life(folder: Path) -> None:
    """Say that the run's launcher is there, for machines that do not see its lock."""
    with contextlib.suppress(OSError):
        os.utime(folder / FILE)


def gave_sign_of_life(folder: Path) -> bool:
    """Whether it did so lately, by the clock of the disk: machines may differ by more than that."""
    try:
        last = (folder / FILE).stat().st_mtime
        return abs(_now_on_disk(folder) - last) < SIGN_OF_LIFE
    except OSError:
        return False


def _now_on_disk(folder: Path) -> float:
    """The time of a file that is written now, in seconds since 1970; our own clock's where none can be written."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=FILE) as file:
            file.write(b"\0")
            file.flush()
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def ask_to_stop(folder: Path) -> None:
    """Leave a word for the process that has the run, on whatever machine it is. Raises RunFolderError."""
    try:
        os.close(os.open(folder / _STOP, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
    except OSError as error:
        raise RunFolderError(f"Cannot write {folder / _STOP}: {error.strerror}") from error


def is_asked_to_stop(folder: Path) -> bool:
    """Whether that word is still there."""
    return (folder / _STOP).exists()


def take_stop_request(folder: Path) -> bool:
    """Whether somebody asked the run to stop since it was last looked for."""
    try:
        (folder / _STOP).unlink()
    except OSError:
        return False
    return True

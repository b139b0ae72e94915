"""The processes that an attempt has started, at whatever depth: found by a mark in their environment, and killed."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

MARK = "AMBERSAFE_RUN"

TO_BE_KILLED = 20.0
"""Seconds that processes get to end of a SIGKILL: one that waits for a disk or a device that has gone never does."""


def end_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Have Linux send a signal to this process when the one that started it has gone, be it by kill -9."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it went before we asked
        os._exit(128 + signal.SIGTERM)


def marked(mark: str) -> list[int]:
    """The processes, this one apart, that have our mark in their environment (Linux; elsewhere none is found)."""
    wanted = os.fsencode(f"{MARK}={mark}")
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def kill_stopped_orphans(folder: Path) -> None:
    """Kill what an earlier attempt at a run has left on this machine, stopped by Ctrl-Z, and its launcher is gone: no
    signal but this one reaches them, and they have a GPU's memory. Only for who has the run's lock."""
    wanted = os.fsencode(f"{MARK}={folder}:")
    for path in Path("/proc").glob("[0-9]*/environ"):
        pid = int(path.parent.name)
        with contextlib.suppress(OSError):
            marks = [each[len(wanted) :] for each in path.read_bytes().split(b"\0") if each.startswith(wanted)]
            is_orphan = any(mark.isdigit() and not Path(f"/proc/{int(mark)}").exists() for mark in marks)
            if is_orphan and (_stat(pid) or [""])[0] == "T":
                os.kill(pid, signal.SIGKILL)


def parent_of(pid: int) -> int | None:
    """The process that started another one; None if that is gone."""
    stat = _stat(pid)
    return int(stat[1]) if stat else None


def _stat(pid: int) -> list[str] | None:
    """What Linux says of a process from its state on, see proc(5); None if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def send(mark: str, number: int, but: int | None = None) -> list[int]:
    """Send a signal to all processes of the child, `but` one, and return those."""
    found = [pid for pid in marked(mark) if pid != but]
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return found


def kill_all(child: "subprocess.Popen[bytes]", mark: str) -> list[int]:
    """Kill what is left of the child, and return what does not die.

    torchrun's workers are in sessions of their own, but all of them, and what they started, have our mark.
    """
    deadline = time.monotonic() + TO_BE_KILLED
    while (left := send(mark, signal.SIGKILL)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if child.poll() is None:  # without /proc: at least the child's own session
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    try:
        child.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return left or [child.pid]
    return left

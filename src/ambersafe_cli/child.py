"""The child process: train.py's output as it comes, its signals, and its end, that leaves nothing behind."""

import contextlib
import functools
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from ambersafe_cli import files, processes
from ambersafe_cli.errors import RunFolderError
from ambersafe_cli.launch import TORCHRUN, Launch

_ENDS_OF_LINES = re.compile(rb"[\r\n]+")


AT_ONCE, ONE_EVENT = 1.0, 2.0
"""Seconds behind a signal within which another one, or the same one again, is not a second wish."""


@dataclass(frozen=True)
class Outcome:
    """How the child ended: its exit status (128 and the signal's number if a signal ended it), the signal that we
    passed on to it, if there was one, and the processes that did not even end of a SIGKILL."""

    exit_status: int
    signal: int | None
    left: tuple[int, ...] = ()


@dataclass(frozen=True)
class Watcher:
    """Who is told what happens while the child runs; none of these may raise, or take long.

    `on_line` gets each line of its output, or state of a progress bar, without its end, and whether it is of stdout; it
    is never called twice at a time. `on_signal` is called when the first signal has been passed on. `is_stop_asked`
    is called every second, and counts as a Ctrl-C when it says so. `is_given_up` is called every second with the
    seconds for which torchrun has had no process that trains, and has all that is left killed when it says so.
    `passes_on`: whether our own standard streams get what the child prints. `aside` is entered when Ctrl-Z stops us and
    the training; `may_pause` says whether it may, and why not.
    """

    on_line: Callable[[str, bool], object]
    on_signal: Callable[[], None]
    is_stop_asked: Callable[[], bool]
    passes_on: bool = True
    is_given_up: Callable[[float], bool] = lambda seconds: False
    aside: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    may_pause: Callable[[], bool] = lambda: True


@dataclass
class _Received:
    """The signals that asked us to stop, in order, and whether one asked for a pause."""

    numbers: list[int] = field(default_factory=list)
    pause: bool = False


def run(launch: Launch, log: Path, watcher: Watcher) -> Outcome:
    """Start the child, pass on what it prints as it comes, keep it in `log` as well, and wait for its end.

    The first Ctrl-C, SIGTERM or SIGHUP is passed on to what trains, which saves a checkpoint and ends; a second one,
    which is no SIGHUP and comes later than AT_ONCE, kills. However the child ends, no process of it is left behind.
    Raises RunFolderError if the log cannot be written.
    """
    mark = f"{launch.run_folder}:{os.getpid()}"
    environment = {**os.environ, **launch.environment, processes.MARK: mark}
    processes.kill_stopped_orphans(launch.run_folder)
    try:
        log_file = os.fdopen(files.append(log), "ab", buffering=0)
    except OSError as error:
        raise RunFolderError(f"Cannot write {log}: {error.strerror}") from error
    with log_file, _signals() as received:
        child = subprocess.Popen(
            launch.argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C of the terminal reaches us alone, and we pass it on
            preexec_fn=functools.partial(_begin, os.getpid(), launch.shields_torchrun),
        )
        assert child.stdout and child.stderr  # noqa: S101, for mypy: both are pipes
        write_log = _line_writer(log_file, watcher.on_line)
        pumps = [
            threading.Thread(
                target=_pump,
                args=(
                    source,
                    target if watcher.passes_on else None,
                    functools.partial(write_log, target is sys.stdout),
                ),
                daemon=True,
            )
            for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr))
        ]
        for pump in pumps:
            pump.start()
        try:
            _wait(child, received, mark, watcher)
        finally:
            left = processes.kill_all(child, mark)
        for pump in pumps:
            pump.join(timeout=5)
    status = -signal.SIGKILL if child.returncode is None else child.returncode
    first = received.numbers[0] if received.numbers else None
    return Outcome(status if status >= 0 else 128 - status, first, tuple(left))


def _begin(parent: int, shield: bool) -> None:
    """Called in the child before it becomes torchrun or train.py."""
    # A scheduler may send these to all processes, and who does not know them dies: they are for us, who pass them on.
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    if shield:
        # torchrun would kill its processes at them. What it starts has them blocked too, and train.py takes SIGTERM.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
    processes.end_with_parent(parent, signal.SIGINT if shield else signal.SIGTERM)


@contextlib.contextmanager
def _signals() -> Iterator[_Received]:
    """Collect the signals that ask us to stop, instead of dying of them. One that is ignored (nohup) stays so.

    What one event sends twice counts once: of a terminal that is closed shell and kernel both tell, and a scheduler
    may send its signal to a job and to each of its processes.
    """
    received = _Received()
    last = 0.0

    def collect(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        before = received.numbers
        is_again = before and now - last < (ONE_EVENT if number == before[-1] else AT_ONCE)
        if is_again or (before and number == signal.SIGHUP):
            return
        before.append(number)
        last = now

    def pause(number: int, frame: FrameType | None) -> None:
        received.pause = True

    # SIGQUIT is Ctrl-\; the last two are what schedulers can be told to send before they end a job.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
    old = {number: signal.getsignal(number) for number in (*numbers, signal.SIGTSTP, signal.SIGTTOU)}
    for number, handler in old.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, pause if number == signal.SIGTSTP else collect)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # in the background, of a terminal that stops who writes: we write
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _wait(child: "subprocess.Popen[bytes]", received: _Received, mark: str, watcher: Watcher) -> None:
    """Wait for the child; pass the first signal on, and after a second one leave it to be killed.

    There is no time limit in between: a checkpoint of tens of gigabytes is being saved, and who must have it quicker,
    a user or a scheduler, sends another signal.
    """
    told: set[int] | None = None
    asked_at = trained_at = time.monotonic()
    numbers = received.numbers
    while child.poll() is None and len(numbers) < 2:
        if received.pause:
            received.pause = False
            # torchrun has nothing to stop, and if we are killed meanwhile it kills what it has started.
            _pause(mark, child.pid if _is_torchrun(child) else None, watcher)
        if time.monotonic() - asked_at > 1:
            asked_at = time.monotonic()
            if watcher.is_stop_asked():
                # Not a SIGTERM: after that a Slurm job is queued again, and this is somebody's wish. If a scheduler's
                # signal came first, the checkpoint is being saved already.
                is_first = not numbers or numbers[0] == signal.SIGINT
                numbers[:] = [*numbers, signal.SIGINT] if is_first else [signal.SIGINT]
            workers = _workers(child, mark) if _is_torchrun(child) else {child.pid}
            if workers:
                trained_at = asked_at
            if watcher.is_given_up(asked_at - trained_at):
                return
            if told and workers and not workers & told:
                return  # they were killed by what they were told, not having begun to train, and are started again
        if numbers and told is None:
            told = _pass_on(child, mark, numbers[0], watcher.on_signal)
        time.sleep(0.05)


def _pause(mark: str, torchrun: int | None, watcher: Watcher) -> None:
    """Stop the training and this process, as Ctrl-Z asks; what has us go on (`fg`, `bg`) has the training go on.

    Going on alone it would stand still as soon as what it prints fills the pipe to us.
    """
    with watcher.aside():
        if not watcher.may_pause():
            return
        processes.send(mark, signal.SIGSTOP, but=torchrun)
        ours = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        # Not SIGSTOP: where no shell could have us go on, Linux passes this one over.
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, ours)
        processes.send(mark, signal.SIGCONT, but=torchrun)


def _is_torchrun(child: "subprocess.Popen[bytes]") -> bool:
    return TORCHRUN in child.args  # type: ignore[operator]


def _workers(child: "subprocess.Popen[bytes]", mark: str) -> set[int]:
    """The processes that torchrun has started."""
    return {pid for pid in processes.marked(mark) if processes.parent_of(pid) == child.pid}


def _pass_on(child: "subprocess.Popen[bytes]", mark: str, number: int, on_signal: Callable[[], None]) -> set[int]:
    """Send a signal to the processes that train, and return those: torchrun itself would only kill them."""
    number = number if number == signal.SIGINT else signal.SIGTERM
    told = (_workers(child, mark) if _is_torchrun(child) else set()) or {child.pid}
    if told == {child.pid} and _is_torchrun(child):
        number = signal.SIGINT  # it has started none yet, and may be kept from SIGTERM
    for pid in told:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    on_signal()
    return told


def _line_writer(log: io.FileIO, on_line: Callable[[str, bool], object]) -> Callable[[bool, bytes], None]:
    """Return a function that the two pumps share: it appends to the log, which has no buffer, for who reads along, and
    tells of every line."""
    lock = threading.Lock()

    def write(is_stdout: bool, data: bytes) -> None:
        with lock:
            with contextlib.suppress(OSError, ValueError):  # a full disk must not stop the pump, or the child hangs
                rest = data
                while rest:
                    rest = rest[log.write(rest) :]
            for line in _ENDS_OF_LINES.split(data):
                if line:
                    on_line(line.decode(errors="replace"), is_stdout)

    return write


def _pump(source: IO[bytes], target: IO[str] | None, write_log: Callable[[bytes], None]) -> None:
    """Pass bytes on as they come; into the log, which two streams share, only whole lines, or states of a bar.

    Whatever happens to the target, the source is read to its end: a child that cannot write would wait for ever.
    """
    rest, is_cut = b"", False
    shown = target is not None
    while data := os.read(source.fileno(), 65536):
        shown = shown and _show(target, data)
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if end:
            write_log(rest + data[:end])
            rest, is_cut = b"", False
        rest += data[end:]
        if len(rest) > files.LONGEST_LINE:  # in pieces, or each further one would cost as much as all before
            write_log(rest)
            rest, is_cut = b"", True
    if rest or is_cut:
        write_log(rest + b"\n")
        if shown:
            _show(target, b"\n")  # what we say next begins a line of its own


def _show(target: IO[str] | None, data: bytes) -> bool:
    """Write to a standard stream; False if it is gone, which is no reason for the training to stop."""
    try:
        target.buffer.write(data)  # type: ignore[union-attr]
        target.flush()  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        return False
    return True

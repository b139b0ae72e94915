"""The child process: the command that runs train.py, and running it with its output, its signals and its end."""

import contextlib
import ctypes
import functools
import io
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING

from ambersafe_cli.environment import TrainingEnvironment
from ambersafe_cli.errors import RunFolderError, UsageError
from ambersafe_cli.overrides import assign
from ambersafe_cli.recipe import Stage
from ambersafe_cli.runs import user_name

if TYPE_CHECKING:
    from ambersafe_cli.upstream import CloneState

_MARK = "AMBERSAFE_RUN"
TORCHRUN_PATCH = "Join the process group that torchrun made"


@dataclass(frozen=True)
class Launch:
    """A command that is ready to start: its run's folder, the clone whose train.py it runs, its arguments, what it adds
    to the environment, and how many processes it will train in.

    `notes` say what was changed to suit the machine or the clone.
    """

    run_folder: Path
    clone: Path
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    processes: int
    notes: tuple[str, ...]

    def as_shell(self) -> str:
        """The same as one line for a shell."""
        settings = " ".join(f"{key}={shlex.quote(value)}" for key, value in self.environment.items())
        return f"mkdir -p {shlex.quote(str(self.run_folder))} && {settings} {shlex.join(self.argv)}"


def plan(
    stage: Stage, clone: "CloneState", environment: TrainingEnvironment, run_folder: Path, processes: int | None
) -> tuple[Stage, Launch]:
    """Fit a stage to the clone and the machine, and write its command. Raises UsageError for what cannot be had."""
    notes: list[str] = []
    can_torchrun = any(p.patch.subject == TORCHRUN_PATCH and p.state != "missing" for p in clone.patches)
    if processes is not None and not can_torchrun:
        raise UsageError(
            "--nproc needs the patch that lets train.py join torchrun's processes.", "Apply it: `ambersafe setup`."
        )
    if processes is not None and environment.gpus and processes > len(environment.gpus):
        raise UsageError(f"--nproc {processes} needs as many GPUs, and there are {len(environment.gpus)}.")
    if processes is None and "FSDP" in stage.trainer:
        processes = len(environment.gpus)
        if not processes:
            notes.append("FSDPTrainer needs GPUs and there is none here: BasicTrainer, on the CPU.")
            stage = stage.with_values({"trainer": "BasicTrainer"})
    elif processes is not None and "FSDP" not in stage.trainer:
        if "trainer" in stage.explicit or any(o.key == "trainer" for o in stage.overrides):
            raise UsageError(f"--nproc needs FSDPTrainer: {stage.trainer} trains in one process.")
        notes.append(f"--nproc: FSDPTrainer in place of the recipe's {stage.trainer}.")
        stage = stage.with_values({"trainer": "FSDPTrainer"})
    if stage.get("model.fsdp_policy_mp") and "FSDP" not in stage.trainer:
        raise UsageError(
            f"--bf16 needs FSDPTrainer: {stage.trainer} has no mixed precision.",
            "--nproc 1 runs FSDPTrainer in one process, on one GPU or on the CPU.",
        )

    unknown = [k for p in clone.patches if p.state == "missing" for k in p.patch.config_keys if k in stage.values]
    for key in unknown:
        if key in stage.explicit:
            raise UsageError(f"{key} comes with a patch that {clone.folder} lacks.", "Apply it: `ambersafe setup`.")
        notes.append(f"{key} is left away: the patch that adds it is not in {clone.folder}.")
    stage = stage.without(unknown)

    # -P: or a file in the working folder that is called like a module is taken for it.
    version = tuple(int(part) for part in environment.python_version.split(".")[:2])
    torchrun = [
        *(["-P"] if version >= (3, 11) else []),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    argv = [environment.python, *(torchrun if can_torchrun and "FSDP" in stage.trainer else []), str(clone.train_py)]
    argv += [assign(key, value) for key, value in stage.values.items()]
    argv += [assign("local_run_dir", str(run_folder)), assign("hydra.run.dir", str(run_folder / "hydra"))]
    argv += [override.text for override in stage.overrides if override.key != "local_run_dir"]
    settings = {"SAFERLHF_DATASET": stage.data, "SAFERLHF_REVISION": stage.data_revision or "", "PYTHONUNBUFFERED": "1"}
    if user_name().startswith("uid-"):
        settings["LOGNAME"] = user_name()  # upstream's getpass.getuser() would raise KeyError
    return stage, Launch(run_folder, clone.folder, tuple(argv), settings, processes or 1, tuple(notes))


@dataclass(frozen=True)
class Outcome:
    """How the child ended: its exit status (128 and the signal's number if a signal ended it or us)."""

    exit_status: int
    interrupted: bool


def run(launch: Launch, log: Path, on_signal: Callable[[], None], is_stop_asked: Callable[[], bool]) -> Outcome:
    """Start the child, pass on what it prints as it comes, keep it in `log` as well, and wait for its end.

    The first Ctrl-C, SIGTERM or SIGHUP is passed on to what trains, which saves a checkpoint and ends, and `on_signal`
    is called; the second one kills. `is_stop_asked`, which is called every second, counts as a SIGTERM when it says so.
    However the child ends, no process of it is left behind.
    Raises RunFolderError if the log cannot be written.
    """
    mark = f"{launch.run_folder}:{os.getpid()}"
    environment = {**os.environ, **launch.environment, _MARK: mark}
    try:
        log_file = log.open("ab", buffering=0)
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
            preexec_fn=functools.partial(_end_with_parent, os.getpid()),
        )
        assert child.stdout and child.stderr  # noqa: S101, for mypy: both are pipes
        write_log = _line_writer(log_file)
        pumps = [
            threading.Thread(target=_pump, args=(source, target, write_log), daemon=True)
            for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr))
        ]
        for pump in pumps:
            pump.start()
        try:
            _wait(child, received, lambda: _pass_on(child, mark, received[0], on_signal), is_stop_asked)
        finally:
            _kill_all(child, mark)
        for pump in pumps:
            pump.join(timeout=5)
    status = child.returncode
    if received and status != 0:  # else it came to its end all the same
        return Outcome(128 + received[0], interrupted=True)
    return Outcome(status if status >= 0 else 128 - status, interrupted=False)


def _end_with_parent(parent: int) -> None:
    """Have Linux send SIGTERM to this process when the one that started it has gone, be it by kill -9."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it went before we asked
        os._exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that ask us to stop, instead of dying of them. One that is ignored (nohup) stays so."""
    received: list[int] = []

    def collect(number: int, frame: FrameType | None) -> None:
        received.append(number)

    # SIGQUIT is Ctrl-\; the last two are what schedulers can be told to send before they end a job.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
    old = {number: signal.getsignal(number) for number in numbers}
    for number, handler in old.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, collect)
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _wait(
    child: "subprocess.Popen[bytes]",
    received: list[int],
    pass_on: Callable[[], None],
    is_stop_asked: Callable[[], bool],
) -> None:
    """Wait for the child; pass the first signal on, and after a second one leave it to be killed.

    There is no time limit in between: a checkpoint of tens of gigabytes is being saved, and who must have it quicker,
    a user or a scheduler, sends another signal.
    """
    was_passed_on = False
    asked_at = time.monotonic()
    while child.poll() is None and len(received) < 2:
        if time.monotonic() - asked_at > 1:
            asked_at = time.monotonic()
            received += [signal.SIGTERM] if is_stop_asked() else []
        if received and not was_passed_on:
            pass_on()
            was_passed_on = True
        time.sleep(0.05)


def _pass_on(child: "subprocess.Popen[bytes]", mark: str, number: int, on_signal: Callable[[], None]) -> None:
    """Send a signal to the processes that train: torchrun itself would only kill them."""
    number = number if number == signal.SIGINT else signal.SIGTERM
    workers = [pid for pid in _marked(mark) if _parent(pid) == child.pid]
    is_torchrun = "torch.distributed.run" in child.args  # type: ignore[operator]
    for pid in workers if is_torchrun and workers else [child.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    on_signal()


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _kill_all(child: "subprocess.Popen[bytes]", mark: str) -> None:
    """Kill what is left of the child. torchrun's workers are in sessions of their own, but all of them, and what they
    started in turn, have our mark in their environment."""
    deadline = time.monotonic() + 20  # a process that waits for a dead file system cannot be killed
    while (left := _marked(mark)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    if child.poll() is None:  # without /proc: at least the child's own session
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _marked(mark: str) -> list[int]:
    """The processes, this one apart, that have our mark in their environment (Linux; elsewhere none is found)."""
    wanted = os.fsencode(f"{_MARK}={mark}")
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def _line_writer(log: io.FileIO) -> Callable[[bytes], None]:
    """Return a function that the two pumps share: it appends to the log, which has no buffer, for who reads along."""
    lock = threading.Lock()

    def write(data: bytes) -> None:
        with lock, contextlib.suppress(OSError, ValueError):  # a full disk must not stop the pump, or the child hangs
            while data:
                data = data[log.write(data) :]

    return write


def _pump(source: IO[bytes], target: IO[str] | None, write_log: Callable[[bytes], None]) -> None:
    """Pass bytes on as they come; into the log, which two streams share, only whole lines, or states of a bar.

    Whatever happens to the target, the source is read to its end: a child that cannot write would wait for ever.
    """
    rest = b""
    shown = True
    while data := os.read(source.fileno(), 65536):
        shown = shown and _show(target, data)
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if end:
            write_log(rest + data[:end])
            rest = b""
        rest += data[end:]
    if rest:
        write_log(rest + b"\n")
        _show(target, b"\n")  # what we say next begins a line of its own


def _show(target: IO[str] | None, data: bytes) -> bool:
    """Write to a standard stream; False if it is gone, which is no reason for the training to stop."""
    try:
        target.buffer.write(data)  # type: ignore[union-attr]
        target.flush()  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        return False
    return True

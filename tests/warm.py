"""An interpreter that has imported torch and transformers already, for tests: most of their time is those imports.

`make` writes a program that takes the place of a Python as `--python` or AMBERSAFE_PYTHON. What it is to run is run by
a fork of a server: the same script, arguments, environment, working folder, streams and limits, signals passed on, and
the same exit status; but in a session of its own, where no SIGSTOP reaches it, and with the server's hash seed. Where
it could not be alike (code in `-c`, another environment at the imports) the program becomes a real interpreter. Tests
that are marked `cold`, about processes, signals, memory or imports, do without, and with AMBERSAFE_COLD=1 all do.

A server is started by the first who needs one with its environment, as far as libraries read that when they are
imported, and ends with the process that `make` names.
"""

import array
import atexit
import contextlib
import io
import json
import os
import resource
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

# Read when the libraries are imported, so that a server holds for one set of them; and what asking.ask adds to them.
_AT_IMPORT = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "PYTORCH_", "OMP_", "MKL_", "WANDB_",
              "TOKENIZERS_", "XDG_", "LD_", "MALLOC_", "HOME", "LANG", "LC_", "TZ", "PYTHON")  # fmt: skip
_OF_QUESTIONS = {
    **{f"{library}_VERBOSITY": "error" for library in ("HF_HUB", "DATASETS", "TRANSFORMERS")},
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
_EACH_CALLS_OWN = ("PYTHONUNBUFFERED", "PYTHONSAFEPATH")
_SCRIPTS = str(Path(__file__).resolve().parent.parent / "scripts")  # gpu-check's, which shadows none of the modules
_MODULES = ("torch", "torch.distributed.run", "transformers", "datasets", "hydra", "omegaconf", "numpy", "tqdm", "peft")
_CLASSES = ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig", "LlamaForCausalLM", "PreTrainedTokenizerFast",
            "GPT2LMHeadModel", "GenerationConfig")  # fmt: skip
_LIMITS = (resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)
_SIGNALS = [number for number in signal.Signals if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD)]
_OF_A_FAULT = {signal.Signals[f"SIG{name}"] for name in ("SEGV", "BUS", "FPE", "ILL", "ABRT", "TRAP", "SYS")}


def make(folder: Path, owner: int) -> Path:
    """Write the program, which is a Python to whoever calls it; its servers end with the process `owner`."""
    folder.mkdir()
    path = folder / "python"
    (folder / "owner").write_text(json.dumps([_read_at_import(), _hard_limits()]))
    here = [str(Path(__file__).resolve()), sys.executable, str(folder), str(owner)]
    lines = (
        f"#!{sys.executable} -IS",
        "import runpy, sys",
        f"sys.argv[:1] = {here!r}",
        f"runpy.run_path({here[0]!r}, run_name='__main__')",
    )
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
    return path


# --- what is called ---


def _call(python: str, folder: Path, owner: int, words: list[str]) -> int:
    plan, server = _plan(words), _server(folder)
    if plan is None or server is None:
        os.execv(python, [python, *words])  # noqa: S606
    place = folder / f"{server}.socket"
    for _ in range(3):
        connection = _connect(python, place, owner)
        with connection:
            found = _follow(connection, plan)
        if found is not None:
            return found
    raise SystemExit("warm.py: no server answers")


def _read_at_import() -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name.startswith(_AT_IMPORT)}
    if found.get("PYTHONPATH") == _SCRIPTS:
        del found["PYTHONPATH"]
    return {name: value for name, value in found.items() if name not in _EACH_CALLS_OWN}


def _hard_limits() -> list[int]:
    return [resource.getrlimit(limit)[1] for limit in _LIMITS]


def _server(folder: Path) -> str | None:
    """The name of the server that has imported with this environment; None if there is to be none."""
    own, limits = json.loads((folder / "owner").read_text())
    found = _read_at_import()
    if os.environ.get("AMBERSAFE_COLD") == "1" or _hard_limits() != limits:  # a server that has less has no way back
        return None
    return "training" if found == own else "questions" if found == own | _OF_QUESTIONS else None


def _plan(words: list[str]) -> dict[str, Any] | None:
    """What a fork is to run; None for what only a Python of its own does alike."""
    rest = list(words)
    safe = bool(os.environ.get("PYTHONSAFEPATH"))
    while rest and rest[0] in ("-u", "-P"):
        safe |= rest.pop(0) == "-P"
    if rest[:2] == ["-m", "torch.distributed.run"]:
        return {"module": rest[1], "argv": rest[1:], "safe": safe}
    if rest and rest[0].endswith(".py") and Path(rest[0]).is_file():
        return {"script": rest[0], "argv": rest, "safe": safe}
    return None


def _connect(python: str, place: Path, owner: int) -> socket.socket:
    deadline = time.monotonic() + 180
    with contextlib.suppress(FileExistsError):
        _start_server(python, place, owner)
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(place))
            return connection
        except OSError:
            connection.close()
            if time.monotonic() > deadline:
                raise SystemExit(f"warm.py: no server at {place}: {Path(f'{place}.log').read_text()[-2000:]}") from None
            time.sleep(0.05)


def _start_server(python: str, place: Path, owner: int) -> None:
    """Raises FileExistsError if somebody has begun that."""
    with Path(f"{place}.log").open("xb") as log:
        subprocess.Popen(
            [python, "-P", __file__, "--serve", str(place), str(owner)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
            env={name: text for name, text in os.environ.items() if not name.startswith("AMBERSAFE_")},  # no run's mark
            preexec_fn=_begin_anew,
        )


def _begin_anew() -> None:
    """A server must not have the limits and the signals of whoever needs it first."""
    for limit in _LIMITS:
        most = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (most, most))
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    for number in _SIGNALS:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)


def _follow(connection: socket.socket, plan: dict[str, Any]) -> int | None:
    """Hand our streams over, pass signals on until the end, and end alike; None if the server was gone."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    ignored = [
        int(n) for n in _SIGNALS if signal.getsignal(n) == signal.SIG_IGN and n not in (signal.SIGPIPE, signal.SIGXFSZ)
    ]
    asked = {
        **plan,
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "mask": sorted(map(int, mask)),
        "ignored": ignored,
        "limits": [resource.getrlimit(limit) for limit in _LIMITS],
        "executable": _OURSELVES,
    }
    umask = os.umask(0)
    os.umask(umask)
    asked["umask"] = umask
    passed_on = {number for number in _SIGNALS if int(number) not in ignored and number not in _OF_A_FAULT}
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
    data = json.dumps(asked).encode()
    try:
        connection.sendmsg(
            [struct.pack("<Q", len(data))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
        )
        connection.sendall(data)
    except OSError:
        return None
    connection.settimeout(0)
    answer = b""
    while True:
        info = signal.sigtimedwait(passed_on, 0.02)
        if info is not None:
            with contextlib.suppress(OSError):
                connection.setblocking(True)
                connection.sendall(bytes([info.si_signo]))
                connection.setblocking(False)
        try:
            chunk = connection.recv(64)
        except BlockingIOError:
            continue
        except OSError:
            chunk = b""
        if not chunk:
            return 70 if answer else None
        answer += chunk
        if len(answer) >= 4:
            return _end_alike(struct.unpack("<i", answer[:4])[0])


def _end_alike(status: int) -> int:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    return os.waitstatus_to_exitcode(status)


# --- the server ---


def _serve(place: Path, owner: int) -> None:
    import importlib

    for name in _MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    transformers = importlib.import_module("transformers")
    for name in _CLASSES:
        getattr(transformers, name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who look after the calls
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{place}.new")
    listener.listen(64)
    Path(f"{place}.new").rename(place)
    listener.settimeout(1)
    while _is_there(owner):
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            try:
                _look_after(connection)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        connection.close()
    place.unlink()


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _look_after(connection: socket.socket) -> None:
    """Run one call in a fork, pass on what its caller gets of signals, and kill all of it when the caller has gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.settimeout(None)
    head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(12))
    streams = array.array("i")
    streams.frombytes(ancillary[0][2][:12])
    data = b""
    length = struct.unpack("<Q", head)[0]
    while len(data) < length:
        data += connection.recv(length - len(data))
    asked = json.loads(data)
    worker = os.fork()
    if worker == 0:
        try:
            connection.close()
            _become(asked, list(streams))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)
    for stream in streams:
        os.close(stream)
    connection.settimeout(0.02)
    while True:
        found, status = os.waitpid(worker, os.WNOHANG)
        if found:
            connection.settimeout(5)
            connection.sendall(struct.pack("<i", status))
            return
        try:
            numbers = connection.recv(16)
        except TimeoutError:
            continue
        except OSError:
            numbers = b""
        if not numbers:
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
            return
        for number in numbers:
            os.kill(worker, number)


def _become(asked: dict[str, Any], streams: list[int]) -> None:
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in streams:
        if stream > 2:
            os.close(stream)
    os.chdir(asked["folder"])
    os.umask(asked["umask"])
    for limit, value in zip(_LIMITS, asked["limits"], strict=True):
        resource.setrlimit(limit, tuple(value))
    for name in set(os.environ) - set(asked["environment"]):
        del os.environ[name]
    os.environ.update(asked["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in asked["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, asked["mask"])
    time.tzset()
    is_unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = os.fdopen(0, closefd=False)
    out, error = (os.fdopen(number, "wb", 0, closefd=False) for number in (1, 2))
    sys.stdout = io.TextIOWrapper(out if is_unbuffered else io.BufferedWriter(out), write_through=is_unbuffered)
    sys.stderr = io.TextIOWrapper(error, errors="backslashreplace", write_through=True)
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))
    sys.executable = asked["executable"]
    sys.argv = list(asked["argv"])
    # That of this file is not there, by -P.
    if os.environ.get("PYTHONPATH"):
        sys.path.insert(0, os.environ["PYTHONPATH"])
    if not asked["safe"]:
        sys.path.insert(0, str(Path(sys.argv[0]).absolute().parent if "script" in asked else Path.cwd()))
    sys.modules["numpy"].random.seed()  # Python's own is sown anew in a fork
    sys.modules["torch"].seed()
    status = 0
    try:
        if "script" in asked:
            runpy.run_path(asked["script"], run_name="__main__")
        else:
            runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = _status_of(error)
    except KeyboardInterrupt:
        traceback.print_exc()
        status = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr):
        try:
            file.flush()
        except (OSError, ValueError):
            status = status or 120
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _status_of(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        _PYTHON, _FOLDER, _OWNER = sys.argv[1:4]
        _OURSELVES = str(Path(_FOLDER) / "python")
        raise SystemExit(_call(_PYTHON, Path(_FOLDER), int(_OWNER), sys.argv[4:]))

"""The interpreter of warm.py against a real one: the same script says and ends the same in both."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest
from conftest import interpreter

ECHO = """
import json, os, resource, signal, sys
said = {
    "argv": sys.argv, "folder": os.getcwd(), "name": __name__, "file": __file__, "path": sys.path[0],
    "variable": os.environ.get("SAFERLHF_DATASET"), "gone": os.environ.get("WARM_GONE"),
    "limit": resource.getrlimit(resource.RLIMIT_FSIZE), "umask": os.umask(0),
    "ignored": signal.getsignal(signal.SIGHUP) == signal.SIG_IGN,
    "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, set()))),
    "leads": os.getsid(0) == os.getpid(), "read": sys.stdin.read(),
}
print(json.dumps(said))
print("said", file=sys.stderr)
"""


def prepare() -> None:
    import resource

    os.umask(0o027)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


@pytest.fixture
def both(tmp_path: Path) -> Callable[..., tuple[Any, Any]]:
    """Run a script in the warm interpreter and in a real one; return how each ended."""

    def run(code: str, *arguments: str, **options: Any) -> tuple[Any, Any]:
        (tmp_path / "script.py").write_text(code)
        given = {"cwd": tmp_path, "capture_output": True, "text": True, **options}
        first, second = (
            subprocess.run([python, str(tmp_path / "script.py"), *arguments], **given)
            for python in (interpreter(), sys.executable)
        )
        return first, second

    return run


def test_a_script_finds_what_it_finds_in_a_python_of_its_own(both: Callable[..., tuple[Any, Any]]) -> None:
    environment = {**os.environ, "SAFERLHF_DATASET": "rows é", "PYTHONUNBUFFERED": "1"}
    options = {"env": environment, "input": "hello", "preexec_fn": prepare, "start_new_session": True}
    warm, real = both(ECHO, "a b", "é", **options)
    assert real.returncode == warm.returncode == 0, warm.stderr
    assert json.loads(warm.stdout) == json.loads(real.stdout)
    assert warm.stderr == real.stderr == "said\n"
    assert interpreter() != sys.executable


@pytest.mark.parametrize(
    "code",
    [
        "import sys; print('some'); sys.exit(3)",
        "raise SystemExit('in words')",
        "raise SystemExit",
        "raise ValueError('no traceback is alike, the last line is')",
        "import os; print('lost?', flush=True); os._exit(5)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "raise KeyboardInterrupt",
        "import atexit; atexit.register(print, 'at the end')",
        "import threading; threading.Thread(target=lambda: print('of a thread')).start()",
        "import multiprocessing as m\nif __name__ == '__main__': print(m.get_context('fork').Pool(1).map(abs, [-1]))",
        "import torch; print(torch.get_num_threads(), torch.ones(3).sum())",
    ],
)
def test_a_script_ends_as_it_does_in_a_python_of_its_own(code: str, both: Callable[..., tuple[Any, Any]]) -> None:
    warm, real = both(code)
    assert warm.returncode == real.returncode
    assert warm.stdout == real.stdout
    assert warm.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_no_two_draw_the_same_numbers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import numpy, random, torch; print(random.random(), numpy.random.rand(), torch.rand(1).item())")
    drawn = [subprocess.run([interpreter(), str(script)], capture_output=True, text=True).stdout for _ in range(2)]
    assert all(one != other for one, other in zip(*(each.split() for each in drawn), strict=True))


WAITS = """
import os, signal, sys, time
if sys.argv[1] == "hears":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("how", "number", "status"),
    [("hears", signal.SIGTERM, 7), ("dies", signal.SIGTERM, -15), ("dies", signal.SIGKILL, -9)],
)
def test_a_signal_arrives_and_nothing_is_left_of_what_is_killed(
    how: str, number: int, status: int, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(WAITS)
    child = subprocess.Popen([interpreter(), str(script), how], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    worker = int(child.stdout.readline())
    assert worker != child.pid
    child.send_signal(number)
    assert child.wait(timeout=20) == status
    assert faults.wait_until(lambda: not Path(f"/proc/{worker}").exists(), 10)


@pytest.mark.parametrize("environment", [{"PYTHONPATH": "/nowhere"}, {"HF_HOME": "/nowhere"}, {"AMBERSAFE_COLD": "1"}])
def test_where_it_could_not_be_alike_it_is_a_real_one(environment: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.executable, 'torch' in sys.modules)")
    for also, wanted in (({}, f"{interpreter()} True\n"), (environment, f"{sys.executable} False\n")):
        done = subprocess.run([interpreter(), str(script)], capture_output=True, text=True, env={**os.environ, **also})
        assert done.stdout == wanted, done.stderr

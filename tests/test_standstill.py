"""Ranks that are alive and stand still: who is named, what the job does, and what `show`, `watch` and `stop` say."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import pytest
from conftest import only_run, run_ambersafe
from test_real_upstream import TINY, mend, model, rows  # noqa: F401, fixtures

from ambersafe_cli import standstill

pytestmark = pytest.mark.cold

LINES = (
    ("WARNING: stuck for 612 seconds: in the update of step 3", "612 seconds: the update of step 3."),
    (
        "error: rank 0 on a ends: stuck for 9 seconds: rank 1 on b in the update of step 3, behind the others\n",
        "9 seconds: rank 1 on b in the update of step 3, behind the others.",
    ),
)


@pytest.mark.parametrize(("line", "said"), LINES)
def test_what_train_py_says_of_a_standstill_is_read(line: str, said: str) -> None:
    assert standstill.parse_line(line) == f"It has stood still for {said}"


def test_a_run_that_got_on_again_is_not_stuck(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    assert standstill.of_run(tmp_path) is None
    log.write_text("train stats after 16 examples: {}\n" + LINES[0][0] + "\n")
    assert standstill.of_run(tmp_path) == f"It has stood still for {LINES[0][1]}"
    for line in (
        "train stats after 32 examples: {}",
        "skipping logging after 32 examples to avoid logging too frequently",
        "=== ambersafe: attempt 2",
        "building policy",  # torchrun has begun again
        "Running evaluation after 32 train examples",
    ):
        log.write_text(f"{LINES[0][0]}\n{line}\nand more\n")
        assert standstill.of_run(tmp_path) is None, line


Clone = Callable[[str, bool], Path]


@pytest.fixture
def clone(patched: Path, tmp_path: Path) -> Clone:
    """A clone whose train.py sleeps in the update of step 3 where a condition holds, for ever or until that is said."""

    def make(condition: str, for_ever: bool) -> Path:
        folder = Path(shutil.copytree(patched, tmp_path / "clone"))
        wait = "time.sleep(3600)" if for_ever else "[time.sleep(0.2) for _ in range(600) if not said(self.run_dir)]"
        said = "def said(run):\n    return 'stuck for' in open(run + '/train.log').read()\n\n\n"
        mend(folder / "trainers.py", "def preference_loss(", said + "def preference_loss(")
        line = "            begin(f'the update of step {self.batch_counter + 1}')\n"
        sleep = f"            if self.batch_counter == 2 and ({condition}):\n                {wait}\n"
        # Behind the line that says so for who is alone, before it for one of several: the others come further.
        mend(folder / "trainers.py", line, line + sleep if condition == "True" else sleep + line)
        return folder

    return make


def arguments(clone: Path, model: Path, rows: Path, *more: str) -> list[str]:  # noqa: F811
    given = ["--dir", str(clone), "--allow-modified", "--model", str(model), "--data", str(rows), "--no-preflight"]
    return ["sft", *given, *TINY, "stuck_after_seconds=2", "do_first_eval=false", "eval_every=4800", *more]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[list[str]], "subprocess.Popen[bytes]"]]:
    children: list[subprocess.Popen[bytes]] = []

    def start(command: list[str]) -> "subprocess.Popen[bytes]":
        children.append(
            subprocess.Popen(
                [sys.executable, "-m", "ambersafe_cli", *command],
                cwd=tmp_path,
                env={**os.environ, **faults.marked_environment(tmp_path.name)},
                stdout=subprocess.DEVNULL,
                stderr=(tmp_path / f"stderr-{len(children)}").open("wb"),
            )
        )
        return children[-1]

    yield start
    for child in children:
        child.kill()
    faults.kill_marked(tmp_path.name)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(faults.tries("a rank stands still")))
@pytest.mark.parametrize(
    ("condition", "who"),
    [
        ("self.rank == 1", r"rank 1 on HOST in microbatch 2 of step 3, behind the others"),
        ("self.rank >= 0", r"all ranks in microbatch 2 of step 3"),
    ],
)
def test_a_job_ends_of_a_rank_that_stands_still_and_names_it(
    clone: Clone,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
    condition: str,
    who: str,
    number: int,
) -> None:
    environment = faults.marked_environment(tmp_path.name)
    command = arguments(clone(condition, True), model, rows, "--nproc", "2", "--exp-name", "run")
    done = run_ambersafe(*command, cwd=tmp_path, env=environment)
    assert done.returncode not in (0, 70)
    who = who.replace("HOST", os.uname().nodename)
    assert " ".join(done.stderr.split()).count(f"seconds: {who}. Look at the disk") == 1
    run = only_run(tmp_path, "run")
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    shown = " ".join(run_ambersafe("show", run.name, cwd=tmp_path).stdout.split())
    assert "stuck It has stood still for" in shown
    assert who in shown
    faults.note("a rank stands still", orphans=faults.left_over(tmp_path.name, 5))


@pytest.mark.slow
def test_one_process_that_stands_still_says_so_and_goes_on(
    clone: Clone,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    done = run_ambersafe(*arguments(clone("True", False), model, rows, "--exp-name", "run", "n_epochs=1"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = (only_run(tmp_path, "run") / "train.log").read_text()
    assert log.count("WARNING: stuck for ") == 1
    assert "seconds: in the update of step 3\n" in log
    assert "stood still" not in run_ambersafe("show", cwd=tmp_path).stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", range(faults.tries("one process stands still")))
def test_show_watch_and_stop_say_of_one_process_that_it_stands_still_and_stop_now_ends_it(
    clone: Clone,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
    started: Callable[[list[str]], "subprocess.Popen[bytes]"],
    number: int,
) -> None:
    child = started(arguments(clone("True", True), model, rows, "--exp-name", "run"))
    logs = list[Path]()

    def is_stuck() -> bool:
        logs[:] = tmp_path.glob(".cache/*/run_*/train.log")
        return any("WARNING: stuck for " in log.read_text() for log in logs)

    assert faults.wait_until(is_stuck, 120)
    run = logs[0].parent
    said = "seconds: the update of step 3."
    assert said in " ".join(run_ambersafe("show", run.name, cwd=tmp_path).stdout.split())
    stop = started(["stop", run.name])
    assert faults.wait_until(lambda: said in (tmp_path / "stderr-1").read_text(), 20)
    assert child.poll() is None
    done = run_ambersafe("stop", run.name, "--now", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert child.wait(timeout=30) == 128 + signal.SIGINT
    assert stop.wait(timeout=10) == 0
    assert not list(run.glob("step-*"))
    faults.note("one process stands still", orphans=faults.left_over(tmp_path.name, 5))

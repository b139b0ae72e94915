"""Signals as a bad day sends them: a terminal that is closed, one for every process of a job, Ctrl-Z in a real shell.

A quick part of it runs with the other tests, all of it with `scripts/test --faults`; see faults.py.
"""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from conftest import only_run
from faults import generator, note, tries
from terminal import Terminal
from test_real_upstream import TINY, model, rows  # noqa: F401, fixtures

from ambersafe_cli import recovery, runs

pytestmark = [pytest.mark.slow, pytest.mark.cold]

# Training ends by what the test does alone; it saves now and then, so that some of it comes in a save.
ENDLESS = (
    *TINY,
    "do_first_eval=false",
    "eval_every=48000000",
    "n_epochs=1000000",
    "save_every_examples=800",
    "keep_checkpoints=2",
)
TRAINS = re.compile(r"^(?:train stats|skipping logging) after (\d+) examples", re.MULTILINE)
ENV = {"OMP_NUM_THREADS": "1", "PS1": "$ "}


class Training:
    """A run that is begun, ended by a fault and resumed, again and again."""

    def __init__(self, work: Path, flags: list[str]) -> None:
        self.work, self._flags = work, flags
        self._log_size = 0

    @property
    def folder(self) -> Path:
        return only_run(self.work, "run")

    @property
    def command(self) -> list[str]:
        """What begins the run, or goes on with it."""
        self._log_size = self._log.stat().st_size if self._log else 0
        what = ["resume", str(self.folder)] if self._log else ["sft", "--exp-name", "run", *self._flags]
        return [sys.executable, "-m", "ambersafe_cli", *what]

    @property
    def _log(self) -> Path | None:
        return next(iter(self.work.glob(".cache/*/run_*/train.log")), None)

    def examples(self) -> int:
        """How many examples this attempt has trained on, by its log; 0 if it has not begun."""
        if self._log is None:
            return 0
        with self._log.open("rb") as file:
            file.seek(self._log_size)
            found = TRAINS.findall(file.read().decode(errors="replace").replace("\r", "\n"))
        return int(found[-1]) if found else 0

    def lost(self, trained: int) -> list[str]:
        """What is lost of a run that had trained on so many examples when it was told to stop, and has ended."""
        newest = max(faults.whole_checkpoints(self.folder), default=0)
        record = json.loads((self.folder / "run.json").read_text())
        lost = [] if newest >= trained else [f"{trained} examples trained, {newest} saved"]
        return lost if record["status"] == "interrupted" else [*lost, f"run.json says {record['status']}"]


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def training(
    request: pytest.FixtureRequest,
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> Iterator[Training]:
    how = ["--nproc", "2"] if request.param == 2 else ["--trainer", "BasicTrainer"]
    given = ["--dir", patched, "--model", model, "--data", rows, "--no-preflight", *how, *ENDLESS]
    made = Training(tmp_path, list(map(str, given)))
    yield made
    faults.kill_marked(tmp_path.name)


def in_shell(training: Training, plain: bool) -> Terminal:
    """A real shell in a terminal, in which the training has been typed and trains."""
    environment = {**ENV, **faults.marked_environment(training.work.name), "TERM": "xterm-256color"}
    terminal = Terminal(["bash", "--norc", "--noprofile", "-i"], training.work, env=environment)
    terminal.type(shlex.join([*training.command, *(["--plain"] if plain else [])]) + "\n")
    wait_until_it_trains(training, terminal)
    return terminal


def in_background(training: Training) -> "subprocess.Popen[bytes]":
    """The training, in a session of its own and without a terminal."""
    return subprocess.Popen(
        training.command,
        cwd=training.work,
        env={**os.environ, **ENV, **faults.marked_environment(training.work.name)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_until_it_trains(training: Training, terminal: Terminal | None = None, beyond: int = 0) -> None:
    def trains() -> bool:
        if terminal:
            while terminal.read(0.01) and time.monotonic() < deadline:
                if training.examples() > beyond:
                    return True
        return training.examples() > beyond

    deadline = time.monotonic() + 120
    assert faults.wait_until(trains, 120), terminal.text() if terminal else ""


def a_while(rng: random.Random, terminal: Terminal | None = None) -> None:
    until = time.monotonic() + rng.random() * 0.8
    while (left := until - time.monotonic()) > 0:
        if terminal:
            terminal.read(left)
        else:
            time.sleep(left)


def test_a_terminal_that_is_closed_leaves_a_whole_checkpoint(
    training: Training, request: pytest.FixtureRequest
) -> None:
    fault = f"terminal closed, {request.node.callspec.id}"
    rng = generator(fault)
    for number in range(tries(fault)):
        terminal = in_shell(training, plain=number % 2 == 0)
        a_while(rng, terminal)
        trained = training.examples()
        terminal.hang_up()
        orphans = faults.left_over(training.work.name, 60)
        note(fault, training.lost(trained), orphans)


def test_a_sigterm_to_every_process_of_a_job_leaves_a_whole_checkpoint(
    training: Training, request: pytest.FixtureRequest
) -> None:
    """As systemd sends it, and schedulers that end a job."""
    fault = f"SIGTERM to all, {request.node.callspec.id}"
    rng = generator(fault)
    mark = training.work.name
    for _ in range(tries(fault)):
        child = in_background(training)
        wait_until_it_trains(training)
        a_while(rng)
        trained = training.examples()
        processes = list(faults.marked(mark))
        rng.shuffle(processes)
        for pid in processes:
            faults.kill(pid, signal.SIGTERM)
        assert child.wait(timeout=60) == 128 + signal.SIGTERM
        note(fault, training.lost(trained), faults.left_over(mark, 5))


def states(mark: str) -> str:
    """The states of the processes of a training, T for one that is stopped; not those of the shell and of torchrun."""
    found = []
    for pid, command in faults.marked(mark).items():
        if not command.startswith("bash") and "torch.distributed.run" not in command:
            found.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
    return "".join(sorted(found))


def test_ctrl_z_stops_the_training_as_well_and_fg_and_bg_have_it_go_on(
    training: Training, request: pytest.FixtureRequest
) -> None:
    fault = f"Ctrl-Z, {request.node.callspec.id}"
    rng = generator(fault)
    mark = training.work.name
    for number in range(tries(fault)):
        terminal = in_shell(training, plain=number % 2 == 0)
        a_while(rng, terminal)
        terminal.type("\x1a")
        screen = terminal.wait_for(lambda text: "Stopped" in text and text.rstrip().endswith("$"), 20)
        assert "Ctrl-C saves" not in screen, "the view has left"
        assert set(states(mark)) == {"T"}
        trained = training.examples()
        time.sleep(1)
        assert training.examples() == trained
        with_bg = number % 3 == 2
        terminal.type("bg\n" if with_bg else "fg\n")
        wait_until_it_trains(training, terminal, trained)
        trained = training.examples()
        terminal.type("kill -INT %1\n" if with_bg else "\x03")
        deadline = time.monotonic() + 60
        while states(mark):
            assert time.monotonic() < deadline, terminal.text()
            terminal.read(0.05)
        note(fault, training.lost(trained))
        terminal.close()


def test_a_launcher_that_is_killed_while_it_is_stopped_leaves_nothing_that_the_next_attempt_does_not_end(
    training: Training,
) -> None:
    fault = "launcher killed while stopped"
    for _ in range(tries(fault)):
        terminal = in_shell(training, plain=True)
        terminal.type("\x1a")
        terminal.wait_for(lambda text: "Stopped" in text, 20)
        terminal.type("kill -9 %1; sleep 1\n")
        terminal.wait_for(lambda text: "Killed" in text, 20)
        left = {pid for pid, command in faults.marked(training.work.name).items() if "train.py" in command}
        child = in_background(training)
        wait_until_it_trains(training)
        assert faults.wait_until(lambda left=left: not left & faults.marked(training.work.name).keys(), 60)  # type: ignore[misc]
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=60) == 128 + signal.SIGINT
        terminal.close()
        note(fault, orphans=faults.left_over(training.work.name, 5))


def test_the_newest_checkpoint_of_a_run_that_saved_at_a_signal_is_that_of_its_last_step(
    training: Training,
) -> None:
    """What `lost` goes by: a check of the check."""
    child = in_background(training)
    wait_until_it_trains(training)
    faults.kill_marked(training.work.name)
    child.wait()
    assert not runs.steps(training.folder) or training.examples() > 800
    assert training.lost(training.examples() + 16)
    assert recovery.put_in_order(training.folder) is None or training.examples() > 800

"""Numbers that are none, clocks that jump, disks without locks, processes that do not die: what a run makes of them.

A quick part of it runs with the other tests, all of it with `scripts/test --faults`; see faults.py.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import numpy
import pytest
from conftest import load, only_run, run_ambersafe
from faults import generator, note, tries
from test_real_upstream import TINY, mend, model, ours, rows  # noqa: F401, fixtures
from test_speed import ask, keep, kept

from ambersafe_cli import runs

pytestmark = pytest.mark.slow


def training(clone: Path, model: Path, rows: Path, *more: object) -> list[object]:  # noqa: F811
    given = ["--dir", clone, "--allow-modified", "--model", model, "--data", rows, "--no-preflight", *TINY]
    return ["sft", *given, "do_first_eval=false", "--exp-name", "run", *more]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Start ambersafe in the background; what it says gets into `said`. Nothing of it is left behind the test."""
    children: list[subprocess.Popen[bytes]] = []

    def start(*command: object, **environment: str) -> "subprocess.Popen[bytes]":
        with (tmp_path / f"said-{len(children)}").open("wb") as said:
            child = subprocess.Popen(
                [sys.executable, "-m", "ambersafe_cli", *map(str, command)],
                cwd=tmp_path,
                env={**os.environ, **faults.marked_environment(tmp_path.name), **environment},
                stdout=said,
                stderr=said,
            )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
    faults.kill_marked(tmp_path.name)


def said(work: Path, number: int) -> str:
    """What a process of `begin` said, in one line."""
    return " ".join((work / f"said-{number}").read_text(errors="replace").split())


# --- numbers that are not finite ---

SPOILT = {
    "loss": (
        "                (loss / self.config.gradient_accumulation_steps).backward()\n",
        "                metrics['loss/train'][-1] = float('inf')\n",
    ),
    "gradient": (
        "            grad_norm = self.clip_gradient()\n",
        "            next(p for p in self.policy.parameters() if p.grad is not None).grad.mul_(float('nan'))\n",
    ),
    "evaluation": (
        "                if self.config.stop_on_nan and not np.isfinite(list(mean_eval_metrics.values())).all():\n",
        "                mean_eval_metrics['logps_eval/chosen'] = float('-inf')\n",
    ),
}


def test_a_number_that_is_not_finite_ends_a_run_whose_checkpoints_are_finite_and_go_on(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    fault = "a number that is not finite"
    rng = generator(fault)
    clone = Path(shutil.copytree(patched, tmp_path / "clone"))
    for kind, (line, spoil) in SPOILT.items():
        indent = line[: len(line) - len(line.lstrip())]
        when = f"{indent}if os.environ.get('SPOIL') == f'{kind} {{self.example_counter}}':\n"
        mend(clone / "trainers.py", line, f"{when}    {spoil}{line}")
    for number in range(tries(fault)):
        kind = list(SPOILT)[number % len(SPOILT)]
        at = rng.choice([48, 96] if kind == "evaluation" else [32, 64, 80])
        work = tmp_path / str(number)
        work.mkdir()
        given = training(clone, model, rows, "--trainer", "BasicTrainer", "save_every_examples=16", "--keep", "2")
        done = run_ambersafe(*given, cwd=work, env={"SPOIL": f"{kind} {at}"})
        assert done.returncode == 1, done.stderr
        run = only_run(work, "run")
        assert "is not finite" in done.stderr
        assert json.loads((run / "run.json").read_text())["status"] == "failed"
        saved = faults.whole_checkpoints(run)
        lost = {at - 16 if kind == "evaluation" else at} - saved
        for step in saved:
            weights = load(run / f"step-{step}" / "policy.pt")["state"].values()
            lost |= set() if all(bool(weight.isfinite().all()) for weight in weights) else {step}
        note(fault, lost)
        assert not (run / "LATEST").exists()
    done = run_ambersafe("resume", "--allow-modified", run, cwd=work)
    assert done.returncode == 0, done.stderr


def test_restarts_do_not_come_to_the_same_number_again(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    clone = Path(shutil.copytree(patched, tmp_path / "clone"))
    line, spoil = SPOILT["gradient"]
    mend(clone / "trainers.py", line, f"            if self.batch_counter == 3:\n    {spoil}{line}")
    given = training(clone, model, rows, "--nproc", 2, "--max-restarts", 3, "save_every_examples=16")
    done = run_ambersafe(*given, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    run = only_run(tmp_path, "run")
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    log = (run / "train.log").read_text()
    assert log.count("building policy") == 1
    assert log.count("error: the gradient after 48 examples is not finite") == 1
    assert "ambersafe resume" in done.stderr


# --- what is kept of the reference model ---


def test_no_flipped_bit_of_what_is_kept_of_the_reference_model_is_trained_on(
    patched: Path,
    model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    fault = "flipped bit in reference_logps"
    rng = generator(fault)
    path = tmp_path / "kept.npy"
    keep(path, numpy.linspace(-300, -1, 64, dtype=numpy.float32).reshape(32, 2))
    size = path.stat().st_size
    flips = [(rng.randrange(size), rng.randrange(8)) for _ in range(tries(fault))]
    taken = ask(
        patched,
        model,
        f"""
path, taken = {str(path)!r}, []
whole = open(path, "rb").read()
made = trainer()
assert made.read_reference_cache(path, (32, 2)) is not None
for at, bit in {flips!r}:
    open(path, "wb").write(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1:])
    if made.read_reference_cache(path, (32, 2)) is not None:
        taken.append((at, bit))
print()
print(json.dumps(taken))
""",
    )
    for flip in flips:
        note(fault, [flip] if list(flip) in taken else [])


def test_what_is_kept_of_another_reference_model_is_not_trained_on(
    ours: Path,  # noqa: F811
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Whole, by its digest, and written by another hand: the first step shows it."""
    fault = "reference_logps of another model"
    rng = generator(fault)
    there = tmp_path / ".cache" / runs.user_name() / "reference_logps"
    shutil.copytree(kept(ours)[0].parent, there)
    given = ("--dir", patched, "--model", model, "--data", rows, "--trainer", "BasicTrainer")
    archive = only_run(ours, "sft")
    for number in range(tries(fault)):
        array = numpy.load(kept(ours)[0]) * (rng.choice([0.5, 0.9, 1.2]) if number % 2 else 1)
        if not number % 2:
            array = array[::-1].copy()  # of the right model, for other pairs
        keep(there / kept(ours)[0].name, array.astype(numpy.float32))
        done = run_ambersafe(
            "dpo", *given, "--archive", archive, *TINY, "do_first_eval=false", "--exp-name", f"d{number}", cwd=tmp_path
        )
        assert done.returncode == 1, done.stderr
        assert "is not of this reference model" in done.stderr
        run = only_run(tmp_path, f"d{number}")
        note(fault, [line for line in (run / "train.log").read_text().splitlines() if line.startswith("train stats")])


# --- torchrun starts again ---


@pytest.mark.cold  # the rank that is stopped must be the one that writes
def test_restarts_take_the_newest_checkpoint_that_is_whole(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
    begin: Callable[..., "subprocess.Popen[bytes]"],
) -> None:
    fault = "newest checkpoint damaged, --max-restarts"
    rng = generator(fault)
    count = tries(fault)
    saves = ("n_epochs=null", "n_examples=64000", "eval_every=64000", "save_every_examples=64", "keep_checkpoints=4")
    child = begin(*training(patched, model, rows, "--nproc", 1, "--max-restarts", count, *saves))
    for number in range(count):
        run = wait_for_steps(tmp_path, 3)
        (worker,) = [pid for pid, line in faults.marked(tmp_path.name).items() if is_worker(line)]
        faults.kill(worker, signal.SIGSTOP)
        newest = max(int(path.name[5:]) for path in run.glob("step-*") if path.name[5:].isdecimal())
        with (run / f"step-{newest}" / rng.choice(["policy.pt", "optimizer.pt"])).open("r+b") as file:
            if number % 2:
                file.truncate(rng.randrange(20_000))
            else:
                file.seek(rng.randrange(10_000, 40_000))
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 4]))
        before = len(re.findall("going on from", (run / "train.log").read_text()))
        faults.kill(worker, signal.SIGKILL)
        went_on = faults.wait_until(
            lambda run=run, before=before: len(re.findall("going on from", (run / "train.log").read_text())) > before,  # type: ignore[misc]
            60,
        )
        assert went_on, said(tmp_path, 0)[-3000:]
        assert f"step-{newest} is not whole, and is kept as step-{newest}.damaged" in (run / "train.log").read_text()
        note(fault, [] if (run / f"step-{newest}.damaged").is_dir() else [newest])
        shutil.rmtree(run / f"step-{newest}.damaged")
    assert child.poll() is None


def test_an_adapter_that_is_damaged_is_seen_as_well(patched: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    """By what starts again from the newest checkpoint: of LoRA's the policy.pt holds nothing but a digest."""
    found = ask(
        patched,
        model,
        f"""
import hashlib, os
folder = {str(tmp_path)!r}
def write(name, data):
    with open(os.path.join(folder, name), "wb") as f:
        f.write(data)
write("adapter_model.safetensors", b"weights")
sha256 = {{"adapter_model.safetensors": hashlib.sha256(b"weights").hexdigest()}}
torch.save({{"step_idx": 1, "state": {{}}, "metrics": {{}}, "adapter": {{"sha256": sha256}}}}, folder + "/policy.pt")
for name in ("optimizer.pt", "scheduler.pt"):
    torch.save({{"step_idx": 1}}, os.path.join(folder, name))
found = [utils.find_damage(folder)]
write("adapter_model.safetensors", b"weighty")
found.append(utils.find_damage(folder))
os.remove(folder + "/adapter_model.safetensors")
found.append(utils.find_damage(folder))
print()
print(json.dumps(found))
""",
    )
    assert found[0] is None
    assert found[1] == "adapter_model.safetensors is not the one that was saved with it"
    assert "No such file" in found[2]


def is_worker(command: str) -> bool:
    return "train.py" in command and "torch.distributed.run" not in command and "ambersafe_cli" not in command


def wait_for_steps(work: Path, count: int) -> Path:
    def is_so() -> bool:
        return len([path for path in work.glob(".cache/*/run_*/step-*") if path.name[5:].isdecimal()]) >= count

    assert faults.wait_until(is_so, 120)
    return only_run(work, "run")


# --- clocks ---


def test_a_clock_that_is_set_back_does_not_keep_a_run_from_saving(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
    begin: Callable[..., "subprocess.Popen[bytes]"],
) -> None:
    fault = "clock set back"
    clone = Path(shutil.copytree(patched, tmp_path / "clone"))
    back = tmp_path / "back"
    back.write_text("0")
    clock = f"import time\nreal_time = time.time\ntime.time = lambda: real_time() - float(open({str(back)!r}).read())\n"
    mend(clone / "train.py", "import shlex\n", f"import shlex\n{clock}")
    flags = ("n_epochs=100000", "eval_every=48000000", "save_every_minutes=0.01", "keep_checkpoints=3")
    begin(*training(clone, model, rows, "--trainer", "BasicTrainer", *flags))
    run = wait_for_steps(tmp_path, 1)
    for number in range(tries(fault)):
        changed = tmp_path / "changed"
        changed.write_text(str(3600.0 * (number + 1)))
        changed.replace(back)
        time.sleep(0.1)
        newest = max(faults.whole_checkpoints(run))
        went_on = faults.wait_until(lambda newest=newest: any(step > newest for step in steps_of(run)), 30)  # type: ignore[misc]
        note(fault, [] if went_on else [newest])


def steps_of(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in run.glob("step-*") if path.name[5:].isdecimal()]


# --- a disk without locks, machines whose clocks differ, processes that do not die ---

OTHERWISE = """
import fcntl, os, socket, time
def flock(*arguments):
    raise OSError(37, "No locks available")
if "TEST_HOST" in os.environ:
    fcntl.flock = flock
    socket.gethostname = lambda: os.environ["TEST_HOST"]
    real_time = time.time
    time.time = lambda: real_time() + float(os.environ["TEST_CLOCK"])
if "TEST_DEATHLESS" in os.environ:
    real_kill, real_killpg = os.kill, os.killpg
    os.kill = lambda pid, number: None if number == 9 else real_kill(pid, number)
    os.killpg = lambda pid, number: None if number == 9 else real_killpg(pid, number)
"""


@pytest.fixture
def otherwise(tmp_path: Path) -> dict[str, str]:
    """An environment in which Python is on another host, with another clock and no locks, as variables say."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(OTHERWISE)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)}


@pytest.fixture
def stopped(fake_clone: Path) -> Path:
    """The folder of a run that has failed."""
    done = run_ambersafe("sft", "--no-preflight", "--exp-name", "run", cwd=fake_clone.parent, env={"FAKE": "crash"})
    assert done.returncode == 3, done.stderr
    return only_run(fake_clone.parent, "run")


def record_of(run: Path) -> Any:
    return json.loads((run / "run.json").read_text())


def test_a_run_that_another_machine_has_is_not_begun_again_whatever_the_clocks_say(
    stopped: Path, tmp_path: Path, otherwise: dict[str, str], begin: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    fault = "two machines, no locks, clocks apart"
    rng = generator(fault)
    child = begin("resume", stopped, "--allow-modified", **otherwise, TEST_HOST="a", TEST_CLOCK="0", FAKE="wait")
    assert faults.wait_until(lambda: "waiting" in said(tmp_path, 0), 60), said(tmp_path, 0)
    for _ in range(tries(fault)):
        clock = str(rng.choice([-1, 1]) * rng.uniform(130, 90_000))
        env = {**otherwise, "TEST_HOST": "b", "TEST_CLOCK": clock, "FAKE": "crash"}
        done = run_ambersafe("resume", stopped, "--allow-modified", cwd=tmp_path, env=env)
        assert done.returncode == 64, done.stderr
        assert "is still running on a" in done.stderr
        note(fault, [] if child.poll() is None and len(record_of(stopped)["attempts"]) == 2 else [stopped])


def test_of_two_that_begin_at_once_where_there_are_no_locks_one_ends_and_says_why(
    stopped: Path, tmp_path: Path, otherwise: dict[str, str], begin: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    fault = "two resumes at once, no locks"
    for number in range(tries(fault)):
        both = {
            host: begin(
                *("resume", stopped, "--allow-modified"), **otherwise, TEST_HOST=host, TEST_CLOCK="0", FAKE="wait"
            )
            for host in ("a", "b")
        }
        assert faults.wait_until(lambda both=both: any(c.poll() is not None for c in both.values()), 60)  # type: ignore[misc]
        time.sleep(1)
        (winner,) = [host for host, child in both.items() if child.poll() is None]
        (loser,) = set(both) - {winner}
        text = said(tmp_path, 2 * number + (loser == "b"))
        assert both[loser].returncode == 64
        assert "Another process has the run" in text or f"is still running on {winner}" in text
        record = record_of(stopped)
        is_kept = (record["status"], record["attempts"][-1]["host"]) == ("running", winner)
        both[winner].send_signal(signal.SIGINT)
        both[winner].wait(timeout=60)
        orphans = faults.left_over(tmp_path.name, 10)
        note(fault, [] if is_kept and record_of(stopped)["status"] == "interrupted" else [stopped], orphans)


def test_a_process_that_does_not_even_end_of_sigkill_does_not_hold_the_launcher(
    stopped: Path, tmp_path: Path, otherwise: dict[str, str], begin: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    """As one that waits for a dead disk. Of such a process there is no other way to be had in a test."""
    fault = "a process that SIGKILL does not end"
    for number in range(tries(fault)):
        child = begin("resume", stopped, "--allow-modified", **otherwise, TEST_DEATHLESS="1", FAKE="hang")
        assert faults.wait_until(lambda number=number: "started" in said(tmp_path, number), 60)  # type: ignore[misc]
        child.send_signal(signal.SIGTERM)  # to which it is deaf
        time.sleep(1.2)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=60) == 128 + signal.SIGTERM, said(tmp_path, number)
        assert "Not even SIGKILL ends the processes" in said(tmp_path, number)
        faults.kill_marked(tmp_path.name)
        note(fault, [] if record_of(stopped)["status"] == "interrupted" else [stopped])


def test_a_training_that_is_killed_says_that_it_was_most_likely_the_memory_and_its_run_is_kept(
    stopped: Path, tmp_path: Path
) -> None:
    fault = "killed for memory"
    for _ in range(tries(fault)):
        done = run_ambersafe("resume", stopped, "--allow-modified", cwd=tmp_path, env={"FAKE": "killed"})
        assert done.returncode == 137
        assert "most likely by the system, as this machine's memory was full" in done.stderr
        note(fault, [] if record_of(stopped)["status"] == "failed" else [stopped])


def test_a_run_whose_disk_has_no_room_for_its_checkpoints_does_not_go_on(stopped: Path, tmp_path: Path) -> None:
    """It would train as far as the next one, and lose that."""
    fault = "resume without room"
    disk = faults.SmallDisk(tmp_path / "disk", 40_000)
    if not disk.is_there:
        pytest.skip("no tmpfs could be mounted")
    try:
        run = disk.folder / "run"
        record = (stopped / "run.json").read_text().replace(str(stopped), str(run))
        shutil.copytree(stopped, run)
        (run / "run.json").write_text(record)
        (run / "step-16").mkdir()
        import torch

        for name in ("policy.pt", "optimizer.pt", "scheduler.pt"):
            torch.save({"step_idx": 16, "state": {"a": torch.ones(500_000)}, "metrics": {}}, run / "step-16" / name)
        rng = generator(fault)
        for _ in range(tries(fault)):
            disk.fill(leave=rng.randrange(5_900_000))  # a checkpoint is 6 MB
            done = run_ambersafe("resume", run, "--allow-modified", cwd=tmp_path, env={"FAKE": "train"})
            assert done.returncode == 64, done.stderr
            assert "needs room for" in done.stderr
            note(fault, {16} - faults.whole_checkpoints(run))
            disk.make_room()
        done = run_ambersafe("resume", run, "--allow-modified", cwd=tmp_path, env={"FAKE": "train"})
        assert done.returncode == 0, done.stderr
    finally:
        disk.unmount()

"""Kills, full disks, damaged files and races: nothing that was saved is lost, and nothing is left running.

A quick part of it runs with the other tests, all of it with `scripts/test --faults`; see faults.py.
"""

import errno
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import faults
import pytest
from conftest import commit, git, load, numbers, only_run, run_ambersafe
from faults import generator, note, tries
from test_real_upstream import TINY, model, rows  # noqa: F401, fixtures
from test_resume import start
from test_upstream import (  # noqa: F401, fixtures
    CHILD,
    assert_complete,
    copy,
    series,
    set_up,
    source,
    train,
    wanted,
    whole_clone,
    workshop,
)

from ambersafe_cli import (
    attempts,
    cloning,
    errors,
    integrity,
    launch,
    records,
    recovery,
    upstream,
)

pytestmark = [pytest.mark.slow, pytest.mark.cold]

# --- a real training is killed ---

STEPS = 120 if faults.ALL else 60
KEEP = 3
SETTINGS = (
    *TINY,
    "n_epochs=null",
    f"n_examples={16 * STEPS}",
    "eval_every=128",
    "save_every_examples=32",
    f"keep_checkpoints={KEEP}",
)
KILLS = ("everything", "the launcher", "train.py")


def chain(everything: int, launcher: int, train_py: int, terminate: int, interrupt: int) -> list[str]:
    return (
        ["everything"] * everything
        + ["the launcher"] * launcher
        + ["train.py"] * train_py
        + ["SIGTERM"] * terminate
        + ["SIGINT"] * interrupt
    )


CHAINS = {
    ("sft", 1): chain(8, 3, 2, 1, 1) if faults.ALL else chain(2, 1, 0, 0, 0),
    ("dpo", 1): chain(8, 3, 2, 1, 1) if faults.ALL else [],
    ("sft", 2): chain(5, 2, 3, 1, 0) if faults.ALL else [],
}


@pytest.fixture(scope="module")
def undisturbed(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, int], Path]:
    """A run with these settings that nothing happens to, for each stage and number of ranks. Made once."""
    work = tmp_path_factory.mktemp("undisturbed")
    (work / ".cache").mkdir()

    def make(stage: str, ranks: int) -> Path:
        name = f"{stage}-{ranks}"
        if not list((work / ".cache").glob(f"*/{name}_*")):
            archive = ("--archive", make("sft", 1)) if stage == "dpo" else ()
            how = arguments(patched, model, rows, ranks, *archive)
            environment = faults.marked_environment("undisturbed")
            done = run_ambersafe(stage, *how, "--exp-name", name, cwd=work, env=environment)
            assert done.returncode == 0, done.stderr
        return only_run(work, name)

    return make


def arguments(clone: Path, model: Path, rows: Path, ranks: int, *more: object) -> list[object]:  # noqa: F811
    how = ["--nproc", ranks] if ranks > 1 else ["--trainer", "BasicTrainer"]
    return ["--dir", clone, "--model", model, "--data", rows, "--no-preflight", *how, *more, *SETTINGS]


@pytest.mark.parametrize(("stage", "ranks"), [key for key, what in CHAINS.items() if what])
def test_a_training_that_is_killed_again_and_again_ends_with_the_numbers_and_weights_of_one_that_is_not(
    stage: str,
    ranks: int,
    undisturbed: Callable[[str, int], Path],
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    rng = generator(stage, ranks)
    whole = undisturbed(stage, ranks)
    archive = ("--archive", undisturbed("sft", 1)) if stage == "dpo" else ()
    how = arguments(patched, model, rows, ranks, *archive, "--exp-name", "run")
    ends = CHAINS[stage, ranks].copy()
    rng.shuffle(ends)
    before: set[int] = set()
    for number, how_it_ends in enumerate(ends):
        runs_here = list(tmp_path.glob(".cache/*/run_*/run.json"))
        command = ["resume", runs_here[0].parent] if runs_here else [stage, *how]
        before = one_attempt(command, how_it_ends, f"{tmp_path.name}-{number}", tmp_path, before, rng)
    environment = faults.marked_environment("last")
    done = run_ambersafe("resume", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr

    run = only_run(tmp_path, "run")
    assert not [path for path in run.iterdir() if path.suffix in (".partial", ".old", ".deleted", ".damaged")]
    mine, theirs = load(run / "LATEST" / "policy.pt"), load(whole / "LATEST" / "policy.pt")
    assert mine["step_idx"] == theirs["step_idx"]
    assert all(bool((mine["state"][name] == theirs["state"][name]).all()) for name in theirs["state"])
    found, expected = numbers(run), numbers(whole)
    assert {key: value for key, value in found.items() if value != expected[key]} == {}
    # A line that was printed just before the launcher died may not have reached its log.
    assert len(expected.keys() - found.keys()) <= 2 * len(ends)


def one_attempt(
    command: list[Any], how_it_ends: str, mark: str, work: Path, before: set[int], rng: random.Random
) -> set[int]:
    """Start or resume a training, end it this way at a random moment, look at what is left.

    Returns the checkpoints that are whole afterwards, `before` those that were."""
    moment = rng.choices(["start", "step", "evaluation", "save"], weights=[15, 25, 20, 40])[0]
    output = work / f"output-{mark}"
    log_size = {path: path.stat().st_size for path in work.glob(".cache/*/run_*/train.log")}
    with output.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "ambersafe_cli", *map(str, command)],
            cwd=work,
            env={**os.environ, **faults.marked_environment(mark)},
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=faults.die_with_parent,
        )
    wait_for(moment, child, work, log_size, rng)
    assert child.poll() is None, f"it ended by itself: {output.read_text()[-2000:]}"
    orphans: dict[int, str] = {}
    if how_it_ends == "everything":
        faults.kill_marked(mark)
        child.wait()
    elif how_it_ends == "the launcher":
        child.kill()
        child.wait()
        orphans = faults.left_over(mark, 60)
    elif how_it_ends == "train.py":
        trainings = [pid for pid, line in faults.marked(mark).items() if "train.py" in line and pid != child.pid]
        trainings = [pid for pid in trainings if "torch.distributed.run" not in faults.marked(mark).get(pid, "")]
        for pid in trainings[:1] or [child.pid]:  # none yet: the launcher is still reading
            faults.kill(pid, signal.SIGKILL)
        assert child.wait(timeout=60) != 0
        orphans = faults.left_over(mark, 5)
        if trainings:
            assert "failed with exit status" in output.read_text()
    else:
        number = signal.Signals[how_it_ends]
        child.send_signal(number)
        assert child.wait(timeout=60) in (128 + number, -number), output.read_text()[-2000:]
        orphans = faults.left_over(mark, 5)
    faults.kill_marked(mark)
    assert 'Traceback (most recent call last)\n  File "/ambersafe_cli' not in output.read_text(errors="replace")

    lost: set[int] = set()
    after: set[int] = set()
    for run in work.glob(".cache/*/run_*"):
        lost, after = faults.lost_checkpoints(run, before, KEEP), faults.whole_checkpoints(run)
        for number_, name in ((n, name) for n in after for name in recovery.FILES_OF_A_CHECKPOINT):
            assert load(run / f"step-{number_}" / name)["step_idx"] == number_
    is_kill = how_it_ends in KILLS
    what = f"kill -9 of {how_it_ends}, {moment}" if is_kill else f"{how_it_ends}, {moment}"
    note(f"training: {what}", lost, orphans, is_kill)
    return after


def wait_for(
    moment: str, child: "subprocess.Popen[bytes]", work: Path, log_size: dict[Path, int], rng: random.Random
) -> None:
    """Wait for a moment of a training, and then a little longer."""

    def printed(what: bytes) -> int:
        logs = work.glob(".cache/*/run_*/train.log")
        return sum(path.read_bytes()[log_size.get(path, 0) :].count(what) for path in logs)

    def reached(is_so: Callable[[], bool]) -> None:
        assert faults.wait_until(lambda: is_so() or child.poll() is not None, 120, pause=0.0005)

    if moment == "start":
        time.sleep(rng.random() * 5)
    elif moment == "step":
        reached(lambda: printed(b"train stats after") > 0)
        time.sleep(rng.random() * 0.3)
    elif moment == "evaluation":
        reached(lambda: printed(b"Running evaluation after") > 0)
        time.sleep(rng.random() * 0.05)
    else:
        for _ in range(rng.randrange(3)):
            saved = printed(b"scheduler.pt...")
            reached(lambda saved=saved: printed(b"scheduler.pt...") > saved)  # type: ignore[misc]
        reached(lambda: any(work.glob(".cache/*/run_*/*.partial")))
        time.sleep(rng.random() * 0.03)


# --- the writer is killed, or its disk is full ---


class Writer:
    """The child that saves checkpoints with upstream's patched code, see fault_writer.py."""

    def __init__(self, clone: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("fault_writer.py")), str(clone)]
        environment = {**os.environ, **faults.marked_environment("writer")}
        self.child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            preexec_fn=faults.die_with_parent,
        )

    def save(
        self,
        run: Path,
        first: int,
        kill_after: float | None = None,
        keep: int | None = KEEP,
        best: str | None = None,
        limit: int | None = None,
        aim: bool = False,
    ) -> tuple[list[int], str]:
        """The steps that were saved, and the error that ended it."""
        order = {"run": str(run), "first": first, "kill_after": kill_after, "keep": keep, "best": best, "limit": limit}
        order["aim"] = aim
        assert self.child.stdin
        assert self.child.stdout
        print(json.dumps(order), file=self.child.stdin, flush=True)
        answer = json.loads(self.child.stdout.readline())
        return answer["saved"], answer["error"]


@pytest.fixture(scope="module")
def writer(patched: Path) -> Iterator[Writer]:
    made = Writer(patched)
    yield made
    assert made.child.stdin
    made.child.stdin.close()
    assert made.child.wait(timeout=30) == 0


def test_a_save_that_is_killed_leaves_every_checkpoint_that_was_there(writer: Writer, tmp_path: Path) -> None:
    fault = "kill -9 of the writer"
    rng = generator(fault)
    before: set[int] = set()
    for number in range(tries(fault)):
        best = "loss/eval" if number % 2 else None
        first = max(before, default=0) + rng.choice([0, 1])  # sometimes over the newest one
        saved, error = writer.save(tmp_path, first or 1, kill_after=rng.random() * 0.12, best=best, aim=number % 3 > 0)
        assert not error
        lost = faults.lost_checkpoints(tmp_path, before | set(saved), KEEP)
        newest = recovery.put_in_order(tmp_path)
        assert int(newest.name[5:] if newest else 0) >= max(before | set(saved), default=0)
        assert all(path.name[5:].isdecimal() for path in tmp_path.iterdir()), "leftovers"
        before = faults.whole_checkpoints(tmp_path)
        note(fault, lost)


def test_a_full_disk_stops_the_save_and_the_next_one_works(writer: Writer, tmp_path: Path) -> None:
    fault = "full disk under the writer"
    rng = generator(fault)
    disk = faults.SmallDisk(tmp_path / "disk", 2048)
    run = tmp_path / "disk" / "run"
    run.mkdir()
    try:
        step = 4  # of more than one save, as each fourth
        assert writer.save(run, step) == ([step, step], "")
        size = sum(path.stat().st_size for path in (run / "step-4").iterdir())
        before = {step}
        for number in range(tries(fault)):
            step += 1
            # A quarter of them where only the last and smallest files do not fit any more.
            free = rng.randrange(size - 12_000, size) if number % 4 == 0 else rng.randrange(size)
            if disk.is_there:
                disk.fill(leave=free)
            limit = None if disk.is_there else rng.randrange(size // 2)
            saved, error = writer.save(run, step, limit=limit)
            lost = faults.lost_checkpoints(run, before | set(saved), KEEP)
            assert not saved, f"{free} bytes were enough"
            assert "No space left" in error or "File too large" in error, error
            assert not list(run.glob("*.partial")), "the disk stays full"
            if disk.is_there:
                disk.make_room()
            note(fault if disk.is_there else f"{fault} (by a limit: no tmpfs could be mounted)", lost)
            saved, error = writer.save(run, step)
            assert set(saved) == {step}, error
            before = faults.whole_checkpoints(run)
    finally:
        disk.unmount()


@pytest.mark.skipif(not faults.ALL, reason="only with scripts/test --faults")
@pytest.mark.parametrize("at_once", [False, True])
def test_a_training_whose_disk_is_full_fails_clearly_and_goes_on_when_there_is_room(
    at_once: bool,
    undisturbed: Callable[[str, int], Path],
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    disk = faults.SmallDisk(tmp_path / "disk", 100_000 if at_once else 14_000)  # of 5 MB each
    if not disk.is_there:
        pytest.skip("no tmpfs could be mounted")
    run = tmp_path / "disk" / "run"
    try:
        how = arguments(patched, model, rows, 1, f"local_run_dir={run}", "--keep", "all")
        how = [word for word in how if not str(word).startswith("keep_checkpoints")]
        if at_once:
            child = start("sft", tmp_path, *how)
            assert faults.wait_until(lambda: any(run.glob("step-*/policy.pt")), 120)
            disk.fill()  # run.json and train.log cannot be written either
            output = child.communicate(timeout=120)[0].decode()
            status = child.returncode
        else:
            done = run_ambersafe("sft", *how, cwd=tmp_path, env=faults.marked_environment("disk"))
            output, status = done.stderr, done.returncode
        assert status not in (0, 70), output
        assert "No space left on device" in output
        assert "ambersafe resume" in output
        assert not list(run.glob("*.partial"))
        before = faults.whole_checkpoints(run)
        assert before
        disk.resize(600_000)
        if at_once:
            disk.make_room()
        done = run_ambersafe("resume", run, cwd=tmp_path, env=faults.marked_environment("disk"))
        assert done.returncode == 0, done.stderr
        assert f"going on from {run}/step-{max(before)}" in done.stderr
        note("full disk under a training", before - faults.whole_checkpoints(run))
        mine, theirs = load(run / "LATEST" / "policy.pt"), load(undisturbed("sft", 1) / "LATEST" / "policy.pt")
        assert all(bool((mine["state"][name] == theirs["state"][name]).all()) for name in theirs["state"])
    finally:
        disk.unmount()


# --- files are cut and damaged ---


@pytest.fixture(scope="module")
def three_checkpoints(writer: Writer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("three") / "run"
    run.mkdir()
    for step in (1, 2, 3):
        assert writer.save(run, step) == ([step], "")
    return run


def test_every_bit_of_a_file_that_torch_load_goes_by_is_looked_at(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "small.pt"
    torch.save({"step_idx": 3, "state": {"a": torch.arange(9.0), "b": torch.ones(2)}, "metrics": {}}, path)
    good, expected = path.read_bytes(), repr(load(path))
    assert integrity.damage(path) is None
    rng = generator("bits")
    for byte in range(0, len(good), 1 if faults.ALL else 3):
        bit = 1 << rng.randrange(8)
        path.write_bytes(good[:byte] + bytes([good[byte] ^ bit]) + good[byte + 1 :])
        if integrity.damage(path) is None:
            assert repr(load(path)) == expected, (byte, bit)
    for size in range(0, len(good), 1 if faults.ALL else 3):
        path.write_bytes(good[:size])
        assert integrity.damage(path), size


def test_a_checkpoint_that_is_damaged_is_passed_over_and_kept(three_checkpoints: Path, tmp_path: Path) -> None:
    fault = "checkpoint cut or with a flipped bit"
    rng = generator(fault)
    for number in range(tries(fault)):
        run = tmp_path / str(number)
        shutil.copytree(three_checkpoints, run)
        done = {}
        for step in rng.choice([(3,), (3,), (3, 2), (3, 2, 1)]):
            path = run / f"step-{step}" / rng.choice(recovery.FILES_OF_A_CHECKPOINT)
            done[step] = (path.name, faults.damage_file(path, rng, ("cut", "flip", "flip", "delete")))
        newest = recovery.put_in_order(run)
        there = {path.name for path in run.iterdir()}
        assert len(there) == 3, "nothing is deleted"
        lost = [step for step in (1, 2, 3) if step not in done and f"step-{step}" not in there]
        note(fault, lost)
        assert newest or set(done) == {1, 2, 3}
        # A flipped bit may be one that says nothing, such as that of a date.
        assert newest is None or load_or_none(newest) == load_or_none(three_checkpoints / newest.name), done
        assert all(f"step-{step}.damaged" in there for step in done if newest is None or step > int(newest.name[5:]))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_disk_that_does_not_answer_makes_no_checkpoint_a_damaged_one(
    number: int, three_checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(three_checkpoints, tmp_path / "run"))

    class Bad(zipfile.ZipFile):
        def open(self, *arguments: Any, **options: Any) -> Any:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(zipfile, "ZipFile", Bad)
    with pytest.raises(errors.RunFolderError, match=os.strerror(number)):
        recovery.put_in_order(run)
    with pytest.raises(errors.ArchiveError, match="cannot be read"):
        integrity.require_whole(run / "step-3" / "policy.pt")
    assert {path.name for path in run.iterdir()} == {"step-1", "step-2", "step-3"}


def load_or_none(checkpoint: Path) -> str | None:
    """All that a checkpoint holds, as text; None if it cannot be loaded."""
    try:
        return repr([load(checkpoint / name) for name in recovery.FILES_OF_A_CHECKPOINT])
    except Exception:
        return None


@pytest.fixture
def stopped_run(fake_clone: Path, three_checkpoints: Path, tmp_path: Path) -> Path:
    """The folder of a run that crashed after three checkpoints, in the working folder `tmp_path / "work"`."""
    made = run_ambersafe("sft", "--no-preflight", "--exp-name", "run", cwd=tmp_path / "work", env={"FAKE": "crash"})
    assert made.returncode == 3, made.stderr
    run = only_run(tmp_path / "work", "run")
    shutil.copytree(three_checkpoints, run, dirs_exist_ok=True)
    return run


def answer(run: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a command beside a run that was damaged: whatever it says, it is no defect of ours."""
    done = run_ambersafe(*command, cwd=run.parents[2])
    assert done.returncode != 70, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_resume_takes_the_newest_checkpoint_that_is_whole_and_says_what_it_passed_over(stopped_run: Path) -> None:
    fault = "the same, resumed"
    rng = generator(fault)
    work = stopped_run.parents[2]
    for number in range(tries(fault)):
        shutil.copytree(work, work.with_name(f"work-{number}"), symlinks=True)
        run = only_run(work.with_name(f"work-{number}"), "run")
        record = (run / "run.json").read_text().replace(str(work), str(run.parents[2]))
        (run / "run.json").write_text(record)
        with (run / "step-3" / "policy.pt").open("r+b") as file:
            file.seek(rng.randrange(10_000, 40_000))  # in the middle of the weights
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
        done = answer(run, "resume", "--allow-modified")
        assert done.returncode == 0, done.stderr
        assert f"{run}/step-3 is not whole, and is kept as step-3.damaged: policy.pt: a byte of it" in done.stderr
        assert f"going on from {run}/step-2" in done.stderr
        assert json.loads((run / "called.json").read_text())["config"]["resume"] == f"{run}/step-2"
        note(fault, {1, 2} - faults.whole_checkpoints(run))


NEEDED = ("stage", "attempts", "command", "environment", "model", "upstream", "next_command", "started", "status")
DAMAGED_RECORDS: tuple[Callable[[dict[str, Any], random.Random], bytes], ...] = (
    lambda record, rng: json.dumps(record).encode()[: rng.randrange(len(json.dumps(record)))],
    lambda record, rng: b"",
    lambda record, rng: rng.randbytes(300),
    lambda record, rng: json.dumps({**record, "schema": 2}).encode(),
    lambda record, rng: json.dumps([record]).encode(),
    lambda record, rng: json.dumps({k: v for k, v in record.items() if k != rng.choice(NEEDED)}).encode(),
    lambda record, rng: json.dumps({**record, rng.choice(NEEDED): rng.choice([None, 3, "\0", [], [None]])}).encode(),
    lambda record, rng: b"[" * 100_000,
)


def test_a_run_json_that_is_damaged_is_said_and_left_as_it_is(stopped_run: Path) -> None:
    fault = "run.json damaged"
    rng = generator(fault)
    path = stopped_run / "run.json"
    record = json.loads(path.read_text())
    for number in range(tries(fault)):
        written = DAMAGED_RECORDS[number % len(DAMAGED_RECORDS)](record, rng)
        if records_problem(written) is None:
            continue  # what was drawn says the same
        path.write_bytes(written)
        (stopped_run / "run.json.new").write_bytes(written[:20])  # as a kill leaves it
        listed = answer(stopped_run, "runs")
        assert listed.returncode == 0
        assert f"note: {path} " in listed.stderr
        resumed = answer(stopped_run, "resume", stopped_run)
        assert resumed.returncode == 74
        assert str(path) in resumed.stderr
        assert answer(stopped_run, "resume").returncode == 64
        again = answer(stopped_run, "sft", "--no-preflight", f"local_run_dir={stopped_run}")
        assert again.returncode == 64
        assert "is not empty" in again.stderr
        archived = answer(stopped_run, "dpo", "--archive", stopped_run / "step-3", "--dry-run")
        assert archived.returncode == 0
        assert str(path) in archived.stderr
        note(fault, [] if path.read_bytes() == written else [path])


def records_problem(written: bytes) -> str | None:
    try:
        return records.problem(json.loads(written))
    except (ValueError, RecursionError) as error:
        return str(error)


def test_a_train_log_that_is_damaged_stops_nothing(stopped_run: Path) -> None:
    fault = "train.log damaged"
    rng = generator(fault)
    log = stopped_run / "train.log"
    good = b"eval after 16: {'loss/eval': '1.25'}\n" * 20 + b"\n=== ambersafe: attempt 2\n"
    ways = (
        lambda: good[: rng.randrange(len(good))],
        lambda: rng.randbytes(5000),
        lambda: good + b"=== ambersafe: attempt x\n=== ambersafe: attempt " + b"9" * 5000 + b"\n",
        lambda: b"eval after " + b"9" * 5000 + b": {'a': 1}\neval after 1: {'a': 1" + b"0" * 400 + b"}\n",
    )
    record = (stopped_run / "run.json").read_bytes()
    for number in range(tries(fault)):
        (stopped_run / "run.json").write_bytes(record)
        shutil.rmtree(stopped_run / "LATEST", ignore_errors=True)
        written = ways[number % len(ways)]()
        log.write_bytes(written)
        done = answer(stopped_run, "resume", "--allow-modified")
        assert done.returncode == 0, done.stderr
        assert json.loads((stopped_run / "run.json").read_text())["status"] == "finished"
        note(fault, [] if log.read_bytes().startswith(written) else [log])


@pytest.mark.parametrize("whole", [True, False])
def test_what_a_kill_leaves_goes_away_and_what_it_had_renamed_comes_back(
    whole: bool, three_checkpoints: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(three_checkpoints, run)
    for name in ("LATEST.partial", "step-9.partial", "step-1.deleted", "LATEST.old"):
        shutil.copytree(run / "step-1", run / name)
    (run / "run.json.0123abcd.new").write_text("{")
    os.utime(run / "run.json.0123abcd.new", (1, 1))
    (run / "run.json").write_text("{}")
    (run / "run.json.89abcdef.new").write_text("{")  # is being written now
    (run / "run.json.00000000.new").symlink_to("renamed")  # as one that another process renames while we look
    mine = [run / "step-x.partial", run / "notes.old"]  # whatever that is, it is not ours
    for path in mine:
        path.mkdir()
    if whole:
        shutil.copytree(run / "step-3", run / "step-3.old")
    else:
        (run / "step-3").rename(run / "step-3.old")
    assert recovery.put_in_order(run) == run / "step-3"
    left = {path.name for path in run.iterdir()}
    assert left == {
        "step-1",
        "step-2",
        "step-3",
        "LATEST",
        "run.json",
        "run.json.89abcdef.new",
        "run.json.00000000.new",
        *(path.name for path in mine),
    }


# --- setup is killed, and the clone damaged ---


def setup_in_child(folder: Path, wanted: cloning.Wanted, force: bool, scratch: Path) -> None:  # noqa: F811
    os.setsid()
    os.environ["TMPDIR"] = str(scratch)
    set_up(folder, wanted, force)


def edited_clone(folder: Path, source: Path) -> str:  # noqa: F811
    """A clone that a user made and worked in; returns the id of the user's commit."""
    git(source, "clone", "--quiet", str(source), str(folder))
    mine = commit(folder, {"mine.txt": "mine\n"}, "Mine")
    (folder / "train.py").write_text(train(_10="edited\n"))
    return mine


def users_things_are_there(folder: Path, mine: str) -> list[str]:
    """What is lost of what `edited_clone` made."""
    found = git(folder, "log", "--all", "--format=%H").split()
    texts = [(folder / "train.py").read_text() if (folder / "train.py").exists() else ""]
    texts += [git(folder, "show", f"{c}:train.py") + "\n" for c in git(folder, "stash", "list", "--format=%H").split()]
    return [name for name, ok in (("commit", mine in found), ("edit", train(_10="edited\n") in texts)) if not ok]


def test_a_setup_that_is_killed_at_any_moment_is_finished_by_the_next(
    wanted: cloning.Wanted,  # noqa: F811
    source: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    fault = "kill -9 of setup"
    rng = generator(fault)
    takes: dict[str, float] = {}
    for number in range(tries(fault)):
        folder = tmp_path / str(number) / "clone"
        folder.parent.mkdir()
        kind = ("new", "minimal", "edited")[number % 3]
        mine = edited_clone(folder, source) if kind == "edited" else ""
        if kind == "minimal":
            set_up(folder, replace(wanted, minimal=True))
        if kind not in takes:  # one that is not killed, to know in what time the others are to be
            other = tmp_path / f"{number}-whole" / "clone"
            other.parent.mkdir()
            if folder.exists():
                copy(folder, other)
            began = time.monotonic()
            set_up(other, wanted, kind == "edited")
            takes[kind] = time.monotonic() - began
        child = CHILD.Process(target=setup_in_child, args=(folder, wanted, kind == "edited", folder.parent))
        child.start()
        time.sleep(rng.random() * takes[kind])
        assert child.pid
        wait = faults.wait_until(lambda pid=child.pid: os.getpgid(pid) == pid, 1)  # type: ignore[misc]
        if wait:
            os.killpg(child.pid, signal.SIGKILL)
        child.join()
        lost = users_things_are_there(folder, mine) if kind == "edited" else []
        finish_setup(folder, wanted, kind == "edited")
        lost += users_things_are_there(folder, mine) if kind == "edited" else []
        note(fault, lost)
        shutil.rmtree(folder.parent)


def finish_setup(folder: Path, wanted: cloning.Wanted, force: bool) -> None:  # noqa: F811
    """Set up once more; what it cannot mend itself it says, with what mends it."""
    try:
        set_up(folder, wanted, force)
    except errors.CloneError as error:
        command = shlex.split(error.hint.split("`")[1])
        assert command[0] == "rm", error.hint
        assert all(path.startswith(f"{folder}/.git/") and path.endswith(".lock") for path in command[1:])
        subprocess.run(command, check=True)
        set_up(folder, wanted, force)
    state = upstream.inspect(folder, wanted.series)
    assert state.is_exactly(wanted.commit, wanted.patches)


@pytest.mark.parametrize("name", ["index.lock", "HEAD.lock", "refs/heads/ambersafe.lock", "refs/stash.lock"])
def test_a_lock_of_git_that_was_left_is_named_with_what_to_do(
    name: str,
    whole_clone: Path,  # noqa: F811
    wanted: cloning.Wanted,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = copy(whole_clone, tmp_path / "clone")
    lock = folder / ".git" / name
    lock.touch()
    (folder / "train.py").write_text("mine\n")
    minimal = replace(wanted, minimal=True)
    for force in (False, True):
        with pytest.raises(errors.CloneError) as caught:
            set_up(folder, minimal, force)
        assert f"`rm {lock}`" in caught.value.hint
        assert (folder / "train.py").read_text() == "mine\n"
    lock.unlink()
    set_up(folder, minimal, force=True)
    assert_complete(folder, minimal)


def test_a_clone_with_a_damaged_file_is_mended_or_it_is_said_how(
    whole_clone: Path,  # noqa: F811
    wanted: cloning.Wanted,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cloning, "PINNED_COMMIT", wanted.commit)
    fault = "file of the clone cut, flipped or deleted"
    rng = generator(fault)
    for number in range(tries(fault)):
        folder = tmp_path / str(number) / "clone"
        folder.parent.mkdir()
        copy(whole_clone, folder)
        is_edited = number % 3 == 0
        if is_edited:
            (folder / "config" / "config.yaml").write_text("mine: 1\n")
        files = sorted(path for path in folder.rglob("*") if path.is_file() and "hooks" not in path.parts)
        path = rng.choice([p for p in files if p.name != "config.yaml"])
        if number % 5 == 4:  # as a setup that was killed leaves it
            path = folder / ".git" / "ambersafe-checkout"
            path.write_text(f"{git(folder, 'rev-parse', 'HEAD')} {wanted.commit}")
        what = f"{path.relative_to(folder)} {faults.damage_file(path, rng, ('cut', 'flip', 'delete'))}"
        try:
            set_up(folder, wanted)
        except errors.AmberSafeError as error:
            assert error.hint, (what, error.message)
            assert str(folder) in error.message + error.hint, (what, error.message, error.hint)
        lost = is_edited and (folder / "config" / "config.yaml").read_text() != "mine: 1\n"
        note(fault, [what] if lost else [])
        shutil.rmtree(folder.parent)


# --- two at once ---


def start_all(count: int, work: Path, *command: object) -> list[tuple[int, str]]:
    """Start a command several times at the same moment; the exit status of each, and what it said."""
    mark = f"race-{work}"
    environment = {**os.environ, **faults.marked_environment(mark)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "ambersafe_cli", *map(str, command)],
            cwd=work,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=faults.die_with_parent,
        )
        for _ in range(count)
    ]
    ended = [(child.wait(timeout=120), child.stderr.read() if child.stderr else "") for child in started]
    assert not faults.left_over(mark, 5)
    return ended


def test_of_two_resumes_at_once_one_wins(stopped_run: Path) -> None:
    fault = "two resumes at once"
    record = (stopped_run / "run.json").read_bytes()
    for _ in range(tries(fault)):
        (stopped_run / "run.json").write_bytes(record)
        shutil.rmtree(stopped_run / "LATEST", ignore_errors=True)
        ended = start_all(2, stopped_run.parents[2], "resume", "--allow-modified", stopped_run)
        assert sorted(status for status, _ in ended) == [0, 64], ended
        assert any("is still running" in said or "has finished" in said for _, said in ended)
        assert len(json.loads((stopped_run / "run.json").read_text())["attempts"]) == 2
        note(fault, {1, 2, 3} - faults.whole_checkpoints(stopped_run))


def test_several_sft_at_once_never_share_a_folder(fake_clone: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    fault = "several sft at once"
    for number in range(tries(fault)):
        ended = start_all(3, work, "sft", "--no-preflight", "--exp-name", f"same-{number}")
        assert [status for status, _ in ended] == [0, 0, 0], ended
        found = list(work.glob(f".cache/*/same-{number}_*"))
        called = {json.loads((run / "called.json").read_text())["config"]["local_run_dir"] for run in found}
        note(fault, {str(run) for run in found} ^ called)
        assert len(called) == 3
    fault = "several sft in one folder at once"
    for number in range(tries(fault)):
        run = tmp_path / f"one-{number}"
        ended = start_all(3, work, "sft", "--no-preflight", f"local_run_dir={run}")
        assert sorted(status for status, _ in ended) == [0, 64, 64], ended
        attempts_made = json.loads((run / "run.json").read_text())["attempts"]
        note(fault, attempts_made[1:])


def test_a_folder_that_another_run_has_taken_meanwhile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("another run's")
    with pytest.raises(errors.UsageError, match="not empty"):
        attempts.run(launch.Launch(tmp_path, tmp_path, ("false",), {}, 1, ()), {}, plain=False)
    assert (tmp_path / "run.json").read_text() == "another run's"


def test_several_setups_at_once_all_end_well(patched: Path, tmp_path: Path) -> None:
    fault = "several setups at once"
    for number in range(tries(fault)):
        work = tmp_path / str(number)
        work.mkdir()
        assert [status for status, _ in start_all(3, work, "setup", "--repo", patched)] == [0, 0, 0]
        made = work / upstream.DEFAULT_FOLDER
        note(fault, [] if git(made, "rev-parse", "HEAD") == git(patched, "rev-parse", "HEAD") else [made])


def test_setup_leaves_the_clone_of_a_running_training_alone(fake_clone: Path, tmp_path: Path) -> None:
    work, mark = tmp_path / "work", f"hang-{tmp_path}"
    environment = {**os.environ, **faults.marked_environment(mark), "FAKE": "hang"}
    command = [sys.executable, "-m", "ambersafe_cli", "sft", "--no-preflight"]
    child = subprocess.Popen(
        command, cwd=work, env=environment, stdout=subprocess.PIPE, preexec_fn=faults.die_with_parent
    )
    assert child.stdout
    assert child.stdout.readline().startswith(b"started")
    head = git(fake_clone, "rev-parse", "HEAD")
    try:
        for flags in (("--minimal",), ("--force",)):
            done = run_ambersafe("setup", *flags, "--dir", fake_clone, "--repo", fake_clone, cwd=work)
            assert done.returncode in (69, 71), done.stderr
            note("setup while a training runs", [] if git(fake_clone, "rev-parse", "HEAD") == head else [head])
    finally:
        faults.kill_marked(mark)
        child.wait()

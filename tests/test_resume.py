"""Runs that are stopped, killed and resumed, with the real upstream."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import git, load, numbers, only_run, records_of, run_ambersafe
from test_real_upstream import TINY, model, rows  # noqa: F401, fixtures

from ambersafe_cli import metrics, resuming, runs
from ambersafe_cli.errors import UsageError

pytestmark = pytest.mark.slow

STEPS = 30
SETTINGS = (
    *TINY,
    "n_epochs=null",
    f"n_examples={16 * STEPS}",
    "eval_every=128",
    "save_every_examples=32",
    "keep_checkpoints=3",
    "lr_decay=cosine",
)


def start(stage: str, work: Path, *given: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "ambersafe_cli", stage, *map(str, given)]
    return subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kill_with_everything_it_started(child: "subprocess.Popen[bytes]", run: Path) -> None:
    """As when the machine goes down: no handler of anybody's runs."""
    child.kill()
    child.wait()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run).encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue


@pytest.fixture(scope="module")
def whole(patched: Path, model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A working folder with both stages, never disturbed."""
    work = tmp_path_factory.mktemp("whole")
    given = ("--dir", patched, "--model", model, "--data", rows, "--trainer", "BasicTrainer")
    for stage in ("sft", "dpo"):
        done = run_ambersafe(stage, *given, "--exp-name", stage, *SETTINGS, cwd=work)
        assert done.returncode == 0, done.stderr
    return work


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_run_that_is_killed_at_random_steps_ends_with_the_numbers_of_one_that_is_not(
    stage: str,
    whole: Path,
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    rng = random.Random(os.environ.get("AMBERSAFE_TEST_SEED", stage))
    given = ["--dir", patched, "--model", model, "--data", rows, "--trainer", "BasicTrainer"]
    given += ["--archive", only_run(whole, "sft")] if stage == "dpo" else []
    child = start(stage, tmp_path, *given, "--exp-name", stage, *SETTINGS)
    # Not at the last steps: a kill that comes a moment late has to find the run still training.
    steps = max(each.examples for each in records_of(only_run(whole, stage))) // 16
    kills = sorted(rng.sample(range(2, steps - 2), 3))
    for kill in kills:
        wait_for_step(child, kill * 16)
        time.sleep(rng.random() * 0.2)  # in the middle of a step, or of a save
        run = only_run(tmp_path, stage)
        kill_with_everything_it_started(child, run)
        assert not list(run.glob("LATEST")), f"killed after its end, {kills}"
        child = start("resume", tmp_path)
    output = child.communicate()[0].decode()
    assert child.returncode == 0, output

    run = only_run(tmp_path, stage)
    assert numbers(run) == numbers(only_run(whole, stage)), kills
    assert len({dict(values).get("learning_rate") for values in numbers(run).values()}) > STEPS / 2
    mine, theirs = load(run / "LATEST" / "policy.pt"), load(only_run(whole, stage) / "LATEST" / "policy.pt")
    assert all(bool((mine["state"][name] == theirs["state"][name]).all()) for name in theirs["state"])
    record = json.loads((run / "run.json").read_text())
    assert len(record["attempts"]) == 4
    assert record["status"] == "finished"
    evaluations = [(r.examples, r.attempt) for r in metrics.read_log(run / "train.log").evaluations]
    evaluated_again = len(evaluations) - len({examples for examples, _ in evaluations})
    assert evaluated_again <= len(kills), "only one whose checkpoint was not yet whole is done again"


def wait_for_step(child: "subprocess.Popen[bytes]", examples: int) -> None:
    assert child.stdout
    seen = b""
    for line in child.stdout:
        seen += line
        match = re.match(rb"train stats after (\d+)", line)
        if match and int(match[1]) >= examples:
            return
    raise AssertionError(seen.decode())


def test_ctrl_c_saves_at_the_end_of_the_step_and_resume_goes_on_from_there(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    for number, ranks in ((signal.SIGINT, ()), (signal.SIGTERM, ("--nproc", "2"))):
        work = tmp_path / number.name
        work.mkdir()
        given = ("--dir", patched, "--model", model, "--data", rows, *ranks, *SETTINGS, "save_every_examples=null")
        child = start("sft", work, "--exp-name", "run", *given)
        wait_for_step(child, 48)
        child.send_signal(number)
        output = child.communicate(timeout=60)[0].decode()
        assert child.returncode == 128 + number
        run = only_run(work, "run")
        assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
        (checkpoint,) = run.glob("step-*")
        assert f"ambersafe resume {run}" in output
        stopped_at = int(checkpoint.name[5:])
        done = run_ambersafe("resume", cwd=work)
        assert done.returncode == 0, done.stderr
        second = [r for r in records_of(run) if r.attempt == 2]
        assert min(r.examples for r in second if r.kind == "train") == stopped_at + 16
        again = run_ambersafe("resume", run, cwd=work)
        assert again.returncode == 64
        assert "has finished" in again.stderr


def test_a_checkpoint_that_is_cut_off_is_passed_over(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    given = ("--dir", patched, "--model", model, "--data", rows, *SETTINGS)
    child = start("sft", tmp_path, "--exp-name", "run", *given)
    wait_for_step(child, 144)
    run = only_run(tmp_path, "run")
    kill_with_everything_it_started(child, run)
    newest = max(run.glob("step-*[0-9]"), key=lambda path: int(path.name[5:]))
    with (newest / "policy.pt").open("r+b") as file:
        file.truncate(1000)
    done = run_ambersafe("resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"going on from {run}" in done.stderr
    assert f"going on from {newest}" not in done.stderr


def test_a_run_does_not_go_on_with_a_clone_that_has_changed(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(patched, clone)
    child = start("sft", tmp_path, "--exp-name", "run", "--dir", clone, "--model", model, "--data", rows, *SETTINGS)
    wait_for_step(child, 48)
    second = run_ambersafe("resume", only_run(tmp_path, "run"), cwd=tmp_path)
    assert second.returncode == 64
    assert "is still running" in second.stderr
    changed = run_ambersafe("setup", "--minimal", "--dir", clone, cwd=tmp_path)
    assert changed.returncode == 71
    assert "A training runs from" in changed.stderr
    kill_with_everything_it_started(child, only_run(tmp_path, "run"))
    (clone / "utils.py").write_text((clone / "utils.py").read_text() + "# mine\n")
    run = only_run(tmp_path, "run")
    recorded = (run / "run.json").read_text()
    (run / "run.json").write_text(recorded.replace(git(clone, "rev-parse", "HEAD"), "0" * 40))
    gone = run_ambersafe("resume", cwd=tmp_path)
    assert gone.returncode == 71
    assert "no patch of this ambersafe makes 000000000000" in gone.stderr
    (run / "run.json").write_text(recorded)
    done = run_ambersafe("resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "with edits, and the run was started with" in done.stderr
    assert (
        "# mine" not in (tmp_path / "clone.worktrees" / git(clone, "rev-parse", "HEAD")[:12] / "utils.py").read_text()
    )
    assert "# mine" in (clone / "utils.py").read_text()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_checkpoint(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    given = ("--dir", patched, "--model", model, "--data", rows, *SETTINGS, "lr=1e30", "warmup_steps=0")
    done = run_ambersafe("sft", *given, "save_every_examples=16", "--exp-name", "run", cwd=tmp_path)
    assert done.returncode == 1
    run = only_run(tmp_path, "run")
    assert re.search(rf"is not finite; the last checkpoint is {re.escape(str(run))}/step-\d+", done.stderr)
    assert not (run / "LATEST").exists()


def test_old_checkpoints_go_and_the_best_stays(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    given = ("--dir", patched, "--model", model, "--data", rows, *TINY, "eval_every=16", "n_epochs=4")
    # A learning rate that makes it worse and worse: the best evaluation is an early one.
    flags = ("--keep", "1", "--keep-best", "loss/eval", "--lr", "0.05")
    done = run_ambersafe("sft", *given, *flags, "--exp-name", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path, "run")
    evaluations = [r for r in metrics.read_log(run / "train.log").evaluations if r.examples][:-1]
    best = min(evaluations, key=lambda r: r.values["loss/eval"]).examples
    assert {path.name for path in run.glob("step-*")} == {f"step-{best}", f"step-{evaluations[-1].examples}"}


@pytest.mark.parametrize(("kept", "held", "more"), [(2, 1, 3), (2, 2, 2), (2, 3, 2), (None, 1, 2), (None, 5, 2)])
def test_resume_looks_whether_the_disk_has_room_for_what_is_still_to_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int | None, held: int, more: int
) -> None:
    """Before it loads anything: a checkpoint is written before an older one goes, and LATEST comes besides."""
    for step in range(1, held + 1):
        (tmp_path / f"step-{step}").mkdir()
        for name in ("policy.pt", "optimizer.pt"):
            (tmp_path / f"step-{step}" / name).write_bytes(b"x" * 500)
    run = runs.Run(tmp_path, {"values": {"keep_checkpoints": kept}, "overrides": []}, "failed")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=more * 1000))
    resuming._require_room(run, tmp_path / f"step-{held}")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=more * 1000 - 1))
    with pytest.raises(UsageError, match=f"room for {more} more checkpoints"):
        resuming._require_room(run, tmp_path / f"step-{held}")

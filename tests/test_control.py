"""Runs in the background, stopped from elsewhere, going on with the series that they were started with, done again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ambersafe, git, numbers, only_run, run_ambersafe
from test_launch import is_running
from test_real_upstream import model, rows  # noqa: F401, fixtures
from test_resume import SETTINGS, kill_with_everything_it_started, start, wait_for_step

from ambersafe_cli import locks, recovery, resuming, runs, upstream


def wait_until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_a_detached_run_outlives_its_terminal_and_stop_ends_it(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    command = [sys.executable, "-m", "ambersafe_cli", "sft", "--recipe", "tiny", "--model", "m", "--exp-name", "run"]
    terminal = subprocess.Popen(
        [*command, "--no-preflight", "--detach", "--data", "org/rows"],
        cwd=work,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "FAKE": "hang"},
    )
    said = terminal.communicate(timeout=60)[1].decode()
    assert terminal.returncode == 0, said
    run = only_run(work, "run")
    assert f"ambersafe stop {run.name}" in said
    assert runs.is_running(run)
    wait_until(lambda: b"started" in (run / "train.log").read_bytes())
    # what trains is deaf to SIGTERM: a second word kills it
    stopped = ambersafe("stop", "--now")
    assert stopped.returncode == 0, stopped.stderr
    assert not runs.is_running(run)
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["exit_status"]) == ("interrupted", 130)
    worker = int((run / "train.log").read_text().split("started ")[1].split()[0])
    assert not is_running(worker)
    for given in ([], [run.name]):
        again = ambersafe("stop", *given)
        assert again.returncode == 64
        assert "running" in again.stderr


def test_a_detached_run_that_cannot_start_says_why(ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path) -> None:
    given = ("--recipe", "tiny", "--model", "m", "--exp-name", "run", "--no-preflight", "--data", "org/rows")
    done = ambersafe("sft", *given, env={"FAKE": "crash"})
    assert done.returncode == 3
    run = only_run(tmp_path / "work", "run")
    shutil.rmtree(fake_clone)
    done = ambersafe("resume", "--allow-modified", run.name, "--detach")
    assert done.returncode == 71
    assert "There is no clone of upstream" in done.stderr


def test_a_stop_request_from_before_does_not_end_the_next_attempt(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path
) -> None:
    given = ("--recipe", "tiny", "--model", "m", "--exp-name", "run", "--no-preflight", "--data", "org/rows")
    assert ambersafe("sft", *given, env={"FAKE": "crash"}).returncode == 3
    run = only_run(tmp_path / "work", "run")
    (run / "stop").touch()
    done = ambersafe("resume", "--allow-modified", run.name)
    assert done.returncode == 0, done.stderr
    assert not (run / "stop").exists()


@pytest.mark.slow
def test_stop_saves_a_checkpoint_that_resume_goes_on_from(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    # long enough not to be over before it is looked for a request
    longer = ("save_every_examples=null", "n_examples=1200", "eval_every=1200")
    given = ("--dir", patched, "--model", model, "--data", rows, *SETTINGS, *longer)
    child = start("sft", tmp_path, "--exp-name", "run", *given)
    wait_for_step(child, 48)
    run = only_run(tmp_path, "run")
    done = run_ambersafe("stop", run.name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGINT
    assert len(list(run.glob("step-*"))) == 1
    moved = tmp_path / "elsewhere"
    run.rename(moved)
    done = run_ambersafe("resume", moved, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (moved / "LATEST" / "policy.pt").exists()
    assert not run.exists()


def another_series(clone: Path) -> str:
    """Make another series of the clone's as a newer version of this tool might: other commits on the branch."""
    old = git(clone, "rev-parse", "HEAD")
    git(clone, "branch", f"ambersafe-{old[:12]}", old)
    source = (clone / "trainers.py").read_text()
    (clone / "trainers.py").write_text(source.replace("train stats after", "stats of training after"))
    git(clone, "commit", "--quiet", "--all", "--message", "Say it otherwise")
    return old


@pytest.mark.slow
def test_older_runs_go_on_and_are_done_again_with_the_series_they_were_started_with(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(patched, clone)
    given = ("--dir", clone, "--model", model, "--data", rows, *SETTINGS)
    child = start("sft", tmp_path, "--exp-name", "run", *given)
    wait_for_step(child, 112)
    run = only_run(tmp_path, "run")
    kill_with_everything_it_started(child, run)
    old = another_series(clone)
    done = run_ambersafe("resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{clone} is at" in done.stderr
    assert "stats of training" not in (run / "train.log").read_text()
    worktree = tmp_path / "clone.worktrees" / old[:12]
    assert git(worktree, "rev-parse", "HEAD") == old
    assert json.loads((run / "run.json").read_text())["attempts"][1]["upstream"]["head"] == old

    (worktree / "utils.py").unlink()  # as if it had been killed while it was made
    done = run_ambersafe("reproduce", run.name, cwd=tmp_path, env={"OMP_NUM_THREADS": "2", "NCCL_DEBUG": "INFO"})
    assert done.returncode == 0, done.stderr
    assert "variables.NCCL_DEBUG was not set, and is INFO" in done.stderr
    assert "are the same to every printed digit" in done.stderr
    second = max((tmp_path / ".cache").glob("*/run_*"), key=lambda path: path.name)
    assert second != run
    assert numbers(second) == numbers(run)

    (worktree / "utils.py").write_text("mine\n")
    done = run_ambersafe("reproduce", run.name, "--dry-run", cwd=tmp_path)
    assert done.returncode == 71
    assert "was edited" in done.stderr
    assert (worktree / "utils.py").read_text() == "mine\n"


@pytest.mark.slow
def test_setup_keeps_the_series_that_it_replaces(patched: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(patched, clone)
    old = git(clone, "rev-parse", "HEAD")
    assert run_ambersafe("setup", "--minimal", "--dir", clone, cwd=tmp_path).returncode == 0
    assert git(clone, "rev-parse", "HEAD") != old
    assert git(clone, "rev-parse", f"ambersafe-{old[:12]}") == old
    assert git(clone, "branch", "--show-current") == upstream.BRANCH


@pytest.mark.slow
def test_reproduce_lists_what_differs_and_says_when_the_metrics_do(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = tmp_path / "rows"
    shutil.copytree(rows, data)
    given = ("--dir", patched, "--model", model, "--data", data, *SETTINGS, "n_examples=48")
    assert run_ambersafe("sft", *given, "--exp-name", "run", cwd=tmp_path).returncode == 0
    run = only_run(tmp_path, "run")
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    dry = run_ambersafe("reproduce", run.name, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0
    assert "data.fingerprint.train was" in dry.stderr
    assert "data.fingerprint.test was" not in dry.stderr
    assert len(list((tmp_path / ".cache").glob("*/run_*"))) == 1
    done = run_ambersafe("reproduce", run.name, cwd=tmp_path)
    assert done.returncode == 78, done.stderr
    assert "Not reproduced: 2 of 2 metrics differ" in done.stderr


def test_to_ask_whether_a_run_is_running_is_not_in_the_way_of_one_that_starts(tmp_path: Path) -> None:
    asking = threading.Event()

    def ask() -> None:
        while not asking.is_set():
            runs.is_running(tmp_path)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        for _ in range(300):
            with locks.locked(tmp_path):
                assert runs.is_running(tmp_path)
    finally:
        asking.set()
        asker.join()


def test_a_working_folder_whose_name_is_no_utf_8(fake_clone: Path, tmp_path: Path) -> None:
    work = tmp_path / os.fsdecode(b"odd \xff")
    work.mkdir()
    given = ("--dir", fake_clone, "--recipe", "tiny", "--model", "m", "--exp-name", "run", "--data", "org/rows")
    done = run_ambersafe("sft", *given, "--no-preflight", cwd=work)
    assert done.returncode == 0, done.stderr
    record = runs.read(only_run(work, "run"))
    assert record
    assert record["working_folder"] == str(work)


GIVEN = ("--recipe", "tiny", "--model", "m", "--exp-name", "run", "--no-preflight", "--data", "org/rows")


def stopped(ambersafe: Ambersafe, work: Path) -> Path:
    """A run that has failed, and can be resumed."""
    assert ambersafe("sft", *GIVEN, env={"FAKE": "crash"}).returncode == 3
    return only_run(work, "run")


def test_a_stop_request_while_a_resume_makes_ready_is_heard(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(ambersafe, tmp_path / "work")
    monkeypatch.setattr(recovery, "put_in_order", lambda folder: locks.ask_to_stop(folder))
    monkeypatch.setenv("FAKE", "wait")
    python = json.loads((run / "run.json").read_text())["command"][0]
    assert resuming.resume(str(run), python, True, False, plain=False) == 130
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"


def test_a_signal_that_comes_when_all_is_saved_does_not_undo_the_run(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "ambersafe_cli", "sft", *GIVEN]
    environment = {**os.environ, "FAKE": "finish"}
    child = subprocess.Popen(command, cwd=tmp_path / "work", stdout=subprocess.PIPE, env=environment)
    assert child.stdout
    next(line for line in child.stdout if line == b"waiting\n")
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=30) == 0
    assert json.loads((only_run(tmp_path / "work", "run") / "run.json").read_text())["status"] == "finished"


def test_a_run_on_another_machine_that_shows_no_lock_is_told_by_its_sign_of_life(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path
) -> None:
    run = stopped(ambersafe, tmp_path / "work")
    record = json.loads((run / "run.json").read_text())
    record["status"] = "running"
    record["attempts"][-1]["host"] = "another-node"
    (run / "run.json").write_text(json.dumps(record))
    (run / ".lock").touch()
    assert "running" in ambersafe("runs").stdout
    refused = ambersafe("resume", "--allow-modified", run.name)
    assert refused.returncode == 64
    assert "still running on another-node" in refused.stderr
    long_ago = time.time() - locks.SIGN_OF_LIFE - 5
    os.utime(run / ".lock", (long_ago, long_ago))
    assert "died" in ambersafe("runs").stdout
    done = ambersafe("resume", "--allow-modified", run.name)
    assert done.returncode == 0, done.stderr


def test_resume_without_a_name_passes_over_a_run_that_is_running(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path
) -> None:
    first = stopped(ambersafe, tmp_path / "work")
    command = [sys.executable, "-m", "ambersafe_cli", "sft", *GIVEN]
    environment = {**os.environ, "FAKE": "wait"}
    second = subprocess.Popen(command, cwd=tmp_path / "work", stdout=subprocess.PIPE, env=environment)
    assert second.stdout
    next(line for line in second.stdout if line == b"waiting\n")
    done = ambersafe("resume", "--allow-modified")
    assert done.returncode == 0, done.stderr
    assert str(first) in done.stderr
    second.send_signal(signal.SIGTERM)
    assert second.wait(timeout=30) == 143


def test_ctrl_c_while_a_run_goes_to_the_background_leaves_none_there(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    (work / "sitecustomize.py").write_text("import sys, time\nif 'resume' in sys.orig_argv:\n    time.sleep(8)\n")
    environment = {**os.environ, "FAKE": "wait", "PYTHONPATH": str(work)}
    command = [sys.executable, "-m", "ambersafe_cli", "sft", *GIVEN, "--detach"]
    child = subprocess.Popen(command, cwd=work, env=environment, stderr=subprocess.PIPE)
    wait_until(lambda: bool(list((work / ".cache").glob("*/run_*/launcher.log"))))
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=30)
    assert child.returncode == 130
    time.sleep(1)
    assert not runs.is_running(only_run(work, "run"))


def test_a_detached_run_takes_no_module_from_the_working_folder(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path
) -> None:
    (tmp_path / "work" / "yaml.py").write_text("raise SystemExit('a module of the working folder')\n")
    script = Path(sys.executable).with_name("ambersafe")
    done = subprocess.run([script, "sft", *GIVEN, "--detach"], cwd=tmp_path / "work", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: not runs.is_running(only_run(tmp_path / "work", "run")))
    assert json.loads((only_run(tmp_path / "work", "run") / "run.json").read_text())["status"] == "finished"


def test_a_clone_with_other_edits_than_a_run_was_started_with_is_refused(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path
) -> None:
    train = fake_clone / "train.py"
    original = train.read_text()
    train.write_text(original + "# edit A\n")
    run = stopped(ambersafe, tmp_path / "work")
    train.write_text(original + "# edit B\n")
    refused = ambersafe("resume", run.name)
    assert refused.returncode == 71
    assert "with edits; the run was started with" in refused.stderr
    train.write_text(original + "# edit A\n")
    assert ambersafe("resume", "--allow-modified", run.name).returncode == 0


def test_the_best_checkpoint_may_be_the_last(tmp_path: Path) -> None:
    for name, loss in (("step-16", 2.0), ("step-32", 1.0), ("LATEST", 1.5), ("step-48", float("nan"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({"loss/eval": loss, "rewards_eval/accuracies": loss}))
    assert runs.best_checkpoint(tmp_path, "loss/eval") == (tmp_path / "step-32", 1.0)
    assert runs.best_checkpoint(tmp_path, "rewards_eval/accuracies") == (tmp_path / "step-16", 2.0)
    (tmp_path / "LATEST" / "metrics.json").write_text(json.dumps({"loss/eval": 0.5}))
    assert runs.best_checkpoint(tmp_path, "loss/eval") == (tmp_path / "LATEST", 0.5)
    assert runs.best_checkpoint(tmp_path, "nothing") is None


@pytest.mark.parametrize("spoil", ["overrides", "recipe", "values", "data.name", "sft_run"])
def test_a_record_that_lacks_what_reproduce_needs_is_an_error_or_enough(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path, spoil: str
) -> None:
    run = stopped(ambersafe, tmp_path / "work")
    record = json.loads((run / "run.json").read_text())
    record["recipe"]["a key of a later version"] = 1
    part, _, key = spoil.rpartition(".")
    del (record[part] if part else record)[key]
    (run / "run.json").write_text(json.dumps(record))
    done = ambersafe("reproduce", "--allow-modified", run.name, "--dry-run")
    # fake train.py has no config of upstream's
    assert done.returncode == (71 if spoil == "sft_run" else 64), done.stderr
    assert "defect" not in done.stderr


@pytest.mark.slow
def test_resume_and_reproduce_do_not_take_other_data_or_another_archive_for_the_runs(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = tmp_path / "rows"
    shutil.copytree(rows, data)
    given = ("--dir", patched, "--model", model, "--data", data, *SETTINGS)
    done = run_ambersafe("sft", *given, "--exp-name", "sft", "n_examples=32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    child = start("dpo", tmp_path, *given, "--exp-name", "run")
    wait_for_step(child, 48)
    run = only_run(tmp_path, "run")
    kill_with_everything_it_started(child, run)

    archive = only_run(tmp_path, "sft") / "LATEST" / "policy.pt"
    archive.rename(tmp_path / "policy.pt")
    shutil.copy(archive.with_name("optimizer.pt"), archive)
    refused = run_ambersafe("resume", cwd=tmp_path)
    assert refused.returncode == 66
    assert "is not the checkpoint that the run was started from" in refused.stderr
    archive.unlink()
    refused = run_ambersafe("reproduce", run.name, cwd=tmp_path)
    assert refused.returncode == 76
    assert "policy.pt" in refused.stderr
    (tmp_path / "policy.pt").rename(archive)

    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    refused = run_ambersafe("resume", cwd=tmp_path)
    assert refused.returncode == 65
    assert "are not those that the run was started with" in refused.stderr
    data.rename(tmp_path / "elsewhere")
    refused = run_ambersafe("reproduce", run.name, cwd=tmp_path)
    assert refused.returncode == 76
    assert len(list((tmp_path / ".cache").glob("*/run_*"))) == 1
    (tmp_path / "elsewhere").rename(data)
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")

    # it was never finished: compared is the last evaluation that both have
    done = run_ambersafe("reproduce", run.name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"reproduced: all \d+ metrics held out after 0 examples are the same", done.stderr)

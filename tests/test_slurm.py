"""Runs that Slurm has: the batch script, and, where it is installed, a real Slurm of two nodes on this machine."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
from conftest import Ambersafe, numbers, only_run, records_of, run_ambersafe
from test_machines import LONG, given, undisturbed, wait_until  # noqa: F401, fixtures
from test_real_upstream import TINY, model, rows  # noqa: F401, fixtures

from ambersafe_cli import slurm

# --- without Slurm ---

WISH = ("--slurm", "--nodes", "2", "--gpus-per-node", "8", "--no-preflight")


@pytest.fixture
def empty_model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def options_of(script: str) -> dict[str, str]:
    """The options of a batch script as sbatch reads them."""
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    words = [word for line in lines for word in shlex.split(line)]
    assert len(words) == len(lines), "each option is one word"
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def test_dry_run_prints_a_script_that_asks_for_what_the_flags_say(
    ambersafe: Ambersafe, fake_clone: Path, empty_model: Path
) -> None:
    asked = ("--partition", "a b", "--time", "1-12:00:00", "--account", "me", "--sbatch=--qos=high", "--bf16")
    done = ambersafe("sft", "--model", empty_model, *WISH, *asked, "--dry-run")
    assert done.returncode == 0, done.stderr
    found = options_of(done.stdout)
    assert (
        found.items()
        >= {
            "--nodes": "2",
            "--ntasks-per-node": "1",
            "--gpus-per-node": "8",
            "--partition": "a b",
            "--time": "1-12:00:00",
            "--account": "me",
            "--qos": "high",
            "--requeue": "",
            "--open-mode": "append",
        }.items()
    )
    run = Path(found["--output"]).parent
    # The interpreter of the tests is not this one, and the clone not of the series.
    assert re.search(rf"-m ambersafe_cli resume {run} --python \S+ --allow-modified\n", done.stdout)
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    assert not list(fake_clone.parent.glob(".cache/*"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--nodes", "2"), "--nodes is for --slurm."),
        (("--partition", "p"), "--partition is for --slurm."),
        (("--slurm",), "--slurm needs --gpus-per-node, or --nproc"),
        ((*WISH, "--nnodes", "2"), "--nnodes is not for --slurm"),
        ((*WISH, "--detach"), "--detach is not for --slurm"),
        ((*WISH, "--sbatch", "qos"), "Invalid value for '--sbatch': 'qos'"),
        ((*WISH, "--partition", "p\nid"), "cannot stand in a batch script"),
        ((*WISH, "--time", "5"), "--time 5 is 300 s, too short"),
        ((*WISH, "--time", "12h"), "Invalid value for '--time': '12h'"),
        ((*WISH, "--sbatch=--signal=USR2@10"), "--signal is what ambersafe itself tells sbatch"),
        ((*WISH, "--sbatch=-t 3"), "-t is what ambersafe itself tells sbatch"),
        (("--nnodes", "2"), "--nnodes 2 needs --node-rank."),
        (("--nnodes", "2", "--node-rank", "0"), "--nnodes 2 needs --rdzv-endpoint."),
        (("--nnodes", "2", "--node-rank", "2", "--rdzv-endpoint", "h:1"), "--node-rank 2 is none of 2 machines."),
        (("--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "h:x"), "Invalid value for '--rdzv-endpoint'"),
        (("--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", ":1"), "Invalid value for '--rdzv-endpoint'"),
        (("--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "127.0.0.1:1"), "--nnodes needs --nproc where"),
        (("--node-rank", "1"), "--node-rank is for several machines."),
        (("--rdzv-endpoint", "h:1"), "--rdzv-endpoint is for several machines."),
        (("--max-restarts", "1"), "--max-restarts needs --nproc where there is no GPU."),
    ],
)
def test_flags_that_do_not_go_together_are_said(
    arguments: tuple[str, ...], said: str, ambersafe: Ambersafe, fake_clone: Path, empty_model: Path
) -> None:
    done = ambersafe("sft", "--model", empty_model, "--no-preflight", *arguments)
    assert done.returncode == 64, done.stderr
    assert said in done.stderr
    assert not list(fake_clone.parent.glob(".cache/*"))


def test_a_host_that_is_not_known_is_said_before_anything_starts(
    ambersafe: Ambersafe, fake_clone: Path, empty_model: Path
) -> None:
    where = ("--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "no-such-host.invalid:29400", "--nproc", "1")
    done = ambersafe("sft", "--model", empty_model, "--no-preflight", *where)
    assert done.returncode == 80, done.stderr
    assert "no-such-host.invalid is not known here" in done.stderr


def test_without_sbatch_nothing_is_left_behind(ambersafe: Ambersafe, fake_clone: Path, empty_model: Path) -> None:
    git = Path(shutil.which("git") or "git").parent
    only_git = fake_clone.parent / "bin"
    only_git.mkdir()
    (only_git / "git").symlink_to(git / "git")
    done = ambersafe("sft", "--model", empty_model, *WISH, env={"PATH": str(only_git)})
    assert done.returncode == 81, done.stderr
    assert "There is no sbatch on this machine." in done.stderr
    assert not list(fake_clone.parent.glob(".cache/*"))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("5:30", 330), ("1:00:00", 3600), ("2-0", 172800), ("1-2:03", 93780), ("0-0:0:9", 9)],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text: str, seconds: int) -> None:
    assert slurm._seconds(text) == seconds
    assert slurm._seconds("UNLIMITED") is slurm._seconds("4 o'clock") is slurm._seconds(None) is None


def in_job(run: Path, job: str) -> dict[str, str]:
    return {slurm.MARK: str(run), "SLURM_JOB_ID": job, "SLURM_NODEID": "0", "SLURM_JOB_NUM_NODES": "1"}


def queued(work: Path, ambersafe: Ambersafe, empty_model: Path) -> Path:
    """A run whose record says that Slurm has it, with no Slurm there."""
    done = ambersafe("sft", "--model", empty_model, "--no-preflight", "--recipe", "tiny", env={"FAKE": "crash"})
    assert done.returncode == 3
    run = only_run(work, "tiny_sft")
    record = json.loads((run / "run.json").read_text())
    record |= {"status": slurm.QUEUED, "slurm": {"job_id": "7", "nodes": 1, "processes": 1}, "attempts": []}
    (run / "run.json").write_text(json.dumps(record))
    return run


def test_a_job_that_slurm_starts_again_after_its_end_has_nothing_to_do(
    ambersafe: Ambersafe, fake_clone: Path, empty_model: Path
) -> None:
    run = queued(fake_clone.parent, ambersafe, empty_model)
    for said in ("", "has finished"):
        done = ambersafe("resume", "--allow-modified", run, env=in_job(run, "8"))
        assert done.returncode == 0, done.stderr
        assert said in done.stderr
    record = json.loads((run / "run.json").read_text())
    assert (record["slurm"]["job_id"], record["attempts"][0]["slurm_job"]) == ("8", "8"), "as it was sent by hand"
    assert ambersafe("resume", run).returncode == 64, "by hand it is an error as ever"


def test_a_job_that_is_stopped_again_and_again_without_a_checkpoint_is_not_queued_for_ever(
    ambersafe: Ambersafe, fake_clone: Path, empty_model: Path
) -> None:
    run = queued(fake_clone.parent, ambersafe, empty_model)
    statuses = []
    for _ in range(slurm.TRIES):
        command = [sys.executable, "-m", "ambersafe_cli", "resume", "--allow-modified", str(run)]
        environment = {**os.environ, **in_job(run, "7"), "FAKE": "wait"}
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert child.stdout and child.stdout.readline()
        child.send_signal(signal.SIGUSR1)
        statuses.append(child.wait(30))
    assert statuses == [138, 138, 81]


def test_a_stop_after_a_schedulers_signal_is_what_the_run_ends_with(
    ambersafe: Ambersafe, fake_clone: Path, empty_model: Path
) -> None:
    run = queued(fake_clone.parent, ambersafe, empty_model)
    command = [sys.executable, "-m", "ambersafe_cli", "resume", "--allow-modified", str(run)]
    environment = {**os.environ, **in_job(run, "7"), "FAKE": "slow to stop"}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout and child.stdout.readline()
    child.send_signal(signal.SIGUSR1)
    done = ambersafe("stop", run)
    assert done.returncode == 0, done.stderr
    assert child.wait(30) == 130
    assert (run / "saved").exists(), "and what was being saved is"


@pytest.mark.parametrize("command", ["sft", "pipeline"])
def test_a_job_that_slurm_does_not_take_leaves_no_run(
    command: str, ambersafe: Ambersafe, fake_clone: Path, empty_model: Path
) -> None:
    programs = fake_clone.parent / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    (programs / "sbatch").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = ambersafe(command, "--model", empty_model, *WISH, env={"PATH": path})
    assert done.returncode == 81, done.stderr
    assert "Slurm did not take the job: invalid partition" in done.stderr
    assert not list(fake_clone.parent.glob(".cache/*/*"))


def test_pipeline_tells_each_stage_what_is_for_it(ambersafe: Ambersafe, fake_clone: Path, empty_model: Path) -> None:
    settings = ("sft.lr=1e-3", "dpo.n_epochs=2", "max_length=499", "--beta", "0.3")
    done = ambersafe("pipeline", "--model", empty_model, "--no-preflight", "--dry-run", *settings)
    assert done.returncode == 0, done.stderr
    sft, dpo = done.stdout.splitlines()
    assert "lr=1e-3" in sft and "lr=1e-3" not in dpo
    assert "n_epochs=2" in dpo and "n_epochs=2" not in sft
    assert "max_length=499" in sft and "max_length=499" in dpo
    assert "loss.beta=0.3" in dpo and "loss.beta" not in sft
    run = shlex.split(sft)[2]  # mkdir -p RUN && ...
    assert f"model.archive='{run}/LATEST/policy.pt'" in shlex.split(dpo)


def test_pipeline_ends_with_the_stage_that_failed_and_says_how_to_go_on(
    ambersafe: Ambersafe, fake_clone: Path, empty_model: Path
) -> None:
    done = ambersafe("pipeline", "--model", empty_model, "--no-preflight", env={"FAKE": "crash"})
    assert done.returncode == 3
    assert "dpo was not started" in done.stderr
    assert "ambersafe dpo --archive" in done.stderr
    assert len(list(fake_clone.parent.glob(".cache/*/*/run.json"))) == 1


# --- a real Slurm ---


@pytest.fixture(scope="module")
def cluster(patched: Path) -> Iterator[slurm_cluster.Cluster]:
    if why := slurm_cluster.is_possible():
        if os.environ.get("AMBERSAFE_REQUIRE_SLURM") == "1":
            pytest.fail(f"AMBERSAFE_REQUIRE_SLURM=1, but Slurm cannot be started: {why}")
        pytest.skip(f"Slurm cannot be started: {why}")
    folder = Path(tempfile.mkdtemp(prefix="ambersafe-"))  # pytest's own is too long for its sockets
    try:
        # The port where a job's machines meet comes from its number, and other tests have a Slurm on this machine too.
        first = {"FirstJobId": str(100 + os.getpid() * 37 % 9000)}
        with slurm_cluster.running(folder, settings=first) as started:
            yield started
    finally:
        shutil.rmtree(folder)


def submit(cluster: slurm_cluster.Cluster, command: str, work: Path, *arguments: object) -> list[str]:
    """Queue one or more runs, and return the ids of their jobs."""
    asked = ("--slurm", "--nodes", 2, "--nproc", 1, "--partition", cluster.low)
    done = run_ambersafe(command, *arguments, *asked, cwd=work, env=dict(cluster.environment))
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in work.glob(".cache/*/*/run.json")]
    assert {record["status"] for record in records} <= {slurm.QUEUED, "running"}
    return sorted((record["slurm"]["job_id"] for record in records), key=int)


def record_of(work: Path, name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((only_run(work, name) / "run.json").read_text())
    return record


def output_of(work: Path, cluster: slurm_cluster.Cluster) -> str:
    return "\n".join(
        [*(path.read_text() for path in work.glob(".cache/*/*/slurm.log")), slurm_cluster.tail_of_logs(cluster)]
    )


def has_trained(work: Path, name: str, examples: int) -> bool:
    return any(each.kind == "train" and each.examples >= examples for each in records_of(only_run(work, name)))


@pytest.mark.slow
def test_the_pipeline_ends_with_both_checkpoints_and_watch_follows_it(
    cluster: slurm_cluster.Cluster,
    given: tuple[object, ...],  # noqa: F811
    tmp_path: Path,
) -> None:
    names = ("sft.exp_name=sft", "dpo.exp_name=dpo")
    jobs = submit(cluster, "pipeline", tmp_path, *given, "--beta", "0.2", *names, *TINY)
    assert len(jobs) == 2
    assert slurm_cluster.job(cluster, jobs[1])["Dependency"].startswith(f"afterok:{jobs[0]}")
    watched = run_ambersafe("watch", "sft", cwd=tmp_path, env=dict(cluster.environment))
    assert watched.returncode == 0, watched.stderr
    assert "eval after 0" in watched.stdout and "train stats after 48" in watched.stdout
    done = slurm_cluster.wait_for(cluster, jobs[1], ("COMPLETED", "FAILED", "CANCELLED"), 180)
    assert done == "COMPLETED", output_of(tmp_path, cluster)
    for name in ("sft", "dpo"):
        record = record_of(tmp_path, name)
        assert (record["status"], record["processes"]) == ("finished", 2)
        assert (only_run(tmp_path, name) / "LATEST" / "policy.pt").is_file()
        assert len(record["attempts"]) == 1
        assert "--nnodes 2 " in " ".join(record["attempts"][0]["command"])
        assert (only_run(tmp_path, name) / "machine-1.log").is_file()
    dpo = record_of(tmp_path, "dpo")
    assert dpo["archive"] == str(only_run(tmp_path, "sft") / "LATEST" / "policy.pt")
    assert dpo["archive_fingerprint"] == record_of(tmp_path, "sft")["checkpoint_fingerprint"]
    assert dpo["values"]["loss.beta"] == 0.2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["the time limit is near", "another job preempts it", "a node is lost"])
def test_a_job_that_has_to_go_saves_waits_anew_and_ends_with_the_same_numbers(
    how: str,
    cluster: slurm_cluster.Cluster,
    undisturbed: Path,  # noqa: F811
    given: tuple[object, ...],  # noqa: F811
    tmp_path: Path,
) -> None:
    (job,) = submit(cluster, "sft", tmp_path, *given, "--exp-name", "sft", *LONG)
    assert wait_until(lambda: has_trained(tmp_path, "sft", 64), 60), output_of(tmp_path, cluster)
    if how == "the time limit is near":
        # what Slurm sends for the script's --signal; a real limit is no less than a minute
        assert cluster.run("scancel", "--signal=USR1", job).returncode == 0
    elif how == "another job preempts it":
        command = ("sbatch", "--parsable", "--partition", cluster.high, "--exclusive", "--nodes=2", "--wrap", "sleep 3")
        assert cluster.run(*command).returncode == 0
    else:
        slurm_cluster.kill_node(cluster, "node2")
        assert wait_until(lambda: slurm_cluster.node_states(cluster)["node2"].startswith("down"), 90)
        slurm_cluster.start_node(cluster, "node2")
    assert wait_until(lambda: int(slurm_cluster.job(cluster, job)["Restarts"]) == 1, 90), output_of(tmp_path, cluster)
    done = slurm_cluster.wait_for(cluster, job, ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL"), 180)
    assert done == "COMPLETED", output_of(tmp_path, cluster)
    record = record_of(tmp_path, "sft")
    assert (record["status"], len(record["attempts"])) == ("finished", 2)
    assert numbers(only_run(tmp_path, "sft")) == numbers(undisturbed)
    if how != "a node is lost":
        assert record["attempts"][0]["exit_status"] in slurm.AGAIN


@pytest.mark.slow
def test_stop_takes_a_run_out_of_the_queue_or_has_it_save_and_end_for_good(
    cluster: slurm_cluster.Cluster,
    given: tuple[object, ...],  # noqa: F811
    tmp_path: Path,
) -> None:
    environment = dict(cluster.environment)
    (job,) = submit(cluster, "sft", tmp_path, *given, "--exp-name", "sft", *LONG)
    twice = run_ambersafe("resume", "sft", cwd=tmp_path, env=environment)
    assert twice.returncode == 64
    said = (f"Slurm has the run as job {job}", "is still running")  # the latter where it has begun meanwhile
    assert any(each in twice.stderr for each in said), twice.stderr
    assert wait_until(lambda: has_trained(tmp_path, "sft", 48), 60), output_of(tmp_path, cluster)
    (tmp_path / "second").mkdir()
    blocked = ("sft", tmp_path / "second", *given, "--exp-name", "sft", "--sbatch=--exclusive", *LONG)
    (waiting,) = submit(cluster, *blocked)  # type: ignore[arg-type]
    assert slurm_cluster.job_state(cluster, waiting) == "PENDING"
    gone = run_ambersafe("stop", "sft", cwd=tmp_path / "second", env=environment)
    assert gone.returncode == 0, gone.stderr
    assert slurm_cluster.wait_for(cluster, waiting, "CANCELLED", 30)
    assert record_of(tmp_path / "second", "sft")["status"] == "interrupted"

    stopped = run_ambersafe("stop", "sft", cwd=tmp_path, env=environment)
    assert stopped.returncode == 0, stopped.stderr
    assert slurm_cluster.wait_for(cluster, job, ("FAILED", "COMPLETED", "CANCELLED"), 60) == "FAILED"
    assert slurm_cluster.job(cluster, job)["Restarts"] == "0"
    record = record_of(tmp_path, "sft")
    assert (record["status"], record["exit_status"]) == ("interrupted", 130)
    assert list(only_run(tmp_path, "sft").glob("step-*"))
    assert slurm_cluster.processes(cluster, job_id=job) == {}


@pytest.mark.slow
def test_dpo_does_not_begin_when_sft_has_failed_or_is_cancelled(
    cluster: slurm_cluster.Cluster,
    given: tuple[object, ...],  # noqa: F811
    tmp_path: Path,
) -> None:
    names = ("sft.exp_name=sft", "dpo.exp_name=dpo")
    sft, dpo = submit(cluster, "pipeline", tmp_path, *given, *names, *LONG)
    assert wait_until(lambda: has_trained(tmp_path, "sft", 48), 60), output_of(tmp_path, cluster)
    assert cluster.run("scancel", sft).returncode == 0
    assert slurm_cluster.wait_for(cluster, sft, "CANCELLED", 60)
    assert slurm_cluster.wait_for(cluster, dpo, "CANCELLED", 60)
    assert wait_until(lambda: slurm_cluster.processes(cluster, job_id=sft) == {}, 30)
    assert record_of(tmp_path, "dpo")["status"] == slurm.QUEUED
    watched = run_ambersafe("watch", "dpo", cwd=tmp_path, env=dict(cluster.environment))
    assert f"Slurm no longer has job {dpo}" in watched.stderr

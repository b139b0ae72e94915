"""Several ranks and several machines, with the real upstream: hosts are network namespaces, joined by real wires."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import faults
import hosts
import pytest
from conftest import load, numbers, only_run, records_of, run_ambersafe
from test_real_upstream import TINY, close, metric_lines, model, rows  # noqa: F401, fixtures

from ambersafe_cli import environment, metrics, recovery

pytestmark = pytest.mark.slow

LIMIT = 30
"""Seconds within which a job has ended, or begun again, after one of its ranks has died."""

LONG = (*TINY, "n_epochs=null", f"n_examples={16 * 60}", "eval_every=128", "save_every_examples=32", "lr_decay=cosine")


@pytest.fixture(scope="module")
def two(patched: Path) -> Iterator[list[hosts.Host]]:
    """Two hosts on a network of their own."""
    why = hosts.why_not()
    if why and os.environ.get("AMBERSAFE_REQUIRE_HOSTS") == "1":
        pytest.fail(f"AMBERSAFE_REQUIRE_HOSTS=1, but there are no hosts of our own: {why}")
    if why:
        pytest.skip(f"no hosts of our own: {why}")
    with hosts.made(2) as made:
        yield made


@pytest.fixture(scope="module")
def given(patched: Path, model: Path, rows: Path) -> tuple[object, ...]:  # noqa: F811
    return ("--dir", patched, "--model", model, "--data", rows)


@pytest.fixture(scope="module")
def alone(given: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with both stages, trained by one process."""
    work = tmp_path_factory.mktemp("alone")
    for stage in ("sft", "dpo"):
        done = run_ambersafe(
            stage, *given, "--trainer", "BasicTrainer", "--exp-name", stage, "--keep", "all", *TINY, cwd=work
        )
        assert done.returncode == 0, done.stderr
    return work


@pytest.fixture(scope="module")
def undisturbed(given: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A longer SFT run in two ranks, of which none died."""
    work = tmp_path_factory.mktemp("undisturbed")
    done = run_ambersafe("sft", *given, "--nproc", 2, "--exp-name", "sft", *LONG, cwd=work)
    assert done.returncode == 0, done.stderr
    return only_run(work, "sft")


class Job:
    """The same command on each host, started in the folder `work/hostN`, which the others do not look into."""

    def __init__(self, made: Sequence[hosts.Host], work: Path, *arguments: object) -> None:
        self.hosts, self.work, self.port = made, work, free_port()
        self.launchers: list[subprocess.Popen[bytes]] = []
        for number in range(len(made)):
            where = ("--nnodes", len(made), "--node-rank", number, "--rdzv-endpoint", f"{made[0].address}:{self.port}")
            self.start(number, *arguments, *where)

    def start(self, number: int, *arguments: object, env: dict[str, str] | None = None) -> None:
        folder = self.work / f"host{number}"
        folder.mkdir(parents=True, exist_ok=True)
        command = [*self.hosts[number].prefix, sys.executable, "-m", "ambersafe_cli", *map(str, arguments)]
        with (folder / "output").open("ab") as output:
            child = subprocess.Popen(
                command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
            )
        self.launchers[number:] = [child, *self.launchers[number + 1 :]]

    def wait(self, timeout: float = 120) -> list[int]:
        """Wait for all launchers, and return their exit statuses; one that does not end fails the test."""
        deadline = time.monotonic() + timeout
        for launcher in self.launchers:
            try:
                launcher.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pytest.fail(f"still there after {timeout} s:\n{self.output(0)}\n---\n{self.output(1)}")
        return [launcher.returncode for launcher in self.launchers]

    def output(self, number: int) -> str:
        return (self.work / f"host{number}" / "output").read_text(errors="replace")

    def error(self, number: int) -> str:
        """The error that the launcher on a host ended with, and there may be only one."""
        lines = [line for line in self.output(number).splitlines() if line.startswith("error: ")]
        return lines[-1]

    def kill_all(self) -> None:
        for launcher in self.launchers:
            launcher.kill()


@contextlib.contextmanager
def job(made: Sequence[hosts.Host], work: Path, *arguments: object) -> Iterator[Job]:
    started = Job(made, work, *arguments)
    try:
        yield started
    finally:
        started.kill_all()
        assert not wait_until(lambda: not workers_of(work), 60) or not workers_of(work)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def workers_of(work: Path) -> list[int]:
    """The processes below a working folder that run train.py, those of torchrun itself left away."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            is_worker = any(word.endswith("train.py") for word in words) and "torch.distributed.run" not in words
            if is_worker and any(str(work) in word for word in words):
                found.append(int(path.parent.name))
    return sorted(found)


def wait_until(is_so: Callable[[], object], timeout: float = 90) -> bool:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if is_so():
            return True
        time.sleep(0.05)
    return False


def has_trained(run: Path, examples: int) -> bool:
    return any(each.kind == "train" and each.examples >= examples for each in records_of(run))


def assert_equal_to_four_digits(one: Path, other: Path) -> None:
    first, second = (metric_lines((run / "train.log").read_text()) for run in (one, other))
    assert len(first) == len(second) > 10
    assert all(close(a, b) for a, b in zip(first, second, strict=True))
    mine, theirs = (load(run / "LATEST" / "policy.pt")["state"] for run in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(bool((mine[name] - theirs[name]).abs().max() < 1e-5) for name in mine)


# --- equal numbers ---


@pytest.mark.parametrize("ranks", [1, 4])
def test_one_and_four_ranks_train_what_one_process_trains(
    ranks: int, alone: Path, given: tuple[object, ...], tmp_path: Path
) -> None:
    for stage in ("sft", "dpo"):
        archive = ("--archive", only_run(alone, "sft")) if stage == "dpo" else ()
        done = run_ambersafe(stage, *given, *archive, "--nproc", ranks, "--exp-name", stage, *TINY, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert_equal_to_four_digits(only_run(alone, stage), only_run(tmp_path, stage))


@pytest.mark.parametrize(("ranks", "hybrid"), [(1, "false"), (2, "true")])
def test_two_hosts_train_what_one_process_trains(
    ranks: int, hybrid: str, two: list[hosts.Host], alone: Path, given: tuple[object, ...], tmp_path: Path
) -> None:
    for stage in ("sft", "dpo"):
        archive = ("--archive", only_run(alone, "sft")) if stage == "dpo" else ()
        arguments = (*given, *archive, "--nproc", ranks, "--exp-name", stage, f"hybrid_shard={hybrid}", *TINY)
        with job(two, tmp_path, stage, *arguments) as started:
            assert started.wait() == [0, 0], started.output(0) + started.output(1)
        run = only_run(tmp_path / "host0", stage)
        assert_equal_to_four_digits(only_run(alone, stage), run)
        assert json.loads((run / "run.json").read_text())["processes"] == 2 * ranks
        helper = only_run(tmp_path / "host1", stage)
        assert helper.name.endswith("_machine-1")
        assert not list(helper.glob("*/policy.pt")) and not (helper / "run.json").exists()


def test_two_ranks_train_a_model_whose_embedding_is_its_output_layer(
    given: tuple[object, ...],
    model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    tied = tmp_path / "tied"
    subprocess.run([sys.executable, "-c", TIE, model, tied], check=True, capture_output=True)
    arguments = (*given, "--model", tied, "--exp-name", "sft", *TINY)
    for name, how in (("one", ("--trainer", "BasicTrainer")), ("two", ("--nproc", 2))):
        (tmp_path / name).mkdir()
        done = run_ambersafe("sft", *arguments, *how, cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr
    one, two = only_run(tmp_path / "one", "sft"), only_run(tmp_path / "two", "sft")
    assert_equal_to_four_digits(one, two)
    state = load(two / "LATEST" / "policy.pt")["state"]
    assert bool((state["lm_head.weight"] == state["model.embed_tokens.weight"]).all())


TIE = """
import sys, torch, transformers
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
config.tie_word_embeddings = True
torch.manual_seed(0)
transformers.AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[2])
transformers.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""


def test_a_number_of_ranks_that_would_drop_examples_is_refused_by_resume_and_by_train_py(
    alone: Path, given: tuple[object, ...], tmp_path: Path
) -> None:
    where = ("--nproc", 3, "--no-preflight", "--exp-name", "sft", *TINY)
    done = run_ambersafe("sft", *given, *where, cwd=tmp_path)
    assert done.returncode != 0
    assert "batch_size 16 in 2 microbatches" in done.stderr and "(ranks: 3)" in done.stderr
    run = tmp_path / ".cache" / "again"
    shutil.copytree(only_run(tmp_path, "sft"), run)
    done = run_ambersafe("resume", run, "--nproc", 5, cwd=tmp_path)
    assert done.returncode == 64
    assert "batch_size 16 cannot be cut into 2 microbatches on 5 ranks" in done.stderr


def test_going_on_clears_away_what_a_kill_left_and_nothing_else(patched: Path, tmp_path: Path) -> None:
    import torch

    names = (
        "step-16",
        "step-32.old",
        "step-48.partial",
        "step-16.deleted",
        "LATEST.old",
        "notes.old",
        "export.partial",
    )
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        if name.startswith("step-"):
            for file in recovery.FILES_OF_A_CHECKPOINT:
                torch.save({"step_idx": 16, "state": {}, "metrics": {}}, tmp_path / name / file)
    code = f"import utils; print(utils.find_newest_checkpoint({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=patched, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "step-32"), done.stderr
    left = {path.name: (path / "file").read_text() for path in tmp_path.iterdir()}
    assert left == {
        "step-16": "step-16",
        "step-32": "step-32.old",
        "LATEST": "LATEST.old",
        "notes.old": "notes.old",
        "export.partial": "export.partial",
    }


@pytest.mark.parametrize(("first", "then"), [(2, 4), (4, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(
    first: int, then: int, alone: Path, given: tuple[object, ...], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "ambersafe_cli", "sft", *map(str, given), "--nproc", str(first)]
    child = subprocess.Popen(
        [*command, "--exp-name", "sft", *TINY], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert wait_until(lambda: list(tmp_path.glob(".cache/*/sft_*")) and has_trained(only_run(tmp_path, "sft"), 64))
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130
    assert json.loads((only_run(tmp_path, "sft") / "run.json").read_text())["status"] == "interrupted"
    done = run_ambersafe("resume", "--nproc", then, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    numbers_alone, numbers_here = numbers(only_run(alone, "sft")), numbers(only_run(tmp_path, "sft"))
    assert numbers_alone.keys() == numbers_here.keys()
    for key, values in numbers_alone.items():
        assert dict(numbers_here[key]) == {name: pytest.approx(v, rel=1e-4) for name, v in values}, key
    record = json.loads((only_run(tmp_path, "sft") / "run.json").read_text())
    assert f"--nproc-per-node {then} " in " ".join(record["attempts"][-1]["command"])


def test_either_trainer_goes_on_from_the_others_checkpoint(
    alone: Path, given: tuple[object, ...], tmp_path: Path
) -> None:
    checkpoint = only_run(alone, "sft") / "step-48"
    done = run_ambersafe("sft", *given, "--nproc", 2, "--exp-name", "sft", *TINY, f"resume={checkpoint}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = numbers(only_run(alone, "sft"))
    mine = numbers(only_run(tmp_path, "sft"))
    assert len(mine) > 5
    assert all(dict(v) == {n: pytest.approx(x, rel=1e-4) for n, x in theirs[key]} for key, v in mine.items())


# --- what dies ---


KILLS = 4
"""In one job."""


@pytest.mark.cold
@pytest.mark.parametrize("number", range(faults.tries("kill -9 of a rank") // KILLS))
def test_a_job_whose_ranks_are_killed_goes_on_with_the_same_numbers(
    number: int, undisturbed: Path, given: tuple[object, ...], tmp_path: Path
) -> None:
    rng = faults.generator("ranks", number)
    arguments = (*given, "--nproc", "2", "--max-restarts", "8", "--exp-name", "sft", *LONG)
    command = [sys.executable, "-m", "ambersafe_cli", "sft", *map(str, arguments)]
    with (tmp_path / "output").open("wb") as output:
        child = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
    for _ in range(KILLS):
        assert wait_until(lambda: len(workers_of(tmp_path)) == 2), "it begins, and again"
        victims = workers_of(tmp_path)
        if rng.random() < 0.7:  # else while it loads
            wait_for_records(tmp_path, 1)
        time.sleep(rng.random())
        assert child.poll() is None, "it came to its end before the last kill"
        os.kill(rng.choice(victims), signal.SIGKILL)
        assert wait_until(lambda gone=victims: not {*gone} & {*workers_of(tmp_path)}, LIMIT), "the other one ends"  # type: ignore[misc]
    assert child.wait(180) == 0, (tmp_path / "output").read_text()
    run = only_run(tmp_path, "sft")
    lost = [key for key, value in numbers(undisturbed).items() if numbers(run).get(key) != value]
    orphans = workers_of(tmp_path)
    for _ in range(KILLS):
        faults.note("kill -9 of a rank", lost, orphans, is_kill_of_a_training=True)
    mine, theirs = load(run / "LATEST" / "policy.pt"), load(undisturbed / "LATEST" / "policy.pt")
    assert all(bool((mine["state"][name] == theirs["state"][name]).all()) for name in theirs["state"])


def wait_for_records(work: Path, count: int) -> None:
    """Wait until a working folder's SFT run has printed so many more metrics."""
    assert wait_until(lambda: list(work.glob(".cache/*/sft_*/train.log")))
    run = only_run(work, "sft")
    begun = len(records_of(run))
    assert wait_until(lambda: len(records_of(run)) >= begun + count)


def test_a_rank_that_dies_on_one_host_has_both_begin_again_from_the_newest_checkpoint(
    two: list[hosts.Host], undisturbed: Path, given: tuple[object, ...], tmp_path: Path
) -> None:
    arguments = (*given, "--nproc", 1, "--max-restarts", 2, "--exp-name", "sft", *LONG)
    with job(two, tmp_path, "sft", *arguments) as started:
        for host in ("host1", "host0"):
            wait_for_records(tmp_path / "host0", 5)
            (victim,) = workers_of(tmp_path / host)
            os.kill(victim, signal.SIGKILL)
            assert wait_until(lambda gone=victim: gone not in workers_of(tmp_path), LIMIT)  # type: ignore[misc]
        assert started.wait() == [0, 0], started.output(0) + started.output(1)
    run = only_run(tmp_path / "host0", "sft")
    assert numbers(run) == numbers(undisturbed)
    assert started.output(0).count("going on from ") == 2
    assert "begun again 2 times after a process had died" in started.output(0)
    assert json.loads((run / "run.json").read_text())["attempts"][0]["restarts"] == 2


@pytest.mark.parametrize("what", ["cut off", "killed", "a rank is stopped"])
def test_a_host_that_is_gone_ends_the_job_on_every_host_with_one_error(
    what: str, two: list[hosts.Host], given: tuple[object, ...], tmp_path: Path
) -> None:
    long = [setting.replace("n_examples=960", "n_examples=160000") for setting in LONG]
    with job(two, tmp_path, "sft", *given, "--nproc", 1, "--exp-name", "sft", *long) as started:
        assert wait_until(lambda: list((tmp_path / "host0").glob(".cache/*/sft_*")))
        assert wait_until(lambda: has_trained(only_run(tmp_path / "host0", "sft"), 48)), started.output(0)
        try:
            if what == "cut off":
                two[1].cut_off()
            elif what == "killed":
                for pid in hosts.processes(two[1]):
                    os.kill(pid, signal.SIGKILL)
            else:
                os.kill(workers_of(tmp_path / "host1")[0], signal.SIGSTOP)
            # torchrun waits 30 s for a process to end that a signal has stopped, before it kills it
            statuses = started.wait(LIMIT if what != "a rank is stopped" else LIMIT + 45)
        finally:
            two[1].connect()
        if what == "killed":
            assert statuses[0] == 80
            assert "A process on another of the 2 machines has ended" in started.error(0)
        else:
            assert statuses == [80, 80], started.output(0) + started.output(1)
            assert "no sign of life of rank" in started.error(0)
        if what == "cut off":
            assert "no sign of life of rank 0 on host0" in started.error(1)
        assert workers_of(tmp_path) == []
    run = only_run(tmp_path / "host0", "sft")
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert f"ambersafe resume {run}" in started.output(0), "a checkpoint is there to go on from"


def test_a_stop_on_one_host_stops_both_with_a_checkpoint_and_both_can_go_on(
    two: list[hosts.Host], undisturbed: Path, given: tuple[object, ...], tmp_path: Path
) -> None:
    with job(two, tmp_path, "sft", *given, "--nproc", 1, "--max-restarts", 1, "--exp-name", "sft", *LONG) as started:
        assert wait_until(lambda: list((tmp_path / "host0").glob(".cache/*/sft_*")))
        run = only_run(tmp_path / "host0", "sft")
        assert wait_until(lambda: has_trained(run, 48)), started.output(0)
        done = run_ambersafe("stop", cwd=tmp_path / "host0")
        assert (done.returncode, started.wait()) == (0, [130, 130]), started.output(0) + started.output(1)
        assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
        endpoint = f"{two[0].address}:{free_port()}"
        started.start(0, "resume", "--rdzv-endpoint", endpoint)
        started.start(1, "resume", run, "--node-rank", 1, "--rdzv-endpoint", endpoint)
        assert started.wait() == [0, 0], started.output(0) + started.output(1)
    assert numbers(run) == numbers(undisturbed)
    assert (run / "machine-1.log").exists()


# --- machines that do not go together ---


@pytest.mark.parametrize("what", ["lr", "code", "data", "processes"])
def test_machines_that_differ_say_so_on_each_of_them_and_do_not_train(
    what: str,
    two: list[hosts.Host],
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    clone, data, lr, processes = patched, rows, "1e-4", 1
    expected = {
        "lr": "the machines differ in lr: 0.0001 on machine 0 (host0), 0.002 on machine 1 (host1)",
        "code": "the machines differ in the code of train.py: ",
        "data": "the machines differ in the training data: ",
        "processes": "the machines differ in processes: 1 on machine 0 (host0), 2 on machine 1 (host1)",
    }[what]
    if what == "code":
        clone = tmp_path / "clone"
        shutil.copytree(patched, clone)
        (clone / "trainers.py").write_text((clone / "trainers.py").read_text() + "# mine\n")
    elif what == "data":
        data = tmp_path / "rows"
        data.mkdir()
        for path in rows.iterdir():
            (data / path.name).write_text("\n".join(reversed(path.read_text().splitlines())) + "\n")
    elif what == "lr":
        lr = "2e-3"
    elif what == "processes":
        processes = 2
    endpoint = f"{two[0].address}:{free_port()}"
    common = ("--model", model, "--exp-name", "sft", "--rdzv-endpoint", endpoint, "--nnodes", 2, *TINY)
    with job((), tmp_path) as started:
        started.hosts = two
        started.start(0, "sft", "--dir", patched, "--data", rows, "--nproc", 1, "--node-rank", 0, *common)
        extra = ("--no-preflight", "--allow-modified") if what == "code" else ()
        command = ("sft", "--dir", clone, "--data", data, "--nproc", processes, "--node-rank", 1, *common)
        started.start(1, *command, *extra, f"lr={lr}")
        assert started.wait() == [80, 80], started.output(0) + started.output(1)
        for host in (0, 1):
            assert expected[4:].lower() in started.error(host).lower()
        assert not list(tmp_path.glob("host*/.cache/*/*/step-*"))


def test_other_data_on_one_machine_leaves_no_log_probabilities_behind(
    two: list[hosts.Host],
    alone: Path,
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    other = tmp_path / "rows"
    shutil.copytree(rows, other)
    lines = (other / "train.jsonl").read_text().splitlines()
    changed = json.loads(lines[-1])
    changed["response_0"], changed["response_1"] = changed["response_1"], changed["response_0"]
    (other / "train.jsonl").write_text("\n".join([*lines[:-1], json.dumps(changed)]) + "\n")
    endpoint = f"{two[0].address}:{free_port()}"
    with job((), tmp_path) as started:
        started.hosts = two
        for number, data in enumerate((rows, other)):
            where = ("--nnodes", 2, "--node-rank", number, "--nproc", 1, "--rdzv-endpoint", endpoint)
            what = ("--dir", patched, "--model", model, "--data", data, "--archive", only_run(alone, "sft"))
            started.start(number, "dpo", *what, *where, "--exp-name", "dpo", *TINY)
        assert started.wait() == [80, 80], started.output(0) + started.output(1)
    assert "The machines differ in the training data: " in started.error(0)
    assert not list(tmp_path.glob("host*/.cache/*/reference_logps/*.npy"))


def test_a_port_in_use_a_machine_that_does_not_answer_and_one_that_does_not_come(
    two: list[hosts.Host], given: tuple[object, ...], tmp_path: Path
) -> None:
    port = free_port()
    where = ("--nnodes", 2, "--nproc", 1, "--rdzv-endpoint", f"{two[0].address}:{port}", "--rdzv-timeout", 5)
    arguments = ("sft", *given, "--exp-name", "sft", *where, *TINY)
    with job((), tmp_path) as started:
        started.hosts = two
        started.start(0, *arguments, "--node-rank", 0)
        assert started.wait(90) == [80], started.output(0)
        assert "Not all of 2 machines came to" in started.error(0)
        started.start(1, *arguments, "--node-rank", 1)
        assert started.wait(90) == [80, 80], started.output(1)
        assert "No machine answers at" in started.error(1)
        listener = subprocess.Popen(
            [*two[0].prefix, sys.executable, "-c", LISTEN, str(port)], stdout=subprocess.PIPE, text=True
        )
        assert listener.stdout and listener.stdout.readline() == "listening\n"
        started.start(0, *arguments, "--node-rank", 0)
        assert started.wait(90) == [80, 80]
        listener.kill()
        assert f"{two[0].address}:{port}, where the machines are to meet, cannot be opened here" in started.error(0)


LISTEN = """
import socket, sys, time
server = socket.create_server(("", int(sys.argv[1])))
print("listening", flush=True)
time.sleep(600)
"""


def test_an_endpoint_that_is_not_machine_0s_is_said_there(
    two: list[hosts.Host], given: tuple[object, ...], tmp_path: Path
) -> None:
    where = ("--nnodes", 2, "--nproc", 1, "--node-rank", 0, "--rdzv-endpoint", f"{two[1].address}:29400")
    with job((), tmp_path) as started:
        started.hosts = two
        started.start(0, "sft", *given, "--no-preflight", *where, *TINY)
        assert started.wait(60) == [80], started.output(0)
        assert f"{two[1].address}:29400, where the machines are to meet, cannot be opened here" in started.error(0)


def test_one_gpu_trains_by_the_same_way(given: tuple[object, ...], tmp_path: Path) -> None:
    if not environment.probe(sys.executable, ask_torch=True).gpus:
        pytest.skip("there is no GPU")
    done = run_ambersafe("sft", *given, "--nproc", 1, "--exp-name", "sft", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert metrics.read_log(only_run(tmp_path, "sft") / "train.log").evaluations


# --- the data ---


def test_each_machine_reads_and_tokenizes_its_data_once(
    two: list[hosts.Host], given: tuple[object, ...], tmp_path: Path
) -> None:
    spy = tmp_path / "spy"
    spy.mkdir()
    (spy / "sitecustomize.py").write_text(SPY)
    environment = {"PYTHONPATH": str(spy), "SPY": str(tmp_path / "calls")}
    endpoint = f"{two[0].address}:{free_port()}"
    with job((), tmp_path) as started:
        started.hosts = two
        for number in (0, 1):
            where = ("--nnodes", 2, "--node-rank", number, "--rdzv-endpoint", endpoint, "--nproc", 2)
            started.start(number, "sft", *given, "--exp-name", "sft", "--no-preflight", *where, *TINY, env=environment)
        assert started.wait() == [0, 0], started.output(0) + started.output(1)
    called = sorted((tmp_path / "calls").read_text().split())
    assert len(called) == len(set(called))
    assert called == ["host0:0", "host1:0"], "the first rank of each machine alone"
    assert metrics.read_log(only_run(tmp_path / "host0", "sft") / "train.log").evaluations


# Notes, once a process, its host and local rank when a tokenizer is given a text.
SPY = """
import os, sys
if "LOCAL_RANK" in os.environ:
    import transformers, socket
    original = transformers.PreTrainedTokenizerBase.__call__
    def spied(self, *args, **kwargs):
        if not hasattr(transformers, "_spied"):
            transformers._spied = True
            with open(os.environ["SPY"], "a") as file:
                file.write(f"{socket.gethostname()}:{os.environ['LOCAL_RANK']}\\n")
        return original(self, *args, **kwargs)
    transformers.PreTrainedTokenizerBase.__call__ = spied
"""

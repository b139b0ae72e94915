"""`sft` and `dpo` as a user runs them, with tests/fake_train.py in the place of upstream's train.py."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faults
import pytest
from conftest import Ambersafe, commit, git, make_repository

from ambersafe_cli import machines, patches, upstream
from ambersafe_cli.child import ONE_EVENT

pytestmark = pytest.mark.cold

AWKWARD = "a b=c, 'd' \"e\" {f} [g] é:漢"


@pytest.fixture
def ambersafe(tmp_path: Path, ambersafe: Ambersafe) -> Ambersafe:
    """Without preflight, which would look for a model in the empty folders that stand for one here."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        extra = ("--no-preflight",) if arguments[0] in ("sft", "dpo") else ()
        return ambersafe(*arguments[:1], *extra, *arguments[1:], **options)

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / f"model {AWKWARD}"
    folder.mkdir()
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / f"rows {AWKWARD}.jsonl"
    path.write_text("{}")
    return path


def runs_of(fake_clone: Path) -> list[Path]:
    return sorted((fake_clone.parent / ".cache").glob("*/*/"), key=lambda path: path.stat().st_ctime)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_run_leaves_its_folder_complete_and_nothing_else(
    ambersafe: Ambersafe, fake_clone: Path, model: Path, data: Path
) -> None:
    done = ambersafe("sft", "--model", model, "--data", data, "--lr", "1e-3", "warmup_steps=5")
    assert done.returncode == 0, done.stderr
    (run,) = runs_of(fake_clone)
    assert {path.name for path in fake_clone.parent.iterdir()} == {".cache", fake_clone.name}
    assert {path.name for path in run.iterdir()} == {
        ".lock", "run.json", "train.log", "metrics.jsonl", "called.json", "LATEST",
    }  # fmt: skip

    called = read_json(run / "called.json")
    assert called["config"]["model.name_or_path"] == str(model)
    assert called["config"]["local_run_dir"] == str(run)
    assert called["config"]["lr"] == 1e-3
    assert called["config"]["warmup_steps"] == 5
    assert called["config"]["hydra.run.dir"] == str(run / "hydra")
    assert called["environment"]["SAFERLHF_DATASET"] == str(data)
    assert not called["environment"]["SAFERLHF_REVISION"]

    record = read_json(run / "run.json")
    assert (record["schema"], record["stage"], record["status"], record["exit_status"]) == (1, "sft", "finished", 0)
    assert record["model"] == {"name": str(model), "revision": None, "commit": "a" * 40}
    data_recorded = {"name": str(data), "revision": None, "commit": "b" * 40, "counts": None, "fingerprint": None}
    assert record["data"] == data_recorded
    assert record["upstream"]["head"] == git(fake_clone, "rev-parse", "HEAD")
    assert record["upstream"]["patches"] == {patch.name: "altered" for patch in patches.read_series()}
    assert record["recipe"]["source"] == "ambersafe"
    assert record["values"]["lr"] == 1e-3
    assert record["overrides"] == ["warmup_steps=5"]
    assert record["started"] < record["ended"]


def test_output_of_train_py_goes_through_unchanged_and_into_the_log(
    ambersafe: Ambersafe, fake_clone: Path, model: Path
) -> None:
    done = ambersafe("sft", "--model", model)
    (run,) = runs_of(fake_clone)
    assert "eval after 0: {'loss/eval': '2.5'}\ntrain stats after 16" in done.stdout
    assert "a bar\rthe same bar" in done.stderr
    log = (run / "train.log").read_bytes().decode().split("\n")
    assert any(line.endswith("eval after 16: {'loss/eval': '1.25'}") for line in log), (
        "a state of a bar may stand before"
    )
    assert any(line.endswith("the same bar") for line in log)
    assert "held out, after 16 examples: loss 1.25" in done.stderr


def test_the_end_of_sft_names_the_checkpoint_and_a_dpo_command_that_works(
    ambersafe: Ambersafe, fake_clone: Path, model: Path, data: Path
) -> None:
    python = fake_clone.parent.parent / "a=b" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    given = ("--python", python, "max_prompt_length=60", "eval_batch_size=8", "--max-length", "100", "lr=1")
    done = ambersafe("sft", "--model", model, "--data", data, "--recipe", "tiny", *given)
    (sft_run,) = runs_of(fake_clone)
    assert f"checkpoint: {sft_run / 'LATEST' / 'policy.pt'}" in done.stderr
    command = done.stderr.partition("next: ambersafe ")[2].splitlines()[0]
    then = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m ambersafe_cli {command} --no-preflight"],
        cwd=fake_clone.parent,
        capture_output=True,
        text=True,
    )
    assert then.returncode == 0, then.stderr
    called = read_json(runs_of(fake_clone)[-1] / "called.json")
    assert called["config"]["model.archive"] == str(sft_run / "LATEST" / "policy.pt")
    assert called["config"]["loss"] == "dpo"
    assert called["environment"]["SAFERLHF_DATASET"] == str(data)
    assert (called["config"]["max_length"], called["config"]["max_prompt_length"]) == (100, 60)
    assert called["config"]["lr"] == 5e-4, "how to train is each stage's own"
    record = read_json(runs_of(fake_clone)[-1] / "run.json")
    assert record["command"][0] == str(python)
    assert record["sft_run"] == str(sft_run)


def test_dpo_takes_the_newest_finished_sft_run_of_the_same_model_and_names_it(
    ambersafe: Ambersafe, fake_clone: Path, model: Path, tmp_path: Path
) -> None:
    for name in ("older", "newer"):
        assert ambersafe("sft", "--model", model, "--exp-name", name).returncode == 0
    (tmp_path / "other").mkdir()
    assert ambersafe("sft", "--model", tmp_path / "other", "--exp-name", "of_another_model").returncode == 0
    assert ambersafe("sft", "--model", model, "--exp-name", "crashed", env={"FAKE": "crash"}).returncode == 3
    newer = next(path for path in runs_of(fake_clone) if path.name.startswith("newer"))

    done = ambersafe("dpo", "--model", model, "--beta", "0.25", "--exp-name", "d")
    assert done.returncode == 0, done.stderr
    assert f"from the newest SFT run of this model: {newer}" in done.stderr
    run = next(path for path in runs_of(fake_clone) if path.name.startswith("d_"))
    called = read_json(run / "called.json")["config"]
    assert called["model.archive"] == str(newer / "LATEST" / "policy.pt")
    assert called["loss.beta"] == 0.25
    assert read_json(run / "run.json")["sft_run"] == str(newer)


def test_dpo_without_an_sft_run_is_an_error(ambersafe: Ambersafe, fake_clone: Path, model: Path) -> None:
    done = ambersafe("dpo", "--model", model)
    assert done.returncode == 66
    assert "ambersafe sft" in done.stderr
    assert not runs_of(fake_clone)


def test_archive_takes_a_file_or_a_run_folder(
    ambersafe: Ambersafe, fake_clone: Path, model: Path, tmp_path: Path
) -> None:
    archive = tmp_path / AWKWARD.replace("/", "") / "LATEST" / "policy.pt"
    archive.parent.mkdir(parents=True)
    archive.touch()
    for given in (archive, archive.parent.parent):
        done = ambersafe("dpo", "--model", model, "--archive", given)
        assert done.returncode == 0, done.stderr
        assert read_json(runs_of(fake_clone)[-1] / "called.json")["config"]["model.archive"] == str(archive)
    done = ambersafe("dpo", "--model", model, "--archive", tmp_path / "no.pt")
    assert done.returncode == 66
    assert str(tmp_path / "no.pt") in done.stderr


def test_ipo_and_label_smoothing_arrive(ambersafe: Ambersafe, fake_clone: Path, model: Path, tmp_path: Path) -> None:
    archive = tmp_path / "policy.pt"
    archive.touch()
    done = ambersafe("dpo", "--model", model, "--archive", archive, "--loss", "ipo")
    assert done.returncode == 0, done.stderr
    called = read_json(runs_of(fake_clone)[-1] / "called.json")["config"]
    assert (called["loss"], called["loss.name"]) == ("dpo", "ipo")
    done = ambersafe("dpo", "--model", model, "--archive", archive, "--label-smoothing", "0.1")
    assert done.returncode == 0, done.stderr
    assert read_json(runs_of(fake_clone)[-1] / "called.json")["config"]["loss.label_smoothing"] == 0.1
    refused = ambersafe("dpo", "--model", model, "--archive", archive, "--label-smoothing", "0.1", "--loss", "ipo")
    assert refused.returncode == 64
    assert "no label smoothing" in refused.stderr


def test_without_gpus_fsdp_becomes_basic_trainer_and_it_is_said(
    ambersafe: Ambersafe, fake_clone: Path, model: Path
) -> None:
    for overrides in ((), ("trainer=FSDPTrainer",)):
        done = ambersafe("sft", "--model", model, *overrides)
        assert done.returncode == 0
        assert "BasicTrainer, on the CPU" in done.stderr
        assert read_json(runs_of(fake_clone)[-1] / "called.json")["config"]["trainer"] == "BasicTrainer"


@pytest.mark.slow
def test_nproc_starts_that_many_processes_through_torchrun(ambersafe: Ambersafe, fake_clone: Path, model: Path) -> None:
    done = ambersafe("sft", "--model", model, "--nproc", "1", "--bf16", "--recipe", "tiny")
    assert done.returncode == 0, done.stderr
    assert "--nproc: FSDPTrainer in place of the recipe's BasicTrainer" in done.stderr
    called = read_json(runs_of(fake_clone)[-1] / "called.json")
    assert called["environment"]["WORLD_SIZE"] == "1"
    assert called["config"]["trainer"] == "FSDPTrainer"
    assert called["config"]["mixed_precision"] == "bfloat16"
    assert "model.policy_dtype" not in called["config"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (("--bf16",), "float32"),  # autocast
        (("--bf16", "--nproc", "2"), "bfloat16"),
        (("--bf16", "--nproc", "2", "model.reference_dtype=float16"), "float16"),
        (("--nproc", "2"), "float32"),  # the recipe's
        (("mixed_precision=bfloat16", "--nproc", "2"), "bfloat16"),
    ],
)
def test_with_bf16_the_reference_model_computes_as_the_policy_unless_it_is_told_otherwise(
    ambersafe: Ambersafe, fake_clone: Path, model: Path, tmp_path: Path, given: tuple[str, ...], wanted: str
) -> None:
    archive = tmp_path / "policy.pt"
    archive.touch()
    done = ambersafe("dpo", "--model", model, "--archive", archive, "--recipe", "tiny", "--dry-run", *given)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"model.reference_dtype='?(\w+)", done.stdout) == [wanted]


@pytest.fixture
def pretended(tmp_path: Path) -> dict[str, str]:
    """Variables that pretend a torch that is built for CUDA, and an nvidia-smi that lists four GPUs."""
    site, tools = tmp_path / "site", tmp_path / "bin"
    (site / "torch").mkdir(parents=True)
    (site / "torch" / "__init__.py").touch()
    (site / "torch" / "version.py").write_text("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n")
    tools.mkdir()
    listed = "".join(f"echo 'GPU {n}: NVIDIA H100 80GB HBM3 (UUID: GPU-{n})'\n" for n in range(4))
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\n{listed}")
    (tools / "nvidia-smi").chmod(0o755)
    return {"PYTHONPATH": str(site), "PATH": f"{tools}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("given", "own", "wanted", "said"),
    [
        ((), False, ["float32"], "in float32, as the policy is: upstream's float16 is slow on a CPU"),
        (("model.policy_dtype=bfloat16",), False, ["bfloat16"], "in bfloat16, as the policy is"),
        (("model.reference_dtype=float16",), False, ["float16"], ""),
        (("--recipe", "best"), False, ["float32"], "in float32, as the policy is"),
        (("--lora",), False, [], ""),
        ((), True, [], "in float16, as AmberSafe's was, and the policy in float32: rewards begin at the difference"),
        (("--recipe", "best"), True, ["float32"], ""),
        (("--recipe", "best", "--bf16"), True, ["bfloat16"], ""),
        (("--recipe", "best", "mixed_precision=bfloat16"), True, ["bfloat16"], ""),
        (("--recipe", "best", "model.reference_dtype=float16"), True, ["float16"], ""),
        (("--recipe", "best", "model.fsdp_policy_mp=bfloat16"), True, ["bfloat16"], ""),
        (("model.fsdp_policy_mp=bfloat16",), True, [], "and the policy in bfloat16: rewards begin at the difference"),
    ],
)
def test_the_reference_model_computes_as_the_policy_but_where_ambersafe_is_reproduced(
    ambersafe: Ambersafe,
    fake_clone: Path,
    model: Path,
    tmp_path: Path,
    pretended: dict[str, str],
    given: tuple[str, ...],
    own: bool,
    wanted: list[str],
    said: str,
) -> None:
    """`own`: on GPUs."""
    archive = tmp_path / "policy.pt"
    archive.touch()
    env = pretended if own else {}
    done = ambersafe("dpo", "--model", model, "--archive", archive, "--dry-run", *given, env=env)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"model.reference_dtype='?(\w+)", done.stdout) == wanted
    assert ("The reference model is" in " ".join(done.stderr.split())) == bool(said)
    assert said in " ".join(done.stderr.split())


def test_gpus_that_the_driver_lists_make_one_process_each(
    ambersafe: Ambersafe, fake_clone: Path, model: Path, pretended: dict[str, str]
) -> None:
    for visible, count in ((None, 4), ("0,2", 2), ("1,9,0", 1)):
        env = pretended | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
        done = ambersafe("sft", "--model", model, "--dry-run", env=env)
        assert f"-m torch.distributed.run --standalone --nproc-per-node {count} " in done.stdout
        assert "trainer=FSDPTrainer" in done.stdout
    done = ambersafe("sft", "--model", model, "--dry-run", env=pretended | {"CUDA_VISIBLE_DEVICES": ""})
    assert "trainer=BasicTrainer" in done.stdout
    done = ambersafe("sft", "--model", model, "--nproc", "5", "--dry-run", env=pretended)
    assert done.returncode == 64
    assert "there are 4" in done.stderr


def test_dry_run_prints_a_command_for_a_shell_and_starts_nothing(
    ambersafe: Ambersafe, fake_clone: Path, model: Path, data: Path
) -> None:
    done = ambersafe("sft", "--model", model, "--data", data, "--dry-run", f"+note='{AWKWARD.replace(chr(39), '')}'")
    assert done.returncode == 0, done.stderr
    assert not (fake_clone.parent / ".cache").exists()
    pasted = subprocess.run(["bash", "-c", done.stdout], cwd=fake_clone.parent, capture_output=True, text=True)
    assert pasted.returncode == 0, pasted.stderr
    called = read_json(runs_of(fake_clone)[-1] / "called.json")
    assert called["config"]["model.name_or_path"] == str(model)
    assert called["config"]["note"] == AWKWARD.replace("'", "")
    assert called["environment"]["SAFERLHF_DATASET"] == str(data)


@pytest.mark.parametrize(("fake", "status"), [("crash", 3), ("die", 128 + signal.SIGSEGV)])
def test_the_exit_status_is_the_childs_and_the_run_has_failed(
    ambersafe: Ambersafe, fake_clone: Path, model: Path, fake: str, status: int
) -> None:
    done = ambersafe("sft", "--model", model, env={"FAKE": fake})
    assert done.returncode == status
    (run,) = runs_of(fake_clone)
    record = read_json(run / "run.json")
    assert (record["status"], record["exit_status"]) == ("failed", status)
    assert str(run / "train.log") in done.stderr
    if fake == "crash":
        assert "the reason of the crash" in (run / "train.log").read_text()


def test_a_run_that_leaves_no_checkpoint_has_failed_whatever_train_py_says(
    ambersafe: Ambersafe, fake_clone: Path, model: Path
) -> None:
    done = ambersafe("sft", "--model", model, env={"FAKE": "nothing"})
    assert done.returncode == 75
    assert "left no" in done.stderr
    assert read_json(runs_of(fake_clone)[0] / "run.json")["status"] == "failed"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGINT,),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM),
        (signal.SIGQUIT, signal.SIGQUIT),
        (signal.SIGUSR1, signal.SIGUSR1),
    ],
)
def test_a_signal_stops_train_py_and_its_workers_and_leaves_none(
    fake_clone: Path, model: Path, numbers: tuple[signal.Signals, ...]
) -> None:
    command = [sys.executable, "-m", "ambersafe_cli", "sft", "--no-preflight", "--model", str(model)]
    child = subprocess.Popen(
        command,
        cwd=fake_clone.parent,
        env={**os.environ, "FAKE": "hang"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout
    line = next(line for line in child.stdout if line.startswith(b"started"))
    worker = int(line.split()[1])
    assert is_running(worker)
    for number in numbers:
        child.send_signal(number)
        time.sleep(ONE_EVENT + 0.2 if child.poll() is None else 0)
    assert child.wait(timeout=30) == 128 + numbers[0]
    (run,) = runs_of(fake_clone)
    assert read_json(run / "run.json")["status"] == "interrupted"
    assert not is_running(worker)
    left = [path for path in Path("/proc").glob("[0-9]*/environ") if str(run).encode() in read_environment(path)]
    assert not left


@pytest.mark.parametrize(
    ("first", "others"),
    [
        (signal.SIGHUP, ((0.03, signal.SIGHUP), (2.5, signal.SIGHUP))),  # shell and kernel, of a terminal that closes
        (signal.SIGTERM, ((0.02, signal.SIGTERM), (1.0, signal.SIGTERM))),  # a job, and each of its processes
        (signal.SIGINT, ((0.3, signal.SIGTERM),)),
    ],
)
def test_what_one_event_sends_several_times_is_one_wish_and_the_checkpoint_is_saved(
    fake_clone: Path, model: Path, first: signal.Signals, others: tuple[tuple[float, signal.Signals], ...]
) -> None:
    command = [sys.executable, "-m", "ambersafe_cli", "sft", "--no-preflight", "--model", str(model)]
    environment = {**os.environ, "FAKE": "slow to stop"}
    child = subprocess.Popen(command, cwd=fake_clone.parent, env=environment, stdout=subprocess.PIPE)
    assert child.stdout
    assert any(b"waiting" in line for line in child.stdout)
    child.send_signal(first)
    for pause, number in others:
        time.sleep(pause)
        child.send_signal(number)
    assert child.wait(timeout=30) == 128 + first
    (run,) = runs_of(fake_clone)
    assert (run / "saved").is_file(), "it takes 4 seconds"


@pytest.mark.slow
def test_a_signal_to_every_process_of_a_job_does_not_have_torchrun_kill_a_rank_that_saves(
    fake_clone: Path, model: Path
) -> None:
    """torchrun would give it 30 seconds."""
    command = ["sft", "--no-preflight", "--model", str(model), "--nproc", "1"]
    child = subprocess.Popen(
        [sys.executable, "-m", "ambersafe_cli", *command],
        cwd=fake_clone.parent,
        env={**os.environ, "FAKE": "slow to stop", "FAKE_SECONDS": "36", **faults.marked_environment("slow")},
        stdout=subprocess.PIPE,
    )
    assert child.stdout
    assert any(b"waiting" in line for line in child.stdout)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
        for pid in faults.marked("slow"):
            faults.kill(pid, number)
        time.sleep(0.3)  # of two that wait at once Python hears the one with the smaller number first
    assert child.wait(timeout=80) == 128 + signal.SIGTERM
    (run,) = runs_of(fake_clone)
    assert (run / "saved").is_file()
    assert not faults.left_over("slow", 5)


@pytest.mark.slow
def test_a_signal_ends_a_torchrun_that_waits_for_other_machines(fake_clone: Path, model: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["sft", "--no-preflight", "--model", str(model), "--nproc", "1", "--nnodes", "2", "--node-rank", "0"]
    child = subprocess.Popen(
        [sys.executable, "-m", "ambersafe_cli", *command, "--rdzv-endpoint", endpoint],
        cwd=fake_clone.parent,
        env={**os.environ, **faults.marked_environment("alone")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def is_torchrun_there() -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(tuple(endpoint.split(":")), timeout=1).close()  # type: ignore[arg-type]
            return True
        return False

    assert faults.wait_until(is_torchrun_there, 60)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 128 + signal.SIGTERM, "torchrun would wait for eleven minutes"
    assert not faults.left_over("alone", 5)


def test_a_process_that_is_killed_says_that_it_was_most_likely_the_memory(
    ambersafe: Ambersafe, fake_clone: Path, model: Path
) -> None:
    done = ambersafe("sft", "--no-preflight", "--model", model, env={"FAKE": "killed"})
    assert done.returncode == 137
    assert "killed (SIGKILL), most likely by the system, as this machine's memory was full" in done.stderr
    done = ambersafe("sft", "--no-preflight", "--model", model, env={"FAKE": "crash"})
    assert (done.returncode, "SIGKILL" in done.stderr) == (3, False)


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-", "| true"])
def test_a_terminal_that_is_gone_does_not_stop_the_training(fake_clone: Path, model: Path, closed: str) -> None:
    command = shlex.join([sys.executable, "-m", "ambersafe_cli", "sft", "--no-preflight", "--model", str(model)])
    subprocess.run(
        ["bash", "-c", f"{command} {closed}"], cwd=fake_clone.parent, env={**os.environ, "FAKE": "talk"}, timeout=60
    )
    (run,) = runs_of(fake_clone)
    assert read_json(run / "run.json")["status"] == "finished"
    assert (run / "train.log").stat().st_size > 2_000_000


def read_environment(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_key_whose_patch_is_missing_is_left_away_or_refused(
    ambersafe: Ambersafe, tmp_path: Path, model: Path
) -> None:
    """With a clone as `setup --minimal` makes it, except for its train.py."""
    clone = tmp_path / "minimal"
    base = make_repository(clone, {"train.py": "print('not patched')\n"})
    fake = Path(__file__).with_name("fake_train.py").read_text()
    commit(clone, {"train.py": fake}, patches.read_series()[0].subject)
    git(clone, "update-ref", upstream.BASE_REF, base)
    given = ("sft", "--model", "org/model", "--dir", clone)
    done = ambersafe(*given)
    assert done.returncode == 0, done.stderr
    assert "do_final_eval is left away" in done.stderr
    (run,) = (tmp_path / "work/.cache").glob("*/*/")
    assert "do_final_eval" not in read_json(run / "called.json")["config"]
    for flags, name in ((("--model-revision", "v1"), "model.revision"), (("--nproc", "1"), "--nproc")):
        refused = ambersafe(*given, *flags)
        assert refused.returncode == 64
        assert name in refused.stderr
        assert "ambersafe setup" in refused.stderr


def test_local_run_dir_of_the_users_is_the_run_folder_unless_it_holds_something(
    ambersafe: Ambersafe, fake_clone: Path, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / f"run {AWKWARD.replace(chr(39), '')}"
    given = ("sft", "--model", model, f"local_run_dir='{folder}'")
    assert ambersafe(*given).returncode == 0
    assert (folder / "LATEST" / "policy.pt").is_file()
    before = (folder / "run.json").read_bytes()
    again = ambersafe(*given)
    assert again.returncode == 64
    assert "is not empty" in again.stderr
    assert (folder / "run.json").read_bytes() == before


def test_a_user_without_a_name_gets_one(ambersafe: Ambersafe, fake_clone: Path, model: Path, tmp_path: Path) -> None:
    """As in a container that runs under a number that it has no passwd entry for."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pwd\ndef getpwuid(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')\npwd.getpwuid = getpwuid\n"
    )
    nameless = dict.fromkeys(("LOGNAME", "USER", "LNAME", "USERNAME"), "") | {"PYTHONPATH": str(tmp_path)}
    done = ambersafe("sft", "--model", model, env=nameless)
    assert done.returncode == 0, done.stderr
    (run,) = runs_of(fake_clone)
    assert run.parent.name == f"uid-{os.getuid()}"
    assert read_json(run / "called.json")["environment"]["LOGNAME"] == run.parent.name


def test_metrics_jsonl_holds_what_was_printed(ambersafe: Ambersafe, fake_clone: Path, model: Path, data: Path) -> None:
    assert ambersafe("sft", "--model", model, "--data", data).returncode == 0
    (run,) = runs_of(fake_clone)
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(each["kind"], each["examples"]) for each in entries] == [("eval", 0), ("train", 16), ("eval", 16)]
    assert entries[1]["loss/train"] == 2
    assert [each["time"] for each in entries] == sorted(each["time"] for each in entries)


def test_nccl_and_gloo_take_the_interface_by_which_the_machines_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    of = machines.Machines(count=2, number=1, endpoint="127.0.0.1:29500")
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert {name: machines.settings(of).get(name) for name in names} == dict.fromkeys(names, "lo")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert {name: machines.settings(of).get(name) for name in names} == {names[0]: "lo", names[1]: None}

"""What upstream does silently, or late: each trap has one test, named after it.

A trap is an error or a warning of preflight's, before anything is loaded or written, or it is mended.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import load, only_run, run_ambersafe
from test_preflight import Check, rows, write
from test_real_upstream import model  # noqa: F401, a fixture
from test_resume import kill_with_everything_it_started, start, wait_for_step

from ambersafe_cli import metrics, runs

pytestmark = pytest.mark.slow

QUICK = ("n_epochs=null", "n_examples=48", "eval_every=16", "--batch-size", "16")


@pytest.fixture
def check(patched: Path, model: Path, tmp_path: Path) -> Check:  # noqa: F811
    return Check(patched, model, tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "rows", rows(64), rows(48))


def refused(check: Check, message: str, *given: object, stage: str = "sft", **options: Any) -> None:
    """The stage itself does not start, says why, and leaves nothing behind."""
    command = ("--dir", check.patched, "--model", check.model, "--recipe", "tiny", *given)
    done = run_ambersafe(stage, *command, cwd=check.work, **options)
    assert done.returncode == 76, done.stderr
    assert message in done.stderr
    assert not (check.work / ".cache").exists()


def warned(check: Check, message: str, *given: object, stage: str = "sft") -> None:
    done = check(stage, *given)
    assert done.returncode == 0, done.stderr
    assert message in done.stderr


class Done:
    """A finished run, its working folder and what it printed."""

    def __init__(self, work: Path, printed: subprocess.CompletedProcess[str]) -> None:
        self.work, self.run, self.printed = work, only_run(work, "tiny_sft"), printed


@pytest.fixture(scope="module")
def done(patched: Path, model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:  # noqa: F811
    """A run on a machine as bad as can be: another place for checkpoints exists, nobody is logged in anywhere."""
    work = tmp_path_factory.mktemp("work")
    (work / "scratch").mkdir()
    given = ("--dir", patched, "--model", model, "--recipe", "tiny", "--data", data, *QUICK)
    environment = {"XDG_CACHE_HOME": str(work / "xdg")}
    printed = run_ambersafe("sft", *given, f"local_dirs=[{work}/scratch,.cache]", cwd=work, env=environment)
    assert printed.returncode == 0, printed.stderr
    return Done(work, printed)


def test_fsdp_trainer_with_no_gpu(check: Check, data: Path) -> None:
    given = ("--dir", check.patched, "--model", check.model, "--recipe", "tiny", "--trainer", "FSDPTrainer")
    done = run_ambersafe("sft", *given, "--data", data, *QUICK, cwd=check.work)
    assert done.returncode == 0, done.stderr
    assert "BasicTrainer, on the CPU" in done.stderr
    assert runs.checkpoint(only_run(check.work, "tiny_sft")).is_file()


def test_batch_size_larger_than_the_data(check: Check, data: Path) -> None:
    refused(check, "64 prompts to train on, fewer than batch_size 65", "--data", data, "--batch-size", 65)


def test_the_test_split_smaller_than_eval_batch_size(check: Check, data: Path) -> None:
    refused(check, "48 prompts in the test split, fewer than eval_batch_size 49", "--data", data, "eval_batch_size=49")


def test_a_dataset_that_filters_down_to_nothing(check: Check, tmp_path: Path) -> None:
    data = write(tmp_path / "rows", rows(64, is_response_1_safe=True), rows(48))
    refused(check, "none of 64 rows has exactly one safe response", "--data", data)


def test_an_override_value_holding_an_equals_sign_a_space_a_comma_or_a_quote(check: Check, data: Path) -> None:
    odd = check.work / "a b=c,d 'e' \"f\""
    shutil.copytree(check.model, odd)
    check.model = odd
    given = ("--dir", check.patched, "--model", odd, "--recipe", "tiny", "--data", data, *QUICK)
    done = run_ambersafe("sft", *given, "--exp-name", "x=y, 'z'", cwd=check.work)
    assert done.returncode == 0, done.stderr
    assert runs.checkpoint(only_run(check.work, "x=y, 'z'")).is_file()


def test_a_truncated_or_foreign_policy_pt(check: Check, data: Path, done: Done, tmp_path: Path) -> None:
    cut_off = tmp_path / "policy.pt"
    cut_off.write_bytes(runs.checkpoint(done.run).read_bytes()[:-1000])
    refused(check, "is not a whole checkpoint", "--data", data, "--archive", cut_off, stage="dpo")
    foreign = done.run / "LATEST" / "optimizer.pt"
    refused(check, "not a policy.pt", "--data", data, "--archive", foreign, stage="dpo")


def test_loss_dpo_with_no_loss_beta(check: Check, data: Path, done: Done, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    text = run_ambersafe("recipes", "tiny", cwd=tmp_path).stdout
    recipe.write_text(text.replace("  loss.beta: 0.1\n", ""))
    given = ("--dir", check.patched, "--model", check.model, "--recipe", recipe, "--data", data)
    told = run_ambersafe("dpo", *given, "--archive", done.run, cwd=check.work)
    assert told.returncode == 64
    assert "Give --beta" in told.stderr


def test_text_that_holds_the_tokenizers_eos_string(check: Check, tmp_path: Path) -> None:
    data = write(tmp_path / "rows", [*rows(63), *rows(64, response_0="good </s> bad")[63:]], rows(48))
    refused(check, "1 prompts hold the tokenizer's EOS '</s>'", "--data", data)
    warned(check, "hold the tokenizer's EOS '</s>' and are left out", "--data", data, "drop_eos=true")


def test_scr_ssd_or_scr_exists_on_the_machine(done: Done) -> None:
    assert done.run.is_relative_to(done.work / ".cache")
    assert not any((done.work / "scratch").iterdir())


def test_wandb_enabled_and_not_logged_in(check: Check, data: Path, done: Done, tmp_path: Path) -> None:
    assert "wandb" not in done.printed.stderr, "upstream's default is on; the recipe's is off"
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        assert variable not in os.environ
    nobody = {"NETRC": str(tmp_path / "netrc")}
    refused(check, "wandb is not logged in at api.wandb.ai", "--data", data, "--wandb", env=nobody)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / "netrc").chmod(0o600)
    assert check("sft", "--data", data, "--wandb", env=nobody).returncode == 0
    assert check("sft", "--data", data, "--wandb", env={"WANDB_MODE": "offline"}).returncode == 0


def test_killed_while_saving(check: Check, data: Path) -> None:
    """kill -9 as soon as a save has begun: what has the name of a checkpoint is whole. `--faults` does it a lot."""
    given = ("--dir", check.patched, "--model", check.model, "--recipe", "tiny", "--data", data, "eval_every=16")
    child = start("sft", check.work, *given, "--batch-size", 16, "n_epochs=20")
    assert child.stdout
    seen = 0
    for line in child.stdout:
        seen += line.startswith(b"writing checkpoint to")
        if seen == 11:  # the second file of the fourth checkpoint
            break
    run = only_run(check.work, "tiny_sft")
    kill_with_everything_it_started(child, run)
    whole = [path for path in run.glob("step-*") if path.suffix != ".partial"]
    assert whole
    for path in whole:
        assert {load(path / name)["step_idx"] for name in ("policy.pt", "optimizer.pt", "scheduler.pt")}


def test_a_crash_a_reboot_a_preemption(check: Check, data: Path) -> None:
    given = ("--dir", check.patched, "--model", check.model, "--recipe", "tiny", "--data", data, *QUICK)
    child = start("sft", check.work, *given)
    wait_for_step(child, 32)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 143
    assert run_ambersafe("resume", cwd=check.work).returncode == 0
    assert runs.checkpoint(only_run(check.work, "tiny_sft")).is_file()


def test_7b_in_float32_fills_the_disk(check: Check, data: Path, done: Done) -> None:
    """Old checkpoints go, and a disk that cannot hold what is kept is an error before the run starts."""
    given = ("--dir", check.patched, "--model", check.model, "--recipe", "tiny", "--data", data, "eval_every=16")
    kept = run_ambersafe("sft", *given, "--batch-size", 16, "n_epochs=2", "--keep", 1, cwd=check.work)
    assert kept.returncode == 0, kept.stderr
    assert len(list(only_run(check.work, "tiny_sft").glob("step-*"))) == 1
    shutil.rmtree(check.work / ".cache")
    refused(check, "The checkpoints need", "--data", data, "eval_every=16", "--keep", "all", "n_epochs=9999999")


def test_models_and_datasets_are_downloaded_again_and_the_users_cache_is_hidden(done: Done) -> None:
    assert {path.name for path in (done.work / ".cache").glob("*/*")} == {done.run.name}
    assert not (done.work / "xdg").exists() or not list((done.work / "xdg").rglob("*.arrow"))
    assert list(Path(os.environ["HF_HOME"]).rglob("*.arrow")), "the rows are in the user's own cache"


def test_gradient_accumulation_steps_that_does_not_divide_batch_size_or_the_ranks(check: Check, data: Path) -> None:
    given = ("--data", data, "--batch-size", 16)
    refused(check, "batch_size 16 cannot be cut into 3 microbatches on 1 ranks", *given, "--grad-accum", 3)
    refused(
        check, "batch_size 16 cannot be cut into 2 microbatches on 3 ranks", *given, "--grad-accum", 2, "--nproc", 3
    )


def test_seed_7(check: Check, data: Path) -> None:
    warned(check, "seed 7 changes nothing", "--data", data, "--seed", 7)
    told = check("sft", "--data", data, "--seed", 7, "seed_data=true")
    assert "seed" not in told.stderr


def test_max_length_up_to_max_prompt_length(check: Check, data: Path) -> None:
    told = check("sft", "--data", data, "--max-length", 64)
    assert told.returncode == 64
    assert "nothing is left for a response" in told.stderr


def test_a_short_prompt_with_a_long_response(check: Check, tmp_path: Path) -> None:
    long = rows(64, response_0=" ".join(["word"] * 50))
    data = write(tmp_path / "rows", long, rows(48))
    given = ("--data", data, "--max-length", 80, "max_prompt_length=64")
    warned(check, "64 responses lose their EOS", *given)
    warned(check, "keep_eos=true would cut", *given)
    warned(check, "; 0 responses lose their EOS", *given, "keep_eos=true")


def test_eval_every_smaller_than_batch_size(check: Check, data: Path) -> None:
    refused(check, "eval_every 15 is smaller than batch_size 16", "--data", data, "eval_every=15")


def test_a_test_split_smaller_than_n_eval_examples(check: Check, data: Path) -> None:
    warned(check, "n_eval_examples is 64, but there are 48 prompts", "--data", data, "n_eval_examples=64")


def test_the_end_of_a_run(done: Done) -> None:
    """The final weights are evaluated, and LATEST says how well they did."""
    last = metrics.read_log(done.run / "train.log").evaluations[-1]
    assert last.examples == 48
    saved = json.loads((done.run / "LATEST" / "metrics.json").read_text())
    assert saved["loss/eval"] == pytest.approx(last.values["loss/eval"], rel=1e-4)


def test_the_last_partial_batch_of_every_epoch(check: Check, data: Path) -> None:
    given = ("--data", data, "--batch-size", 24, "--grad-accum", 1)
    warned(check, "The last 16 prompts of each epoch are dropped", *given)
    assert "dropped" not in check("sft", *given, "fill_last_batch=true").stderr


def test_many_pairs_of_one_prompt(check: Check, done: Done, tmp_path: Path) -> None:
    many = [{**row, "prompt": f"prompt number {i // 8}"} for i, row in enumerate(rows(64))]
    given = ("--data", write(tmp_path / "rows", many, rows(48)), "--archive", done.run)
    warned(check, "a batch of 16 pairs holds 2 prompts", *given, stage="dpo")
    assert "next to each other" not in check("dpo", *given, "shuffle_pairs=true").stderr


def test_a_container_user_without_a_passwd_entry(check: Check, data: Path) -> None:
    """Python's getpass is told that there is no such user, here and in train.py."""
    code = "import pwd\ndef nobody(number):\n    raise KeyError(number)\npwd.getpwuid = nobody\n"
    (check.work / "sitecustomize.py").write_text(code)
    environment = {
        key: value for key, value in os.environ.items() if key not in ("LOGNAME", "USER", "LNAME", "USERNAME")
    }
    environment["PYTHONPATH"] = str(check.work)
    given = ("--dir", check.patched, "--model", check.model, "--recipe", "tiny", "--data", data, *QUICK)
    command = [sys.executable, "-m", "ambersafe_cli", "sft", *map(str, given)]
    done = subprocess.run(command, cwd=check.work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert runs.checkpoint(only_run(check.work, "tiny_sft")).parents[1].parent.name == f"uid-{os.getuid()}"


def test_a_slow_save_by_rank_0(patched: Path, tmp_path: Path) -> None:
    """The other ranks wait at a barrier for hours, instead of nccl's ten minutes."""
    (tmp_path / "ask.py").write_text(
        f"import sys; sys.path.insert(0, {str(patched)!r})\n"
        "import omegaconf, torch, utils\n"
        "utils.join_torchrun_group(omegaconf.OmegaConf.create({'stuck_after_seconds': 600}))\n"
        "import machines\n"
        "for group in (torch.distributed.group.WORLD, machines.patient_group):\n"
        "    print(group._get_backend(torch.device('cpu')).options._timeout.total_seconds())\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run([*torchrun, tmp_path / "ask.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    of_collectives, of_waiting = map(float, done.stdout.splitlines()[-2:])
    assert of_waiting >= 6 * 3600
    assert of_collectives <= 1800, "one that hangs is noticed"
    trainers = (patched / "trainers.py").read_text()
    assert "dist.barrier()" not in trainers, "it would wait as a collective does"

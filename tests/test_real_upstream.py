"""Against the real upstream, cloned from its public URL: the series, and training a tiny model through both stages."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Ambersafe, git, interpreter, only_run, records_of, run_ambersafe, run_python

from ambersafe_cli import demo, metrics, patches, upstream

pytestmark = pytest.mark.slow

# What both sides of a comparison are told: small enough for seconds, with every kind of truncation among the rows.
TINY = (
    "model.block_name=LlamaDecoderLayer",
    "model.reference_dtype=float32",
    "max_length=48",
    "max_prompt_length=16",
    "eval_batch_size=8",
    "n_eval_examples=16",
    "sample_during_eval=false",
    "minimum_log_interval_secs=0",
    "eval_every=48",
    "n_epochs=2",
    "batch_size=16",
    "gradient_accumulation_steps=2",
    "lr=1e-4",
    "warmup_steps=3",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's tiny Llama."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    builder = Path(demo.__file__).parent / "children" / "tiny_model.py"
    run_python(builder, folder, demo.DATA / "train.jsonl")
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the demo's rows, one in five of them with a prompt or responses that are too long."""
    folder = tmp_path_factory.mktemp("rows")
    for split, count in (("train", 120), ("test", 30)):
        lines = (demo.DATA / f"{split}.jsonl").read_text().splitlines()[:count]
        parsed = [json.loads(line) for line in lines]
        for number, row in enumerate(parsed):
            for column in ("prompt", "response_0", "response_1"):
                if number % 5 == 0 and hash_of(row[column]) % 2:
                    row[column] *= 4
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in parsed))
    return folder


def hash_of(text: str) -> int:
    return sum(text.encode())


def metric_lines(output: str, kinds: Sequence[str] = ("train stats", "eval")) -> list[str]:
    """The lines of metrics as they were printed, but for the speed."""
    lines = [line for line in output.splitlines() if line.startswith(tuple(f"{kind} after" for kind in kinds))]
    return [re.sub(r", 'examples_per_second': '[^']*'", "", line) for line in lines]


# --- the series ---


def test_setup_arrives_at_the_commits_that_the_series_names(patched: Path) -> None:
    made = git(patched, "rev-list", "--reverse", f"{upstream.PINNED_COMMIT}..HEAD").split()
    assert made == [patch.commit for patch in patches.read_series()]
    assert git(patched, "branch", "--show-current") == "ambersafe"


def test_second_setup_changes_nothing_and_says_so(patched: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in patched.rglob("*")}
    done = run_ambersafe("setup", cwd=patched.parent)
    assert done.returncode == 0
    assert "Nothing to do" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in patched.rglob("*")} == before


def test_exporter_writes_the_series_of_the_clone_to_the_byte(patched: Path, tmp_path: Path) -> None:
    export: list[str | Path] = [sys.executable, ROOT / "scripts/export-patches", patched, tmp_path]
    subprocess.run(export, check=True, cwd=tmp_path)
    exported = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    others = ("README.md", "earlier")
    assert exported == {p.name: p.read_bytes() for p in (ROOT / "patches").iterdir() if p.name not in others}
    (tmp_path / "series").write_text(f"# on an earlier day\n0001-First.patch {'a' * 40}\n")
    for _ in range(2):
        subprocess.run(export, check=True, cwd=tmp_path)
    assert (tmp_path / "earlier").read_text() == "a" * 40 + "\n"


def test_status_shows_every_patch_applied_and_one_that_was_altered(patched: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(patched, clone)
    answer = json.loads(run_ambersafe("status", "--json", "--dir", clone, cwd=tmp_path).stdout)
    assert answer["clone"]["base"] == upstream.PINNED_COMMIT
    assert {patch["state"] for patch in answer["clone"]["patches"]} == {"applied"}
    (clone / "train.py").write_text((clone / "train.py").read_text() + "# mine\n")
    git(clone, "commit", "--quiet", "--all", "--amend", "--no-edit")
    answer = json.loads(run_ambersafe("status", "--json", "--dir", clone, cwd=tmp_path).stdout)
    assert [patch["state"] for patch in answer["clone"]["patches"]][-2:] == ["applied", "altered"]


def test_minimal_is_the_first_patch_alone_and_hydra_takes_every_key_that_it_is_given(
    upstream_url: str, ambersafe: Ambersafe, tmp_path: Path, model: Path
) -> None:
    assert ambersafe("setup", "--minimal").returncode == 0
    clone = tmp_path / "work" / "direct-preference-optimization"
    assert git(clone, "rev-parse", "HEAD") == patches.read_series()[0].commit
    planned = ambersafe("sft", "--model", model, "--dry-run")
    assert "do_final_eval is left away" in planned.stderr
    # train.py of this clone needs tensor_parallel, which no longer installs; --cfg has Hydra check the keys and stop.
    (tmp_path / "tensor_parallel.py").touch()
    command = f"{planned.stdout.strip()} --cfg job"
    checked = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stderr
    assert "exp_name: saferlhf_sft_ambersafe" in checked.stdout


# --- training ---


@pytest.fixture(scope="module")
def mended_by_hand(upstream_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Upstream with the least that lets it train here: our series is not used, these mends are the test's own."""
    clone = tmp_path_factory.mktemp("by_hand") / "clone"
    subprocess.run(["git", "clone", "--quiet", upstream_url, clone], check=True)
    git(clone, "checkout", "--quiet", upstream.PINNED_COMMIT)
    mend(clone / "trainers.py", "import tensor_parallel as tp\n", "")
    mend(clone / "utils.py", "random.seed(self.seed)", "random.seed(int(self.seed))", times=2)
    mend(clone / "utils.py", "np.random.seed(int(self.seed))", "np.random.seed(self.seed)")
    mend(clone / "utils.py", "v.to(device)", "v.to('cpu')")
    reader = """
def get_saferlhf(split):
    import json, os
    data = defaultdict(lambda: defaultdict(list))
    for line in open(os.path.join(os.environ['ROWS'], split + '.jsonl')):
        row = json.loads(line)
        if row['is_response_0_safe'] != row['is_response_1_safe']:
            safe, other = (0, 1) if row['is_response_0_safe'] else (1, 0)
            n = len(data[row['prompt']]['responses'])
            data[row['prompt']]['responses'] += [row[f'response_{safe}'], row[f'response_{other}']]
            data[row['prompt']]['pairs'].append((n, n + 1))
            data[row['prompt']]['sft_target'] = row[f'response_{safe}']
    return data


def get_dataset("""
    mend(clone / "preference_datasets.py", "\ndef get_dataset(", reader)
    mend(
        clone / "preference_datasets.py",
        "    if name == 'shp':\n",
        "    if name == 'saferlhf':\n        data = get_saferlhf(split)\n    elif name == 'shp':\n",
    )
    return clone


def mend(path: Path, old: str, new: str, times: int = 1) -> None:
    text = path.read_text()
    assert text.count(old) == times, (path, old)
    path.write_text(text.replace(old, new))


def train_by_hand(clone: Path, work: Path, model: Path, rows: Path, name: str, *overrides: str) -> str:
    run = work / name
    run.mkdir(parents=True)
    common = ["model=blank_model", f"model.name_or_path={model}", "datasets=[saferlhf]", "wandb.enabled=false"]
    own = [f"exp_name={name}", f"local_run_dir={run}", f"hydra.run.dir={run}/hydra", *overrides]
    done = subprocess.run(
        [interpreter(), str(clone / "train.py"), *common, *TINY, *own],
        cwd=work,
        env={**os.environ, "ROWS": str(rows)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ours(patched: Path, model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with an SFT and a DPO run in it, as a user makes them."""
    work = tmp_path_factory.mktemp("ours")
    given = ("--dir", patched, "--model", model, "--data", rows, "--trainer", "BasicTrainer")
    for stage in ("sft", "dpo"):
        done = run_ambersafe(stage, *given, "--exp-name", stage, *TINY, cwd=work)
        assert done.returncode == 0, done.stderr
    return work


@pytest.fixture(scope="module")
def theirs(
    mended_by_hand: Path, model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """The metrics that upstream itself prints, by stage."""
    work = tmp_path_factory.mktemp("theirs")
    sft = train_by_hand(mended_by_hand, work, model, rows, "sft", "loss=sft")
    given = ("loss=dpo", "loss.beta=0.1", f"model.archive={work / 'sft' / 'LATEST' / 'policy.pt'}")
    dpo = train_by_hand(mended_by_hand, work, model, rows, "dpo", *given)
    return {"sft": metric_lines(sft), "dpo": metric_lines(dpo)}


# What the recipes switch on for speed, which changes nothing but rounding; DPO has cache_reference as well.
FAST = ("sort_by_length", "response_logits_only", "prefetch_batches", "cache_reference")


@pytest.mark.parametrize("on", [(), ("sort_by_length",), ("prefetch_batches",)])
def test_train_stats_equal_upstreams_own_to_every_printed_digit(
    theirs: dict[str, list[str]], on: tuple[str, ...], patched: Path, model: Path, rows: Path, tmp_path: Path
) -> None:
    off = [f"{key}={0 if key == 'prefetch_batches' else 'false'}" for key in FAST if key not in on]
    given = ("--dir", patched, "--model", model, "--data", rows, "--trainer", "BasicTrainer")
    for stage in ("sft", "dpo"):
        done = run_ambersafe(stage, *given, "--exp-name", stage, *TINY, *off, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        mine = own_lines(tmp_path, stage)
        assert len([line for line in mine if line.startswith("train stats")]) >= 8
        assert len(mine) == len(theirs[stage]) + 1, "and the evaluation of the final weights, which upstream has not"
        if "sort_by_length" in on:  # sums in another order: the last digit of a reward may be another
            losses = [re.findall(r"'loss/\w+': '[^']*'", "".join(lines)) for lines in (mine[:-1], theirs[stage])]
            assert losses[0] == losses[1]
            assert all(close(first, second) for first, second in zip(theirs[stage], mine, strict=False))
        else:
            assert mine[:-1] == theirs[stage]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_with_everything_that_makes_it_fast_train_stats_equal_upstreams_to_four_digits(
    theirs: dict[str, list[str]], ours: Path, stage: str
) -> None:
    values = json.loads((only_run(ours, stage) / "run.json").read_text())["values"]
    assert [key for key in FAST if values.get(key)] == list(FAST if stage == "dpo" else FAST[:3])
    mine = own_lines(ours, stage)[: len(theirs[stage])]
    assert all(close(first, second) for first, second in zip(theirs[stage], mine, strict=True))


def own_lines(work: Path, stage: str) -> list[str]:
    lines = metric_lines((only_run(work, stage) / "train.log").read_text())
    return [re.sub(", 'learning_rate': '[^']*'", "", line) for line in lines]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_train_stats_say_the_learning_rate_of_their_step_through_the_warmup(ours: Path, stage: str) -> None:
    """TINY warms up in 3 steps: the first one is taken at a quarter of 1e-4, not at 0 and not at the second's half."""
    records = records_of(only_run(ours, stage))
    rates = [record.values["learning_rate"] for record in records if record.kind == "train"]
    assert rates[:4] == [2.5e-5, 5e-5, 7.5e-5, 1e-4]
    assert set(rates[4:]) == {1e-4}
    assert not [record for record in records if record.kind == "eval" and "learning_rate" in record.values]


def test_both_stages_leave_a_run_that_tells_what_was_run(ours: Path, patched: Path, model: Path, rows: Path) -> None:
    records = {stage: json.loads((only_run(ours, stage) / "run.json").read_text()) for stage in ("sft", "dpo")}
    for record in records.values():
        assert record["status"] == "finished"
        assert record["upstream"]["base"] == upstream.PINNED_COMMIT
        assert set(record["upstream"]["patches"].values()) == {"applied"}
        assert record["model"]["name"] == str(model)
        assert record["data"]["name"] == str(rows)
    assert records["dpo"]["sft_run"] == str(only_run(ours, "sft"))
    assert {path.name for path in ours.iterdir()} == {".cache"}, "nothing is left in the working folder"
    assert (only_run(ours, "sft") / "hydra" / ".hydra" / "overrides.yaml").is_file()


def load_checkpoint(path: Path) -> Any:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def test_checkpoint_holds_the_final_weights_and_their_evaluation(ours: Path) -> None:
    for stage in ("sft", "dpo"):
        run = only_run(ours, stage)
        checkpoint = load_checkpoint(run / "LATEST" / "policy.pt")
        last = metrics.read_log(run / "train.log").evaluations[-1]
        assert last.examples == checkpoint["step_idx"]
        printed = {key: f"{value:.5g}" for key, value in checkpoint["metrics"].items()}
        assert printed == {key: f"{value:.5g}" for key, value in last.values.items()}
    dpo = metrics.read_log(only_run(ours, "dpo") / "train.log").evaluations
    assert dpo[0].values["loss/eval"] == pytest.approx(0.69315), "policy and reference model are the same at first"


def test_the_command_printed_last_makes_a_hugging_face_folder(
    ours: Path, patched: Path, model: Path, rows: Path, tmp_path: Path
) -> None:
    archive = only_run(ours, "sft") / "LATEST" / "policy.pt"
    given = ("--dir", patched, "--model", model, "--data", rows, "--archive", archive, "--trainer", "BasicTrainer")
    done = run_ambersafe("dpo", *given, *TINY, "n_epochs=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stderr.rpartition("next: ")[2])
    assert words[0] == "ambersafe"
    exported_to = run_ambersafe(*words[1:], cwd=tmp_path)
    assert exported_to.returncode == 0, exported_to.stderr
    run = only_run(tmp_path, "saferlhf_dpo_ambersafe")
    import transformers

    exported = transformers.AutoModelForCausalLM.from_pretrained(run / "hugging_face")
    trained = load_checkpoint(run / "LATEST" / "policy.pt")["state"]
    assert all(bool((value == trained[name]).all()) for name, value in exported.state_dict().items())
    card = (run / "hugging_face" / "README.md").read_text()
    assert "trained with SFT and then DPO (beta 0.1)" in card
    assert str(tmp_path) not in card


def close(one: str, other: str) -> bool:
    """Whether two lines of metrics are the same to four digits.

    Of accuracies only where there are margins: in the first step each is 0, or what rounding makes of it.
    """
    first, second = metrics.parse_line(one), metrics.parse_line(other)
    assert isinstance(first, metrics.Record)
    assert isinstance(second, metrics.Record)
    tied = {
        f"rewards_{name}/accuracies"
        for name in ("train", "eval")
        if abs(first.values.get(f"rewards_{name}/margins", 1)) < 1e-5
    }
    return first.values.keys() == second.values.keys() and all(
        value == pytest.approx(second.values[key], rel=1e-4, abs=1e-5) or key in tied
        for key, value in first.values.items()
    )


def test_two_ranks_print_what_one_process_prints_to_four_digits(
    ours: Path, patched: Path, model: Path, rows: Path, tmp_path: Path
) -> None:
    given = ("--dir", patched, "--model", model, "--data", rows, "--nproc", "2")
    for stage in ("sft", "dpo"):
        archive = ("--archive", only_run(ours, "sft")) if stage == "dpo" else ()
        done = run_ambersafe(stage, *given, *archive, "--exp-name", stage, *TINY, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        one = metric_lines((only_run(ours, stage) / "train.log").read_text())
        two = metric_lines((only_run(tmp_path, stage) / "train.log").read_text())
        assert len(two) == len(one)
        assert all(close(first, second) for first, second in zip(one, two, strict=True))
        assert done.stdout.count("Writing to ") == 1, "rank 0 alone speaks"
        mine = load_checkpoint(only_run(ours, stage) / "LATEST" / "policy.pt")["state"]
        theirs = load_checkpoint(only_run(tmp_path, stage) / "LATEST" / "policy.pt")["state"]
        assert mine.keys() == theirs.keys()
        assert all(bool((mine[name] - theirs[name]).abs().max() < 1e-5) for name in mine)
    evaluate(only_run(tmp_path, "dpo"), tmp_path)


def evaluate(run: Path, work: Path) -> Any:
    """What `ambersafe evaluate` finds of a run, after a look that it is what upstream's last evaluation had."""
    done = run_ambersafe("evaluate", run, "--json", cwd=work)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    last = metrics.read_log(run / "train.log").evaluations[-1]
    here = {name: each["here"] for name, each in found["upstream"]["metrics"].items()}
    assert here == {name: pytest.approx(last.values[name], rel=1e-4, abs=1e-5) for name in here}
    assert (found["upstream"]["after"], found["upstream"]["agrees"]) == (last.examples, True)
    return found


def test_evaluate_equals_upstreams_last_evaluation_to_four_digits(ours: Path, tmp_path: Path) -> None:
    dpo = evaluate(only_run(ours, "dpo"), tmp_path)
    assert {"rewards_eval/accuracies", "rewards_eval/margins"} < dpo["upstream"]["metrics"].keys()
    assert dpo["upstream"]["examples"] == 16
    assert dpo["data"]["pairs"] > 16, "and on all of the held-out pairs, not only those"
    assert dpo["reference"]["run"] == only_run(ours, "sft").name
    sft = evaluate(only_run(ours, "sft"), tmp_path)
    assert set(sft["upstream"]["metrics"]) == {"logps_eval/chosen", "loss/eval"}
    assert sft["reference"]["label"] == "base"


def test_a_checkpoint_with_a_flipped_byte_is_refused_by_whatever_reads_it(
    ours: Path, patched: Path, model: Path, rows: Path, tmp_path: Path
) -> None:
    """Torch would read it without a word."""
    content = bytearray((only_run(ours, "sft") / "LATEST" / "policy.pt").read_bytes())
    content[len(content) // 2] ^= 0xFF
    flipped = tmp_path / "flipped.pt"
    flipped.write_bytes(content)
    assert load_checkpoint(flipped)
    given = ("--dir", patched, "--model", model)
    for command in (
        ("dpo", "--data", rows, "--recipe", "tiny", "--archive", flipped, *given),
        ("evaluate", flipped, "--data", rows, *given),
        ("sample", flipped, *given),
    ):
        done = run_ambersafe(*command, cwd=tmp_path)
        assert done.returncode in (66, 76), done.stderr
        assert "a byte of it is not what was written" in " ".join(done.stderr.split())
    assert not (tmp_path / ".cache").exists()


def test_sample_shows_each_step_of_a_run(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("How do I use a ladder?\n")
    given = ("--prompts", tmp_path / "prompts.txt", "--max-new-tokens", "4", "--json")
    done = run_ambersafe("sample", only_run(ours, "dpo"), *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ((sample,), runs_) = json.loads(done.stdout), [only_run(ours, stage).name for stage in ("sft", "dpo")]
    assert [(each["label"], each["run"]) for each in sample["answers"]] == [
        ("base", None),
        *zip(("sft", "dpo"), runs_, strict=True),
    ]


def test_ctrl_c_ends_all_ranks(patched: Path, model: Path, rows: Path, tmp_path: Path) -> None:
    given = ["--dir", str(patched), "--model", str(model), "--data", str(rows), "--nproc", "2", *TINY, "n_epochs=10000"]
    child = subprocess.Popen(
        [sys.executable, "-m", "ambersafe_cli", "sft", *given],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout
    next(line for line in child.stdout if line.startswith(b"train stats"))
    child.send_signal(signal.SIGINT)
    child.stdout.read()
    assert child.wait(timeout=60) == 128 + signal.SIGINT
    run = only_run(tmp_path, "saferlhf_sft_ambersafe")
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    time.sleep(0.2)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if str(run).encode() in command]


def test_awkward_names_arrive_in_the_real_train_py(patched: Path, model: Path, rows: Path, tmp_path: Path) -> None:
    work = tmp_path / "a folder, 'quoted' {é} = 1"
    shutil.copytree(patched, work / "clone of 'up=stream'")
    shutil.copytree(model, work / "model = {1, 2}")
    shutil.copytree(rows, work / "rows, \"x\" = 'y'")
    given = ("--dir", "clone of 'up=stream'", "--model", "model = {1, 2}", "--data", "rows, \"x\" = 'y'")
    name = "name, with 'quotes' {é} = 1"
    done = run_ambersafe("sft", *given, "--exp-name", name, *TINY, "n_epochs=1", cwd=work)
    assert done.returncode == 0, done.stderr
    run = only_run(work, name)
    assert f"exp_name: {name}" in (run / "config.yaml").read_text().replace("''", "'").replace(
        "exp_name: '", "exp_name: "
    )
    done = run_ambersafe("dpo", *given, *TINY, "n_epochs=1", cwd=work)
    assert done.returncode == 0, done.stderr
    assert f"from the newest SFT run of this model: {run}" in done.stderr
    assert {path.name for path in work.iterdir()} == {
        ".cache",
        "clone of 'up=stream'",
        "model = {1, 2}",
        "rows, \"x\" = 'y'",
    }


def test_a_model_in_the_users_cache_is_found_offline_and_its_commit_written_down(
    patched: Path, model: Path, rows: Path, tmp_path: Path
) -> None:
    """With the cache as huggingface_hub leaves it: a folder per commit, and a file per branch or tag that names one."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hf" / "hub" / "models--org--tiny"
    shutil.copytree(model, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    for name in ("main", "v1"):
        (cached / "refs" / name).write_text(commit)
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    given = ("sft", "--dir", patched, "--model", "org/tiny", "--data", rows, *TINY, "n_epochs=1")
    for flags, revision in (((), None), (("--model-revision", "v1"), "v1")):
        done = run_ambersafe(*given, *flags, "--exp-name", f"run{revision}", cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        record = json.loads((only_run(tmp_path, f"run{revision}") / "run.json").read_text())
        assert record["model"] == {"name": "org/tiny", "revision": revision, "commit": commit}
    failed = run_ambersafe(*given, "--model-revision", "v2", "--exp-name", "no", cwd=tmp_path, env=env)
    assert failed.returncode == 76
    assert "org/tiny at v2 is not in the Hugging Face cache" in failed.stderr, (
        "no such tag in the cache, and no network"
    )


def test_demo_ends_with_both_checkpoints_and_what_it_promises(
    upstream_url: str, ambersafe: Ambersafe, tmp_path: Path
) -> None:
    done = ambersafe("demo")
    assert done.returncode == 0, done.stderr
    work = tmp_path / "work"
    sft, dpo = only_run(work, "tiny_sft"), only_run(work, "tiny_dpo")
    for run in (sft, dpo):
        assert (run / "LATEST" / "policy.pt").is_file()
        assert str(run / "LATEST" / "policy.pt") in done.stdout
    change = {(c.stage, c.metric): c for c in demo.compare(sft, dpo)}
    loss = change["SFT", "loss (nats a response)"]
    assert loss.after < 0.9 * loss.before
    assert change["DPO", "reward accuracy"].after > 0.9
    assert change["DPO", "reward margin"].after > 0
    assert f"{loss.before:.3f}" in done.stdout
    assert f"{loss.after:.3f}" in done.stdout

"""Adapters in place of all weights: what they train, from which reference, what a checkpoint holds."""

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import load, numbers, only_run, records_of, run_ambersafe, run_python
from test_machines import assert_equal_to_four_digits
from test_real_upstream import TINY, model, rows  # noqa: F401, fixtures
from test_resume import SETTINGS, kill_with_everything_it_started, start, wait_for_step
from test_speed import ask

from ambersafe_cli import demo

pytestmark = pytest.mark.slow

LORA = ("--lora", "--lora-rank", "8", "--lr", "1e-3")
# Other layers, and a scaling of 1.5 beside SFT's 4: what is saved of both has to be exact all the same.
OTHER_LORA = ("--lora", "--lora-rank", "4", "--lora-alpha", "6", "--lora-targets", "q_proj,down_proj", "--lr", "1e-3")
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def given(patched: Path, model: Path, rows: Path) -> tuple[object, ...]:  # noqa: F811
    return ("--dir", patched, "--model", model, "--data", rows, "--trainer", "BasicTrainer", *TINY)


@pytest.fixture(scope="module")
def trained(given: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with SFT and DPO, both with LoRA, and SFT of all weights."""
    work = tmp_path_factory.mktemp("trained")
    train(work, "sft", *given, *LORA, "--exp-name", "sft")
    train(work, "dpo", *given, *OTHER_LORA, "--exp-name", "dpo", "--archive", only_run(work, "sft"), "--keep", "all")
    train(work, "sft", *given, "--exp-name", "full")
    return work


def train(work: Path, *arguments: object, **options: Any) -> str:
    work.mkdir(exist_ok=True)
    done = run_ambersafe(*arguments, cwd=work, **options)
    assert done.returncode == 0, done.stderr
    return done.stderr


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / ADAPTER))


def assert_same_adapter(one: Path, other: Path) -> None:
    mine, theirs = weights(one / "LATEST"), weights(other / "LATEST")
    assert mine.keys() == theirs.keys()
    assert all(bool((mine[name] == theirs[name]).all()) for name in mine)


def first_evaluation(run: Path) -> dict[str, Any]:
    return dict(next(each for each in records_of(run) if each.kind == "eval").values)


# --- what is trained ---


def markov_rows(folder: Path, count: int) -> Path:
    """Rows of words each of which is followed by one of four: nothing below 4 ** -words can be learned, and no row is
    seen twice."""
    rng = random.Random(0)
    words = sorted({"".join(rng.choice("aeioubdgklmnprst") for _ in range(4)) for _ in range(64)})
    following = {word: rng.sample(words, 4) for word in words}

    def text(length: int) -> str:
        made = [rng.choice(words)]
        while len(made) < length:
            made.append(rng.choice(following[made[-1]]))
        return " ".join(made)

    folder.mkdir()
    for split, number in (("train", count), ("test", 64)):
        made = [
            {
                "prompt": f"{text(4)} {i}:",
                "response_0": f" {text(16)}",
                "response_1": f" {text(8)}",
                "is_response_0_safe": True,
                "is_response_1_safe": False,
            }
            for i in range(number)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


def test_at_a_rank_as_large_as_the_layer_lora_reaches_the_loss_of_full_fine_tuning(
    patched: Path, tmp_path: Path
) -> None:
    data, model = markov_rows(tmp_path / "rows", 4000), tmp_path / "model"  # noqa: F811, with a token for each word
    builder = Path(demo.__file__).parent / "children" / "tiny_model.py"
    run_python(builder, model, data / "train.jsonl")
    given: tuple[object, ...] = (
        "--recipe",
        "tiny",
        "--dir",
        patched,
        "--model",
        model,
        "--data",
        data,
        "--epochs",
        "1",
    )
    given += ("--lr", "2e-3", "lr_decay=cosine", "eval_every=4000", "n_eval_examples=16")
    everywhere = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,embed_tokens,lm_head"
    losses = {}
    for name, flags in {
        "full": (),
        "lora": ("--lora", "--lora-rank", "128", "--lora-alpha", "128", "--lora-targets", everywhere),
        "rank 1": ("--lora", "--lora-rank", "1", "--lora-alpha", "1", "--lora-targets", everywhere),
    }.items():
        train(tmp_path / name, "sft", *given, *flags, "--exp-name", "sft")
        steps = [each for each in records_of(only_run(tmp_path / name, "sft")) if each.kind == "train"][-24:]
        losses[name] = sum(float(each.values["loss/train"]) for each in steps) / len(steps)
    print(losses)
    assert abs(losses["lora"] / losses["full"] - 1) <= 0.02, losses
    assert losses["rank 1"] > 1.5 * losses["full"], "or the rank would not matter, and this would show nothing"


def test_dpo_begins_at_ln_2_and_the_cache_of_the_reference_changes_nothing(
    given: tuple[object, ...], trained: Path, tmp_path: Path
) -> None:
    archive = only_run(trained, "sft")
    train(tmp_path, "dpo", *given, *OTHER_LORA, "--exp-name", "dpo", "--archive", archive, "cache_reference=false")
    mine, cached = only_run(tmp_path, "dpo"), only_run(trained, "dpo")
    begun = first_evaluation(mine)
    assert begun["loss/eval"] == 0.69315
    assert {begun[f"rewards_eval/{kind}"] for kind in ("chosen", "rejected", "margins")} == {0}
    assert first_evaluation(cached)["loss/eval"] == 0.69315
    assert_equal_to_four_digits(mine, cached)  # of other batches, whose sums are rounded otherwise
    assert "building reference model" not in (mine / "train.log").read_text(), "there is no second copy"


def test_with_the_trained_adapter_off_log_probabilities_are_those_of_the_archive_to_the_last_bit(
    patched: Path,
    model: Path,  # noqa: F811
    trained: Path,
) -> None:
    sft, dpo = only_run(trained, "sft") / "LATEST", only_run(trained, "dpo") / "LATEST"
    assert ask(
        patched,
        model,
        f"""
import adapters
from omegaconf import OmegaConf
config = dict(lora_rank=4, lora_alpha=6, lora_dropout=0.1, lora_targets=["q_proj", "down_proj"], seed=0)
config["mixed_precision"] = None
def load():
    return transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
policy, reference = load(), load()
adapters.add_adapters(policy, OmegaConf.create(config), {str(sft)!r}, 0)
adapters.load_trained_adapter(policy, {str(dpo)!r})
import peft
reference = peft.PeftModel.from_pretrained(reference, {str(sft)!r}).eval()
whole = peft.PeftModel.from_pretrained(load(), {str(dpo)!r}).eval()
made = trainer(response_logits_only=False, mixed_precision=None)
given = batch(6, ("chosen",))
given = [given[f"chosen_{{k}}"] for k in ("input_ids", "attention_mask", "labels")]
with torch.no_grad():
    with adapters.without_trained_adapter(policy.train()) as off:  # its dropout is off, too
        mine = made.get_logps(off, *given)
    wanted, on = made.get_logps(reference, *given), made.get_logps(policy.eval(), *given)
    sum_of_both = made.get_logps(whole, *given)
trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
print(json.dumps([bool((mine == wanted).all()), bool((on != mine).all()), bool((on - sum_of_both).abs().max() < 1e-4),
                  all("default" in n for n, p in policy.named_parameters() if p.requires_grad) and trainable > 0]))
""",
    ) == [True, True, True, True]


def test_two_ranks_train_the_adapter_that_one_process_trains(
    given: tuple[object, ...], trained: Path, tmp_path: Path
) -> None:
    archive = only_run(trained, "sft")
    train(tmp_path, "sft", *given, *LORA, "--exp-name", "sft", "--trainer", "FSDPTrainer", "--nproc", "2")
    several = ("--exp-name", "dpo", "--archive", archive, "--trainer", "FSDPTrainer", "--nproc", "2")
    train(tmp_path, "dpo", *given, *OTHER_LORA, *several)
    for stage in ("sft", "dpo"):
        assert_equal_to_four_digits(only_run(tmp_path, stage), only_run(trained, stage))
        mine, theirs = (weights(only_run(work, stage) / "LATEST") for work in (tmp_path, trained))
        assert mine.keys() == theirs.keys()
        assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-3


# --- checkpoints ---


def test_a_checkpoint_holds_the_adapter_alone_and_any_reader_of_peft_s_finds_it(trained: Path, model: Path) -> None:  # noqa: F811
    run = only_run(trained, "dpo")
    folder = run / "LATEST"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["adapter_config.json", ADAPTER, "metrics.json", "optimizer.pt", "policy.pt", "scheduler.pt"]
    assert {path.stat().st_mode & 0o044 for path in folder.iterdir()} <= {0o044, 0}
    assert (folder / ADAPTER).stat().st_mode == (folder / "adapter_config.json").stat().st_mode
    assert load(folder / "policy.pt")["state"] == {}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    found = weights(folder)
    rank = {name: tensor.shape[0] for name, tensor in found.items() if "lora_A" in name}
    both = [rank[name] for name in rank if "q_proj" in name or "down_proj" in name]
    assert set(both) == {12} and set(rank.values()) == {8, 12}, "the archive's and its own"
    full = only_run(trained, "full") / "LATEST" / "policy.pt"
    assert sum(path.stat().st_size for path in folder.iterdir()) < full.stat().st_size


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_run_that_is_killed_ends_with_the_adapter_of_one_that_is_not(
    stage: str,
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    trained: Path,
    tmp_path: Path,
) -> None:
    rng = random.Random(os.environ.get("AMBERSAFE_TEST_SEED", stage))
    given = ["--dir", patched, "--model", model, "--data", rows, "--trainer", "BasicTrainer", *SETTINGS, *OTHER_LORA]
    given += ["--lora-dropout", "0.1", "--exp-name", stage]
    given += ["--archive", only_run(trained, "sft")] if stage == "dpo" else []
    train(tmp_path / "whole", stage, *given)
    (tmp_path / "killed").mkdir()
    child = start(stage, tmp_path / "killed", *given)
    for kill in sorted(rng.sample(range(2, 24), 2)):
        wait_for_step(child, kill * 16)
        time.sleep(rng.random() * 0.2)
        run = only_run(tmp_path / "killed", stage)
        kill_with_everything_it_started(child, run)
        assert not list(run.glob("LATEST"))
        child = start("resume", tmp_path / "killed")
    output = child.communicate()[0].decode()
    assert child.returncode == 0, output
    killed, whole = only_run(tmp_path / "killed", stage), only_run(tmp_path / "whole", stage)
    assert numbers(killed) == numbers(whole)
    assert_same_adapter(killed, whole)


def test_what_is_not_as_it_was_written_is_not_trained_from(
    given: tuple[object, ...], trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(only_run(trained, "sft") / "LATEST", tmp_path / "archive")
    with (tmp_path / "archive" / ADAPTER).open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    flags = ("--exp-name", "dpo", "--archive", tmp_path / "archive" / "policy.pt")
    done = run_ambersafe("dpo", *given, *LORA, *flags, cwd=tmp_path)
    assert done.returncode and ADAPTER in done.stderr and "not the one that was saved" in done.stderr, done.stderr
    (tmp_path / "archive" / ADAPTER).unlink()
    done = run_ambersafe("dpo", *given, *LORA, *flags, cwd=tmp_path)
    assert done.returncode and ADAPTER in done.stderr and "is not beside it" in done.stderr, done.stderr
    assert not list(tmp_path.glob(".cache/*/dpo*"))


# --- what it goes with ---


def test_an_adapter_lies_on_all_weights_of_an_archive_and_all_weights_go_on_from_an_adapter(
    given: tuple[object, ...], trained: Path, tmp_path: Path
) -> None:
    full, lora = only_run(trained, "full"), only_run(trained, "sft")
    said = train(tmp_path, "dpo", *given, *LORA, "--exp-name", "on_full", "--archive", full)
    on_full = only_run(tmp_path, "on_full")
    assert load(on_full / "LATEST" / "policy.pt")["adapter"]["on"] == str(full / "LATEST" / "policy.pt")
    assert "trains all weights" not in said
    said = train(tmp_path, "dpo", *given, "--exp-name", "all", "--archive", lora)
    assert "of a run with LoRA, and this run trains all weights" in said
    every = only_run(tmp_path, "all")
    assert load(every / "LATEST" / "policy.pt")["state"]
    train(tmp_path, "dpo", *given, *LORA, "--exp-name", "chain", "--archive", on_full)
    for run, archive in ((on_full, full), (every, lora), (only_run(tmp_path, "chain"), on_full)):
        begun = first_evaluation(run)
        assert begun["loss/eval"] == 0.69315, run
        # What it starts from is what the archive's run ended with.
        key = "logps_eval/chosen"
        ended = [each for each in records_of(archive) if each.kind == "eval"][-1].values
        assert archive != on_full or float(begun[key]) == float(ended[key])
    train(
        tmp_path,
        "dpo",
        *given,
        *LORA,
        "--exp-name",
        "two",
        "--archive",
        lora,
        "--trainer",
        "FSDPTrainer",
        "--nproc",
        "2",
    )


def test_an_adapter_outside_of_the_blocks_is_saved_by_several_ranks(given: tuple[object, ...], tmp_path: Path) -> None:
    """FSDP leaves its root, which has these layers, gathered after an evaluation."""
    flags = ("--lora", "--lora-rank", "4", "--lora-targets", "lm_head,embed_tokens,q_proj", "--lr", "1e-3")
    several = ("--trainer", "FSDPTrainer", "--nproc", "2")
    for name, ranks in (("one", ()), ("two", several)):
        train(tmp_path / name, "sft", *given, *flags, *ranks, "--exp-name", "sft", "--seed", "20261124")
    one, two = only_run(tmp_path / "one", "sft"), only_run(tmp_path / "two", "sft")
    assert_equal_to_four_digits(two, one)
    assert weights(two / "LATEST").keys() == weights(one / "LATEST").keys()


def test_a_large_seed_and_dropout_go_together(given: tuple[object, ...], tmp_path: Path) -> None:
    flags = (*LORA, "--lora-dropout", "0.1", "--seed", str(2**32 - 1), "n_epochs=null", "n_examples=16")
    train(tmp_path, "sft", *given, *flags, "--exp-name", "sft")


def test_the_reference_cache_is_another_one_where_the_weights_below_an_adapter_are(
    patched: Path,
    model: Path,  # noqa: F811
    trained: Path,
    tmp_path: Path,
) -> None:
    copy, full = shutil.copytree(model, tmp_path / "model"), tmp_path / "full.pt"
    shutil.copy(only_run(trained, "full") / "LATEST" / "policy.pt", full)
    adapter = only_run(trained, "sft") / "LATEST" / "policy.pt"
    assert (
        ask(
            patched,
            model,
            f"""
import os
from omegaconf import OmegaConf
def key(archive={str(adapter)!r}, trainer="BasicTrainer", lora=True, mp=None):
    return utils.fingerprint_reference_model(OmegaConf.create(dict(
        attn_implementation=None, trainer=trainer, mixed_precision=None, lora=lora, quantize=None, model=dict(
            name_or_path={str(copy)!r}, reference_dtype="float32", policy_dtype="float32", archive=archive,
            fsdp_policy_mp=mp))))
before = [key(), key(lora=False), key({str(full)!r}, lora=False)]
again = [key(), key(lora=False), key({str(full)!r}, lora=False)]
other = [key(trainer="FSDPTrainer"), key(trainer="FSDPTrainer", mp="bfloat16")]
os.utime({str(copy)!r} + "/model.safetensors", (1, 1))
after = [key(), key(lora=False), key({str(full)!r}, lora=False)]
print(json.dumps([before == again, before[0] != after[0], before[1] != after[1], before[2] == after[2],
                  len({{before[0], *other}}) == 3]))
""",
        )
        == [True] * 5
    )


def test_an_adapter_is_not_put_on_other_weights_than_it_was_trained_on(
    given: tuple[object, ...], trained: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full.pt"
    shutil.copy(only_run(trained, "full") / "LATEST" / "policy.pt", full)
    train(tmp_path, "dpo", *given, *LORA, "--exp-name", "first", "--archive", full)
    step = sorted(only_run(trained, "full").glob("step-*/policy.pt"))[0]
    shutil.copy(step, full)
    archive = ("--archive", only_run(tmp_path, "first"))
    for flags in ((), ("--no-preflight",)):
        done = run_ambersafe("dpo", *given, *LORA, *archive, "--exp-name", "second", *flags, cwd=tmp_path)
        assert done.returncode and str(full) in done.stderr and "trained on" in done.stderr, done.stderr
    done = run_ambersafe("export", only_run(tmp_path, "first"), "--merge", cwd=tmp_path)
    assert done.returncode and "others than the adapter was trained on" in done.stderr, done.stderr


def test_the_state_of_a_paged_optimizer_is_paged_again_when_it_has_been_loaded(
    given: tuple[object, ...], tmp_path: Path
) -> None:
    """On a CPU bitsandbytes pages nothing, but the way there is the same."""
    flags = ("--lora", "--lora-rank", "64", "--optimizer", "PagedAdamW8bit", "--no-preflight", "--keep", "all")
    train(tmp_path, "sft", *given, *flags, "--exp-name", "sft")
    run = only_run(tmp_path, "sft")
    before = numbers(run)
    shutil.rmtree(run / "LATEST")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "failed", "exit_status": 1}))
    train(tmp_path, "resume", run)
    assert numbers(run) == before


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantized_weights_train_in_both_stages_and_a_killed_run_goes_on(
    bits: str, given: tuple[object, ...], tmp_path: Path
) -> None:
    flags = (*LORA, "--quantize", bits)
    said = train(tmp_path, "sft", *given, *flags, "--exp-name", "sft", "--activation-checkpointing")
    assert "quantized weights are slow" in said
    train(tmp_path, "dpo", *given, *flags, "--exp-name", "dpo", "--archive", only_run(tmp_path, "sft"), "--keep", "all")
    run = only_run(tmp_path, "dpo")
    assert first_evaluation(run)["loss/eval"] == 0.69315
    losses = [float(each.values["loss/train"]) for each in records_of(run) if each.kind == "train"]
    assert losses[-1] < losses[0]
    shutil.rmtree(run / "LATEST")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "failed", "exit_status": 1}))
    before = numbers(run)
    train(tmp_path, "resume", run)
    assert numbers(run) == before


def dtypes(value: Any) -> set[str]:
    """Those of all tensors in nested dicts."""
    if isinstance(value, dict):
        return {dtype for each in value.values() for dtype in dtypes(each)}
    return {str(value.dtype)} if hasattr(value, "dtype") else set()


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_an_optimizer_by_name_goes_on_from_its_checkpoint_as_if_nothing_had_been(
    name: str, given: tuple[object, ...], tmp_path: Path
) -> None:
    flags = ("--lora", "--lora-rank", "64", "--optimizer", name, "--exp-name", "sft", "--keep", "all")
    train(tmp_path, "sft", *given, *flags)
    run = only_run(tmp_path, "sft")
    assert ("torch.uint8" in dtypes(load(run / "LATEST" / "optimizer.pt"))) == (name == "AdamW8bit")
    shutil.copytree(run, tmp_path / "kept")
    shutil.rmtree(run / "LATEST")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "failed", "exit_status": 1}))
    train(tmp_path, "resume", run)
    assert numbers(run) == numbers(tmp_path / "kept")
    assert_same_adapter(run, tmp_path / "kept")


def test_a_reference_model_in_the_memory_of_the_machine_gives_the_same_digits(
    given: tuple[object, ...], trained: Path, tmp_path: Path
) -> None:
    flags = ("--archive", only_run(trained, "full"))
    for name, setting in (("here", "false"), ("there", "true")):
        for cached in ("false", "true"):
            own = (f"offload_reference={setting}", f"cache_reference={cached}")
            work = tmp_path / f"{name}_{cached}"
            train(work, "dpo", *given, *flags, "--exp-name", "dpo", *own)
            assert numbers(only_run(work, "dpo")) == numbers(only_run(tmp_path / f"here_{cached}", "dpo"))


def test_nobody_who_does_not_ask_for_it_needs_or_imports_peft_or_bitsandbytes(
    given: tuple[object, ...], trained: Path, tmp_path: Path
) -> None:
    """Both stages, evaluation and export, where importing either of them, or asking for its version, fails."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(
        """
import importlib.machinery, importlib.metadata
find = importlib.machinery.PathFinder.find_spec
def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in ("peft", "bitsandbytes") else find(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_others)
version = importlib.metadata.version
def refuse(name):
    if name in ("peft", "bitsandbytes"):
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = refuse
"""
    )
    env = {"PYTHONPATH": str(tmp_path / "path")}
    train(tmp_path, "sft", *given, "--exp-name", "sft", env=env)
    train(tmp_path, "dpo", *given, "--exp-name", "dpo", "--archive", only_run(tmp_path, "sft"), env=env)
    train(tmp_path, "evaluate", only_run(tmp_path, "dpo"), "--limit", "4", env=env)
    train(tmp_path, "export", only_run(tmp_path, "dpo"), env=env)
    for flags, package, extra in (
        (("--lora",), "peft", "lora"),
        (("--optimizer", "AdamW8bit"), "bitsandbytes", "quantize"),
        (("--lora", "--quantize", "4bit"), "bitsandbytes", "quantize"),
    ):
        done = run_ambersafe("sft", *given, *flags, "--exp-name", "refused", cwd=tmp_path, env=env)
        assert done.returncode, done.stderr
        assert f"lacks {package}" in done.stderr and f"ambersafe-cli[{extra}]" in done.stderr
    archive = ("--archive", only_run(trained, "sft"))
    done = run_ambersafe("dpo", *given, *archive, "--exp-name", "refused", cwd=tmp_path, env=env)
    assert done.returncode and "lacks peft" in done.stderr
    assert not list(tmp_path.glob(".cache/*/refused*")), "nothing was begun"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--optimizer", "adamw"), "Is it AdamW?"),
        (("--optimizer", "PagedAdamW8bit"), "there is none here"),
        (("--lora", "--lora-targets", "q_proj,nothing"), "names nothing, and no layer of"),
        (("--lora-rank", "8"), "lora_rank is about LoRA"),
        (("lora_rank=8",), "lora_rank is about LoRA"),
        (("--lora", "lora_targets=q_proj"), "all-linear or a list of names"),
        (("--lora", "--lora-targets", ""), "all-linear or a list of names"),
        (("--lora", "lora_rank=0"), "lora_rank must be a whole number"),
        (("--lora", "lora_dropout=1"), "lora_dropout must be"),
        (("--lora", "lora_alpha=-1"), "lora_alpha must be"),
        (("--quantize", "4bit"), "quantize needs LoRA"),
        (("--lora", "quantize=3bit"), "quantize must be 4bit or 8bit"),
        (("--lora", "--quantize", "4bit", "--nproc", "2"), "needs BasicTrainer"),
        (("--optimizer", "AdamW8bit", "--nproc", "2"), "needs BasicTrainer"),
        (("--lora", "lr=2e-7"), "hardly moves at it"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_loaded(
    flags: tuple[str, ...], said: str, given: tuple[object, ...], tmp_path: Path
) -> None:
    without_trainer = [each for each in given if each not in ("--trainer", "BasicTrainer")]
    done = run_ambersafe("check", "sft", *without_trainer, *flags, cwd=tmp_path)
    assert said in done.stderr, done.stderr
    assert (done.returncode != 0) == ("hardly moves" not in said)


def test_quantized_weights_under_an_archive_of_all_weights_are_refused(
    given: tuple[object, ...], trained: Path, tmp_path: Path
) -> None:
    flags = ("--lora", "--quantize", "4bit", "--archive", only_run(trained, "full"))
    done = run_ambersafe("check", "dpo", *given, *flags, cwd=tmp_path)
    assert done.returncode and "cannot be loaded into quantized ones" in done.stderr

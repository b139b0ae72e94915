"""The patches that make training fast: what they do, on the code of the real upstream, and what they leave alone."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from conftest import load, numbers, only_run, records_of, run_ambersafe, run_code
from test_real_upstream import TINY, close, model, ours, own_lines, rows  # noqa: F401, fixtures
from test_resume import kill_with_everything_it_started

from ambersafe_cli import demo, runs

pytestmark = pytest.mark.slow

LOADS = "building reference model"


def ask(clone: Path, model: Path, code: str) -> Any:  # noqa: F811
    """Run code in a Python that has upstream's modules and the tiny model; the last line that it prints is JSON."""
    script = f"""
import json, random, sys, time
sys.path.insert(0, {str(clone)!r})
import torch, transformers, trainers, utils
torch.manual_seed(0)
rng = random.Random(0)
def batch(n, names=("chosen", "rejected")):
    made = {{"prompt": [f"prompt {{i}}" for i in range(n)]}}
    for name in names:
        lengths = [rng.randint(4, 40) for _ in range(n)]
        ids = torch.randint(3, 500, (n, max(lengths) + rng.randint(0, 3)))
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, length in enumerate(lengths):
            mask[i, :length] = 1
            labels[i, rng.randint(1, length - 1):length] = 1
        made[f"{{name}}_labels"] = torch.where(labels == 1, ids, -100)
        made[f"{{name}}_input_ids"], made[f"{{name}}_attention_mask"] = ids, mask
    return made
def trainer(**config):
    from omegaconf import OmegaConf
    made = object.__new__(trainers.BasicTrainer)
    made.config, made.mp_dtype, made.device = OmegaConf.create(config), None, torch.device("cpu")
    return made
model_folder = {str(model)!r}
{code}
"""
    return json.loads(run_code(script).splitlines()[-1])


def test_microbatches_hold_every_pair_once_with_no_padding_that_none_of_them_needs(
    patched: Path,
    model: Path,  # noqa: F811
) -> None:
    assert ask(
        patched,
        model,
        """
before, after = 0, 0
for _ in range(50):
    given = batch(12, rng.choice([("chosen",), ("chosen", "rejected")]))
    names = [k[:-len("_labels")] for k in given if k.endswith("_labels")]
    ordered, place = utils.sort_batch_by_length(given)
    longest = [max(int(ordered[f"{n}_attention_mask"][i].sum()) for n in names) for i in range(12)]
    assert longest == sorted(longest, reverse=True)
    assert [ordered["prompt"][place[i]] for i in range(12)] == given["prompt"]
    for index in range(3):
        part = utils.slice_and_move_batch_for_device(ordered, index, 3, "cpu", trim=True)
        for n in names:
            assert part[f"{n}_attention_mask"].shape[1] == part[f"{n}_attention_mask"].sum(1).max()
            before += 4 * given[f"{n}_input_ids"].shape[1]
            after += part[f"{n}_input_ids"].numel()
        for row, prompt in enumerate(part["prompt"]):
            own = given["prompt"].index(prompt)
            for key, value in part.items():
                if key != "prompt":
                    width = value.shape[1]
                    assert (value[row] == given[key][own, :width]).all()
                    assert not given[key.partition("_")[0] + "_attention_mask"][own, width:].any()
print(json.dumps(after < 0.85 * before))
""",
    )


def test_log_probabilities_are_those_of_log_softmax_and_so_are_their_gradients(
    patched: Path,
    model: Path,  # noqa: F811
) -> None:
    """In chunks of any size, and from logits in 16 bits."""
    assert ask(
        patched,
        model,
        """
for numbers in (1, 70, 10**6):
    trainers.LogpsOfLabels.NUMBERS = numbers
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        logits = (5 * torch.randn(23, 17)).to(dtype)
        labels = torch.randint(0, 17, (23,))
        weights = torch.randn(23)
        found = []
        for function in (
            trainers.LogpsOfLabels.apply, lambda l, i: l.to(torch.float32).log_softmax(-1).gather(1, i[:, None])[:, 0]
        ):
            own = logits.clone().requires_grad_()
            logps = function(own * 1, labels)  # * 1: the gradient is written over what is handed in
            (logps * weights).sum().backward()
            assert own.grad.dtype == dtype
            found.append((logps.detach(), own.grad))
        (mine, my_grad), (theirs, their_grad) = found
        assert (mine == theirs).all()
        assert (my_grad - their_grad).abs().max() <= tolerance
print(json.dumps(True))
""",
    )


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "GPT2", "GPTNeoX"])
def test_logits_of_responses_alone_give_the_log_probabilities_and_gradients_of_all_logits(
    patched: Path,
    model: Path,  # noqa: F811
    kind: str,
) -> None:
    """Of every kind of output layer; Gemma2 does something to its logits behind it."""
    assert ask(
        patched,
        model,
        f"""
small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=500, intermediate_size=48)
kinds = dict(
    Llama=small | dict(num_key_value_heads=1), Gemma2=small | dict(num_key_value_heads=2, head_dim=16),
    GPT2=dict(n_embd=32, n_layer=2, n_head=2, vocab_size=500, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    GPTNeoX=small,
)
config = getattr(transformers, {kind!r} + "Config")(**kinds[{kind!r}])
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
utils.disable_dropout(model)
given = batch(6, ("chosen",))
found = []
for alone in (False, True):
    model.zero_grad()
    own = [given[f"chosen_{{k}}"] for k in ("input_ids", "attention_mask", "labels")]
    logps = trainer(response_logits_only=alone).get_logps(model, *own)
    (logps * torch.arange(6)).sum().backward()
    found.append((logps.detach(), [p.grad.clone() for p in model.parameters()]))
(theirs, their_grads), (mine, my_grads) = found
assert mine.shape == (6,) and len(set(mine.tolist())) == 6
torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
for mine, theirs in zip(my_grads, their_grads):
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()) + 1e-6)
assert not model.get_output_embeddings()._forward_pre_hooks
print(json.dumps(True))
""",
    )


def test_a_model_that_makes_its_logits_elsewhere_is_refused(patched: Path, model: Path) -> None:  # noqa: F811
    """And not, as with a batch of one it could be, given the log-probabilities of other positions."""
    assert ask(
        patched,
        model,
        """
model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
head = model.lm_head
model.lm_head = torch.nn.Identity()
model.register_forward_hook(lambda m, a, o: setattr(o, "logits", torch.nn.functional.linear(o.logits, head.weight)))
model.get_output_embeddings = lambda: head
given = batch(1, ("chosen",))
try:
    own = [given[f"chosen_{k}"] for k in ("input_ids", "attention_mask", "labels")]
    trainer(response_logits_only=True).get_logps(model, *own)
except ValueError as error:
    print(json.dumps("does not make its logits by its get_output_embeddings()" in str(error)))
""",
    )


def test_what_is_fetched_ahead_comes_in_order_and_so_does_what_it_raises(patched: Path, model: Path) -> None:  # noqa: F811
    assert ask(
        patched,
        model,
        """
made = []
def items():
    for i in range(5):
        made.append(i)
        yield i
    raise KeyError("the sixth")
ahead = utils.prefetch(items(), 2)
assert next(ahead) == 0
time.sleep(0.3)
assert len(made) == 4  # one is taken, two wait, and one is in the thread's hand
assert [next(ahead) for _ in range(4)] == [1, 2, 3, 4]
try:
    next(ahead)
except KeyError as error:
    assert "the sixth" in str(error)
    print(json.dumps(list(utils.prefetch(iter(range(9)), 2)) == list(range(9))))
""",
    )


# --- the reference model's log-probabilities ---


@pytest.fixture
def dpo(ours: Path, patched: Path, model: Path, rows: Path, tmp_path: Path) -> Callable[..., Path]:  # noqa: F811
    """Train DPO as `ours` was, in a folder that has the log-probabilities that it left, and return the run."""
    shutil.copytree(kept(ours)[0].parent, tmp_path / ".cache" / runs.user_name() / "reference_logps")

    def train(name: str, *more: str, archive: Path | None = None) -> Path:
        given = ("--dir", patched, "--model", model, "--data", rows, "--trainer", "BasicTrainer", "--exp-name", name)
        start = archive or only_run(ours, "sft")
        done = run_ambersafe("dpo", *given, "--archive", start, *TINY, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return only_run(tmp_path, name)

    return train


def kept(work: Path) -> list[Path]:
    """The arrays of a working folder, that of the training pairs first."""
    found = (work / ".cache" / runs.user_name() / "reference_logps").glob("*")
    return sorted(found, key=lambda path: -path.stat().st_size)


def log_of(run: Path) -> str:
    return (run / "train.log").read_text()


def computed(run: Path) -> int:
    """Of how many pairs a run had the reference model compute the log-probabilities."""
    (found,) = re.findall(r"reference model: log probabilities of (\d+) pairs computed", log_of(run))
    return int(found)


def test_two_epochs_need_the_reference_model_once_and_leave_a_number_for_every_pair(ours: Path) -> None:  # noqa: F811
    run = only_run(ours, "dpo")
    assert log_of(run).count(LOADS) == 1
    assert log_of(run).index(LOADS) < log_of(run).index("train stats")
    train, test = map(numpy.load, kept(ours))
    assert (train.dtype, train.shape[1], test.shape[1]) == (numpy.float32, 2, 2)
    assert numpy.isfinite(train).all()
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in kept(ours)} == {0o666 & ~umask}
    assert (train < 0).all()
    evaluated = numpy.isfinite(test).all(axis=1).sum()
    assert evaluated == 16, "n_eval_examples, of the 30 held-out pairs"
    assert computed(run) >= len(train) + evaluated


def test_another_beta_finds_them_and_never_loads_the_reference_model(dpo: Callable[..., Path]) -> None:
    run = dpo("hotter", "loss.beta=0.4", "n_epochs=1")
    assert (computed(run), LOADS in log_of(run)) == (0, False)
    first = next(record for record in records_of(run) if record.kind == "train")
    assert first.values["rewards_train/margins"] == pytest.approx(0, abs=1e-4), "they are those of the same weights"


@pytest.mark.parametrize("change", ["max_length=40", "keep_eos=true", "template=hh", "model.reference_dtype=bfloat16"])
def test_what_changes_a_pair_or_the_reference_model_has_them_computed_anew(
    dpo: Callable[..., Path], tmp_path: Path, change: str
) -> None:
    before = set(kept(tmp_path))
    run = dpo("changed", change, "n_epochs=null", "n_examples=16", "do_first_eval=false", "do_final_eval=false")
    assert computed(run) > 0
    assert len(set(kept(tmp_path)) - before) == 2


def test_another_checkpoint_has_them_computed_anew(dpo: Callable[..., Path], ours: Path, tmp_path: Path) -> None:  # noqa: F811
    before = set(kept(tmp_path))
    run = dpo("changed", "n_epochs=1", archive=only_run(ours, "dpo"))
    assert computed(run) > 0
    assert len(set(kept(tmp_path)) - before) == 2


def keep(path: Path, array: Any) -> None:
    """Write an array as it is kept, with its digest behind it."""
    content = io.BytesIO()
    numpy.save(content, array)
    path.write_bytes(content.getvalue() + hashlib.sha256(content.getvalue()).digest())


def spoil(path: Path, how: str) -> None:
    if how == "of another shape":
        keep(path, numpy.zeros((3, 2), dtype=numpy.float32))
    elif how == "a flipped bit":
        flipped = bytearray(path.read_bytes())
        flipped[200] ^= 1  # of a number, not of the header
        path.write_bytes(flipped)
    else:
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "cut off": whole[: len(whole) // 2], "no array": b"x" * 4096}[how])


@pytest.mark.parametrize("how", ["empty", "cut off", "no array", "of another shape", "a flipped bit"])
def test_an_array_that_is_damaged_is_made_anew(dpo: Callable[..., Path], ours: Path, tmp_path: Path, how: str) -> None:  # noqa: F811
    spoil(kept(tmp_path)[0], how)
    run = dpo("mended")
    assert "which is made anew" in log_of(run)
    assert numbers(run) == numbers(only_run(ours, "dpo"))
    assert [path.name for path in kept(tmp_path)] == [path.name for path in kept(ours)]
    for mine, theirs in zip(kept(tmp_path), kept(ours), strict=True):
        assert numpy.array_equal(numpy.load(mine), numpy.load(theirs), equal_nan=True)


def test_two_runs_at_once_lose_nothing_of_what_the_other_found(patched: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    assert ask(
        patched,
        model,
        f"""
import numpy, os
found = numpy.full((4, 2), numpy.nan, dtype=numpy.float32)
for row in (1, 3):
    own = trainer()
    own.rank, mine = 0, found.copy()
    mine[row] = row
    own.reference_caches = dict(train=({str(tmp_path / "logps" / "key.npy")!r}, mine))
    own.write_reference_cache("train")
kept = numpy.load({str(tmp_path / "logps" / "key.npy")!r})
assert os.listdir({str(tmp_path / "logps")!r}) == ["key.npy"]
print(json.dumps(numpy.isnan(kept[[0, 2]]).all() and kept[1, 0] == 1 and kept[3, 1] == 3, default=bool))
""",
    )


def test_a_place_that_cannot_be_written_costs_a_warning_and_not_the_run(
    dpo: Callable[..., Path],
    ours: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = kept(tmp_path)[0].parent
    shutil.rmtree(folder)
    folder.write_text("no folder")
    run = dpo("unwritable")
    assert "WARNING: the log probabilities of the reference model are not kept for later runs" in log_of(run)
    assert numbers(run) == numbers(only_run(ours, "dpo"))
    assert folder.read_text() == "no folder"


def test_what_a_killed_pass_had_written_is_not_computed_again(
    dpo: Callable[..., Path],
    ours: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """As a kill leaves it: some batches known, the others not, and a file that was being written."""
    path = kept(tmp_path)[0]
    array = numpy.load(path)
    array[len(array) // 4 :] = numpy.nan
    keep(path, array)
    partial = path.with_name(f"{path.name}.elsewhere.1.partial")
    partial.write_bytes(b"half")
    run = dpo("resumed")
    assert 0 < computed(run) <= computed(only_run(ours, "dpo"))
    assert numbers(run) == numbers(only_run(ours, "dpo"))


def test_a_kill_during_the_pass_leaves_a_run_that_resume_ends_as_if_nothing_had_been(
    ours: Path,  # noqa: F811
    patched: Path,
    model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """On rows enough for the pass to take seconds."""
    data = tmp_path / "rows"
    data.mkdir()
    for split, count in (("train", 800), ("test", 30)):
        some = [json.loads(line) for line in (demo.DATA / "train.jsonl").read_text().splitlines()]
        many = [some[i % len(some)] | {"prompt": f"{i} {some[i % len(some)]['prompt']}"} for i in range(count)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    given = ("--dir", patched, "--model", model, "--data", data, "--trainer", "BasicTrainer", "--exp-name", "dpo")
    command = ["dpo", *map(str, given), "--archive", str(only_run(ours, "sft")), *TINY, "n_epochs=1", "eval_every=960"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for work in (killed, whole):
        work.mkdir()
        child = subprocess.Popen([sys.executable, "-m", "ambersafe_cli", *command], cwd=work, stdout=subprocess.PIPE)
        assert child.stdout
        if work == killed:
            assert any(LOADS.encode() in line for line in child.stdout)
            kill_with_everything_it_started(child, only_run(work, "dpo"))
        child.communicate()
    assert "log probabilities of" not in log_of(only_run(killed, "dpo"))
    done = run_ambersafe("resume", cwd=killed)
    assert done.returncode == 0, done.stderr
    assert "no checkpoint was saved: from the beginning" in done.stderr
    assert computed(only_run(killed, "dpo")) > 0
    assert numbers(only_run(killed, "dpo")) == numbers(only_run(whole, "dpo"))


# --- precision, attention, activations ---


@pytest.mark.parametrize("ranks", [(), ("--nproc", "1")])
def test_bf16_starts_from_rewards_of_nothing_and_evaluate_computes_as_it_does(
    ours: Path,  # noqa: F811
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
    ranks: tuple[str, ...],
) -> None:
    """BasicTrainer has autocast, FSDPTrainer a policy that is cast: each has a reference model that rounds alike."""
    given = ("--dir", patched, "--model", model, "--data", rows, "--archive", only_run(ours, "sft"))
    settings = [text for text in TINY if not text.startswith("model.reference_dtype")]
    done = run_ambersafe("dpo", *given, "--bf16", *ranks, "--exp-name", "bf16", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path, "bf16")
    first, *others = records_of(run)
    assert first.values["rewards_eval/margins"] == pytest.approx(0, abs=2e-4)
    exact = {(each.kind, each.examples): each.values for each in records_of(only_run(ours, "dpo"))}
    losses = [(each.values, exact[each.kind, each.examples]) for each in others]
    assert len(losses) >= 10
    assert [mine != theirs for mine, theirs in losses].count(True) > 5, "it does compute in another precision"
    for mine, theirs in losses:
        for key in theirs.keys() & {"loss/train", "loss/eval"}:
            assert mine[key] == pytest.approx(theirs[key], rel=0.03)
    assert {tensor.dtype for tensor in load(run / "LATEST" / "policy.pt")["state"].values()} == {torch_float32()}

    done = run_ambersafe("evaluate", run, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for each in json.loads(done.stdout)["upstream"]["metrics"].values():
        assert each["here"] == pytest.approx(each["upstream"], rel=2e-3, abs=2e-3)


def torch_float32() -> Any:
    import torch

    return torch.float32


def test_activations_that_are_computed_twice_and_another_attention_change_no_number(
    ours: Path,  # noqa: F811
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    flags = ("--activation-checkpointing", "--attn", "eager", "--trainer", "BasicTrainer")
    given = ("--dir", patched, "--model", model, "--data", rows, *flags)
    done = run_ambersafe("sft", *given, "--exp-name", "sft", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log, before = log_of(only_run(tmp_path, "sft")), log_of(only_run(ours, "sft"))
    assert ("attention: eager" in log, "attention: sdpa" in before) == (True, True)
    assert ("activation checkpointing enabled" in log, "activation checkpointing" in before) == (True, False)
    lines = zip(own_lines(tmp_path, "sft"), own_lines(ours, "sft"), strict=True)
    assert all(close(mine, theirs) for mine, theirs in lines)
    assert "--activation-checkpointing" in done.stderr, "the dpo command that it ends with has it too"
    assert "--attn eager" in done.stderr


@pytest.mark.parametrize(
    ("stage", "given", "said"),
    [
        ("sft", ("--attn", "flash"), ["There is no attention flash."]),
        ("sft", ("--attn", "flash_attention_2"), ["lacks flash-attn", "needs a GPU", "computes in 16 bits only"]),
        ("sft", ("mixed_precision=float16",), ["mixed_precision must be bfloat16 or null"]),
        ("dpo", ("sample_during_eval=true",), ["cache_reference=false"]),
        ("dpo", ("trainer=TensorParallelTrainer",), ["cache_reference=false"]),
    ],
)
def test_what_does_not_go_together_is_said_before_it_starts(
    ours: Path,  # noqa: F811
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    stage: str,
    given: tuple[str, ...],
    said: list[str],
    tmp_path: Path,
) -> None:
    archive = ("--archive", only_run(ours, "sft")) if stage == "dpo" else ()
    common = ("--dir", patched, "--model", model, "--data", rows, "--recipe", "tiny", *archive)
    done = run_ambersafe(stage, *common, *given, cwd=tmp_path)
    assert done.returncode == 76
    found = " ".join(done.stderr.split())
    assert [each for each in said if each not in found] == []
    assert not list(tmp_path.glob(".cache/*/*"))

"""The patches that change numbers, each behind its key: what they do, on the code of the real upstream."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import only_run, records_of, run_ambersafe, run_code
from test_real_upstream import TINY, metric_lines, model, rows  # noqa: F401, fixtures

from ambersafe_cli import plans, recipe

pytestmark = pytest.mark.slow

CHOICES = recipe.load("best").values["sft"].keys() - recipe.load("ambersafe").values["sft"].keys() - {"keep_best"}


def ask(clone: Path, model: Path, data: Path, code: str) -> Any:  # noqa: F811
    """Run code in a Python that has upstream's preference_datasets and the tokenizer; it prints JSON."""
    script = f"""
import json, random, sys
sys.path.insert(0, {str(clone)!r})
import transformers
from preference_datasets import count_batches, get_batch_iterator, tokenize_batch_element
tokenizer = transformers.AutoTokenizer.from_pretrained({str(model)!r})
tokenizer.pad_token_id = tokenizer.eos_token_id
def batches(**options):
    given = dict(names=["saferlhf"], tokenizer=tokenizer, silent=True, n_epochs=1, max_length=64, max_prompt_length=16)
    for batch in get_batch_iterator(**(given | options)):
        yield list(zip(batch["prompt"], batch["chosen_response_only"]))
{code}
"""
    return json.loads(run_code(script, env={"SAFERLHF_DATASET": str(data)}).splitlines()[-1])


def write(folder: Path, number: int, pairs_of_a_prompt: int = 1, **values: Any) -> Path:
    folder.mkdir()
    written = [
        {
            "prompt": f"prompt number {i // pairs_of_a_prompt}",
            "response_0": f"a good answer {i}",
            "response_1": f"a bad answer {i}",
            "is_response_0_safe": True,
            "is_response_1_safe": False,
            **values,
        }
        for i in range(number)
    ]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    return folder


def test_each_key_of_best_alone_is_off_in_ambersafe_and_on_in_best() -> None:
    assert {"keep_eos", "drop_eos", "seed_data", "fill_last_batch", "shuffle_pairs", "lr_decay"} == CHOICES
    for stage in ("sft", "dpo"):
        best, ambersafe = dict(recipe.load("best").values[stage]), recipe.load("ambersafe").values[stage]
        assert all(best.pop(key) for key in (*CHOICES, "keep_best", "exp_name"))
        assert best == {key: value for key, value in ambersafe.items() if key != "exp_name"}


def test_keep_eos_cuts_no_more_than_it_has_to_and_every_response_ends_with_the_eos(
    patched: Path,
    model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    result = ask(
        patched,
        model,
        tmp_path,
        """
rng = random.Random(0)
text = lambda: " ".join(rng.choices(["first", "check", "the", "ladder", "é", "never"], k=rng.randrange(1, 40)))
ids = lambda t: tokenizer(t, add_special_tokens=False)["input_ids"]
seen = {"whole": 0, "prompt cut": 0, "response cut": 0}
for _ in range(1000):
    texts = [text() for _ in range(3)]
    mode = rng.choice(["keep_start", "keep_end"])
    mine = tokenize_batch_element(*texts, mode, tokenizer, 40, 15, True)
    prompt, chosen, rejected = (ids(t) for t in texts)
    longest = max(len(chosen), len(rejected)) + 1
    kept = mine["prompt_input_ids"]
    assert kept == (prompt[:len(kept)] if mode == "keep_start" else prompt[-len(kept):])
    assert len(kept) == min(len(prompt), max(15, 40 - longest))
    for name, whole in (("chosen", chosen), ("rejected", rejected)):
        tokens, labels = mine[name + "_input_ids"], mine[name + "_labels"]
        assert len(tokens) == len(labels) == len(mine[name + "_attention_mask"]) == min(40, len(kept) + len(whole) + 1)
        assert tokens[-1] == labels[-1] == tokenizer.eos_token_id
        assert tokens[len(kept):-1] == whole[:len(tokens) - len(kept) - 1]
        seen["response cut"] += len(tokens) - len(kept) < len(whole) + 1
    seen["prompt cut"] += len(kept) < len(prompt)
    if len(prompt) + longest <= 40:
        seen["whole"] += 1
        assert mine == tokenize_batch_element(*texts, mode, tokenizer, 40, 15)
print(json.dumps(seen))
""",
    )
    assert min(result.values()) > 50, result


def test_drop_eos_trains_on_what_is_left_as_if_the_rest_had_never_been_there(
    patched: Path,
    model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    clean, dirty = write(tmp_path / "clean", 40), tmp_path / "dirty"
    shutil.copytree(clean, dirty)
    spoil(dirty, "prompt", "response_0")  # SFT does not see a rejected response
    outputs = {}
    for name, choice in (("clean", "drop_eos=false"), ("dirty", "drop_eos=true")):
        given = ("--dir", patched, "--model", model, "--data", tmp_path / name, *TINY, "n_eval_examples=8")
        done = run_ambersafe("sft", *given, choice, "--exp-name", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        outputs[name] = done.stdout
    assert "dropped 2 examples of the train split that hold </s>" in outputs["dirty"]
    assert metric_lines(outputs["clean"]) == metric_lines(outputs["dirty"])
    refused = run_ambersafe("sft", "--no-preflight", *given, cwd=tmp_path)
    assert refused.returncode == 1
    assert "EOS token" in refused.stderr

    spoil(dirty, "response_1")
    pairs = "[pair for batch in batches(batch_size=5, drop_eos=True) for pair in batch]"
    kept = ask(patched, model, dirty, f"print(json.dumps({pairs}))")
    assert sorted(kept) == sorted(ask(patched, model, clean, f"print(json.dumps({pairs}))"))


def spoil(data: Path, *columns: str) -> None:
    """Put in a row for each column, whose text there holds the EOS."""
    rng = random.Random(0)
    for split in ("train", "test"):
        lines = (data / f"{split}.jsonl").read_text().splitlines()
        for column in columns:
            row = json.loads(lines[0]) | {"prompt": f"another one {column}"}
            row[column] += " </s> and more"
            lines.insert(rng.randrange(1, len(lines)), json.dumps(row))
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def test_seed_data_orders_the_training_data_and_leaves_the_evaluation_alone(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    outputs = {}
    for seed, choice in ((0, "false"), (7, "false"), (0, "true"), (7, "true")):
        given = ("--dir", patched, "--model", model, "--data", rows, *TINY, "--seed", seed, f"seed_data={choice}")
        done = run_ambersafe("sft", *given, "n_epochs=1", "--exp-name", f"{choice}{seed}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("changes nothing" in done.stderr) == (seed == 7 and choice == "false")
        outputs[seed, choice] = metric_lines(done.stdout)
    assert outputs[0, "false"] == outputs[7, "false"] == outputs[0, "true"]
    mine, theirs = outputs[7, "true"], outputs[0, "true"]
    assert mine[0] == theirs[0], "the first evaluation"
    assert mine[1:] != theirs[1:]


def test_fill_last_batch_trains_on_every_example_in_every_epoch_in_whole_batches(
    patched: Path,
    model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = write(tmp_path / "rows", 21)
    code = """
found = {}
for sft in (True, False):
    for fill in (False, True):
        for skip in (0, 3):
            kept = batches(batch_size=4, n_epochs=3, fill_last_batch=fill, sft_mode=sft, skip_batches=skip)
            found[f"{sft} {fill} {skip}"] = [[e[0] for e in batch] for batch in kept]
print(json.dumps(found))
"""
    found = ask(patched, model, data, code)
    for sft in (True, False):
        filled, dropped = found[f"{sft} True 0"], found[f"{sft} False 0"]
        assert {len(batch) for batch in filled} == {4}
        assert len(filled) == 16
        assert len(dropped) == 15
        everything = [prompt for batch in filled for prompt in batch]
        for epoch in range(3):
            assert len(set(everything[21 * epoch : 21 * epoch + 21])) == 21
        assert found[f"{sft} True 3"] == filled[3:]
        assert found[f"{sft} False 3"] == dropped[3:]
        assert filled[:5] == dropped[:5]


def test_shuffle_pairs_keeps_every_pair_and_spreads_those_of_a_prompt(
    patched: Path,
    model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = write(tmp_path / "rows", 160, pairs_of_a_prompt=10)
    code = """
found = {}
for shuffle_pairs in (False, True):
    found[str(shuffle_pairs)] = [list(b) for b in batches(batch_size=16, shuffle_pairs=shuffle_pairs)]
print(json.dumps(found))
"""
    found = ask(patched, model, data, code)
    shuffled, together = ([pair for batch in found[name] for pair in batch] for name in ("True", "False"))
    assert sorted(shuffled) == sorted(together)
    prompts = {name: [len({prompt for prompt, *_ in batch}) for batch in kept] for name, kept in found.items()}
    assert max(prompts["False"]) <= 4
    assert min(prompts["True"]) >= 7


def count(data: Path, stage: str) -> int:
    """How many examples an epoch of a stage has."""
    every = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    kept = [row["prompt"] for row in every if row["is_response_0_safe"] != row["is_response_1_safe"]]
    return len(set(kept)) if stage == "sft" else len(kept)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_lr_decay_reaches_zero_behind_the_last_step(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
    decay: str,
) -> None:
    given = ("--dir", patched, "--model", model, "--data", rows, *TINY, f"lr_decay={decay}", "n_epochs=3")
    done = run_ambersafe("sft", *given, "eval_every=16", "--keep", "all", "--exp-name", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path, "run")
    import torch

    steps = sorted(int(path.name[5:]) // 16 for path in run.glob("step-*"))
    rates = [torch.load(run / f"step-{n * 16}" / "optimizer.pt")["state"]["param_groups"][0]["lr"] for n in steps]
    last = torch.load(run / "LATEST" / "optimizer.pt")["state"]["param_groups"][0]["lr"]
    total, warmup = 3 * (count(rows, "sft") // 16), 3
    for step, rate in zip([*steps, total], [*rates, last], strict=True):
        progress = (step - warmup) / (total - warmup)
        wanted = {"linear": 1 - progress, "cosine": torch.cos(torch.tensor(torch.pi * progress)).item() / 2 + 0.5}
        assert rate == pytest.approx(1e-4 * (min(1, (step + 1) / 4) if step < warmup else wanted[decay]), abs=1e-10)
    assert last == pytest.approx(0, abs=1e-12)
    stats = [record for record in records_of(run) if record.kind == "train"]
    logged = {record.examples // 16 - 1: record.values["learning_rate"] for record in stats}
    assert len(logged) == total
    assert [logged[step] for step in steps] == [float(f"{rate:.5g}") for rate in rates]


def test_steps_are_counted_as_upstreams_iterator_yields_them(patched: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    """plans.count_steps and the patch's count_batches, against the batches themselves."""
    data = write(tmp_path / "rows", 23, pairs_of_a_prompt=2)
    rng = random.Random(0)
    cases = [
        (
            rng.choice((True, False)),
            rng.randrange(1, 11),
            rng.choice((None, 1, 2, 4)),
            rng.choice((None, 1, 17, 50, 97)),
        )
        for _ in range(150)
    ]
    cases = [case for case in cases if case[2] or case[3]]
    code = f"""
true, false, null = True, False, None
answers = []
for fill, batch, epochs, examples in {cases!r}:
    told = []
    options = dict(batch_size=batch, n_epochs=epochs, n_examples=examples, fill_last_batch=fill)
    number = len(list(batches(**options, on_load=told.append)))
    answers.append([number, *told])
print(json.dumps(answers))
"""
    for case, (number, told) in zip(cases, ask(patched, model, data, code), strict=True):
        fill, batch, epochs, examples = case
        assert number == told == plans.count_steps(23, batch, epochs, examples, fill), case


def test_best_trains_both_stages_and_warns_of_none_of_its_keys(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    fits = [each for each in TINY if not each.startswith(("lr=", "warmup"))]
    given = ("--recipe", "best", "--dir", patched, "--model", model, "--data", rows, *fits, "--lr", "1e-3")
    for stage in ("sft", "dpo"):
        done = run_ambersafe(stage, *given, "warmup_steps=2", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        for key in CHOICES:
            assert f"{key}=" not in done.stderr
        records = records_of(only_run(tmp_path, f"saferlhf_{stage}_best"))
        steps = [record for record in records if record.kind == "train"]
        assert len(steps) == -(-2 * count(rows, stage) // 16), "every example twice, in batches of 16"
        assert re.search(r"fill_last_batch: true", done.stdout)

"""What is found before a stage starts, with the real upstream's config and a tiny model."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import git, run_ambersafe
from test_real_upstream import model  # noqa: F401, a fixture

from ambersafe_cli import checkpoints, demo
from ambersafe_cli.errors import ArchiveError

pytestmark = pytest.mark.slow


def rows(number: int, **values: Any) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"prompt number {i}",
            "response_0": f"a good answer {i}",
            "response_1": f"a bad answer {i}",
            "is_response_0_safe": True,
            "is_response_1_safe": False,
            **values,
        }
        for i in range(number)
    ]


def write(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, part in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


class Check:
    """`ambersafe check` with what is the same in each test."""

    def __init__(self, patched: Path, model: Path, work: Path) -> None:  # noqa: F811
        self.patched, self.model, self.work = patched, model, work

    def __call__(self, stage: str, *given: object, **options: Any) -> subprocess.CompletedProcess[str]:
        common = ("--dir", self.patched, "--model", self.model, "--recipe", "tiny")
        return run_ambersafe("check", stage, *common, *given, cwd=self.work, **options)


@pytest.fixture
def check(patched: Path, model: Path, tmp_path: Path) -> Check:  # noqa: F811
    return Check(patched, model, tmp_path)


def test_a_run_with_nothing_wrong_shows_its_plan_and_starts_nothing(check: Check, tmp_path: Path) -> None:
    done = check("sft", "--data", write(tmp_path / "rows", rows(64), rows(48)))
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    assert re.search(r"optimizer steps +24, 384 examples in all\n", done.stdout), "64 prompts in batches of 16, 6 times"
    assert re.search(r"weights +2\.6 MB = 658,048 x 4 bytes\n", done.stdout)
    assert not (tmp_path / ".cache").exists()


def test_findings_and_plan_are_given_as_json(check: Check, tmp_path: Path) -> None:
    data = write(tmp_path / "rows", rows(70), rows(48))
    given = ("sft", "--dir", check.patched, "--model", check.model, "--recipe", "tiny", "--data", data)
    done = run_ambersafe("check", "--json", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["plan"]["steps"], answer["plan"]["examples"]) == (24, 384)
    assert answer["data"]["splits"]["train"]["pairs"] == 70
    assert any("last 6 prompts" in finding["what"] for finding in answer["findings"])
    failed = run_ambersafe("check", "--json", *given, "--batch-size", 100, cwd=tmp_path)
    assert failed.returncode == 76
    assert {finding["level"] for finding in json.loads(failed.stdout)["findings"]} >= {"error"}


def test_all_errors_are_told_at_once_and_the_stage_does_not_start(check: Check, tmp_path: Path) -> None:
    data = write(tmp_path / "rows", rows(10, response_0="good </s> but with an EOS"), rows(5))
    for key, value in (("batch_size", "abc"), ("eval_batch_size", "0"), ("eval_every", "1.5"), ("n_epochs", "null")):
        done = check("sft", "--data", data, f"{key}={value}")
        assert done.returncode == 76
        assert key in done.stderr
    given = ("--data", data, "--batch-size", "18", "--grad-accum", "4", "eval_every=10")
    done = check("sft", *given)
    assert done.returncode == 76
    assert "preflight found 5 errors" in done.stderr
    for message in (
        "batch_size 18 cannot be cut into 4 microbatches",
        "eval_every 10 is smaller than batch_size 18",
        "10 prompts hold the tokenizer's EOS '</s>'",
        "10 prompts to train on, fewer than batch_size 18",
        "5 prompts in the test split, fewer than eval_batch_size 16",
    ):
        assert message in done.stderr
    common = ("--dir", check.patched, "--model", check.model, "--recipe", "tiny")
    started = run_ambersafe("sft", *common, *given, cwd=tmp_path)
    assert started.returncode == 76
    assert not (tmp_path / ".cache").exists()


def test_what_is_dropped_cut_or_counted_twice_is_counted(check: Check, tmp_path: Path) -> None:
    long = rows(20, response_0=" ".join(["word"] * 200))
    done = check("dpo", "--archive", tmp_path, "--data", write(tmp_path / "rows", [*rows(50), *long], rows(40)))
    assert done.returncode == 66, "an archive that is not there is told before anything else"
    done = check("sft", "--data", tmp_path / "rows")
    assert done.returncode == 0, done.stderr
    assert "The last 2 prompts of each epoch are dropped" in done.stderr
    assert "n_eval_examples is 48, but there are 40 prompts in the test split" in done.stderr
    assert (
        "Of 50 examples looked at, 20 have a response cut and 0 their prompt; 20 responses lose their EOS"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_1": None}, "column response_1 is empty in 1 rows"),
        ({"is_response_0_safe": "yes"}, "column is_response_0_safe holds string, it must hold bool"),
        ({"is_response_1_safe": True}, "none of 20 rows has exactly one safe response"),
    ],
)
def test_data_that_cannot_be_trained_on_is_an_error(
    check: Check, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    train = [*rows(19), *rows(1, **change)] if None in change.values() else rows(20, **change)
    done = check("sft", "--data", write(tmp_path / "rows", train, rows(20)))
    assert done.returncode == 76
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_row_of_another_type_is_named_before_a_run_starts(check: Check, tmp_path: Path) -> None:
    data = write(tmp_path / "rows", [*rows(19), *rows(1, prompt=5), *rows(20)], rows(48))
    done = check("sft", "--data", data)
    assert done.returncode == 76
    assert f"{data}/train.jsonl, row 20: column prompt holds a number (5), it must hold a text" in done.stderr


def save(path: Path, state: Any) -> Path:
    import torch

    torch.save({"step_idx": 1, "state": state, "metrics": {"loss/eval": 1.0}}, path)
    return path


def test_an_archive_that_is_cut_off_foreign_or_of_another_model_is_an_error(check: Check, tmp_path: Path) -> None:
    import torch
    import transformers

    data = write(tmp_path / "rows", rows(64), rows(48))
    state = transformers.AutoModelForCausalLM.from_pretrained(check.model).state_dict()
    whole = save(tmp_path / "policy.pt", state)
    assert check("dpo", "--data", data, "--archive", whole).returncode == 0

    cut_off = tmp_path / "cut_off.pt"
    cut_off.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    foreign = tmp_path / "foreign.pt"
    torch.save(state, foreign)
    junk = tmp_path / "junk.pt"
    junk.write_text("junk")
    other = save(tmp_path / "other.pt", {**state, "model.norm.weight": torch.zeros(7), "more": torch.zeros(1)})
    optimizer = save(tmp_path / "optimizer.pt", {"state": {}, "param_groups": []})
    for archive, message in (
        (cut_off, "is not a whole checkpoint"),
        (junk, "is not a whole checkpoint"),
        (foreign, "lacks step_idx, state or metrics"),
        (optimizer, "not a policy.pt"),
        (other, "does not fit the model"),
    ):
        done = check("dpo", "--data", data, "--archive", archive)
        assert done.returncode == 76, archive
        assert message in done.stderr
    assert "model.norm.weight is 7, not 128" in done.stderr


def test_reading_a_checkpoint_runs_nothing_in_it(tmp_path: Path) -> None:
    import torch

    class Harm:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"step_idx": 1, "state": {"a": Harm()}, "metrics": {}}, tmp_path / "policy.pt")
    with pytest.raises(ArchiveError, match="it holds"):
        checkpoints.policy_shapes(tmp_path / "policy.pt")
    assert not (tmp_path / "harm").exists()


def test_shapes_are_those_that_torch_and_transformers_see(model: Path, tmp_path: Path) -> None:  # noqa: F811
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in loaded.state_dict().items()}
    assert checkpoints.model_shapes(model) == shapes
    loaded.save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    shutil.copy(model / "model.safetensors", tmp_path / "sharded" / "consolidated.safetensors")
    assert checkpoints.model_shapes(tmp_path / "sharded") == shapes
    assert checkpoints.policy_shapes(save(tmp_path / "policy.pt", loaded.state_dict())) == shapes
    assert checkpoints.parameters(shapes) == loaded.num_parameters()


def test_a_clone_that_was_edited_stops_a_run_unless_that_is_allowed(check: Check, tmp_path: Path) -> None:
    data = write(tmp_path / "rows", rows(64), rows(48))
    clone = tmp_path / "clone"
    shutil.copytree(check.patched, clone)
    (clone / "utils.py").write_text((clone / "utils.py").read_text() + "# mine\n")
    check.patched = clone
    done = check("sft", "--data", data)
    assert done.returncode == 76
    assert "was edited: utils.py" in done.stderr
    assert check("sft", "--data", data, "--allow-modified").returncode == 0
    git(clone, "commit", "--quiet", "--all", "--message", "Mine")
    assert "was edited: 'Mine'" in check("sft", "--data", data).stderr


def test_a_layer_that_the_model_has_not_is_an_error_for_fsdp(check: Check, tmp_path: Path) -> None:
    data = write(tmp_path / "rows", rows(64), rows(48))
    done = check("sft", "--data", data, "--nproc", "2", "model.block_name=GPTNeoXLayer")
    assert done.returncode == 76
    assert "GPTNeoXLayer is not a layer of LlamaForCausalLM" in done.stderr


def test_a_model_that_is_not_here_is_an_error_offline(check: Check, tmp_path: Path) -> None:
    data = write(tmp_path / "rows", rows(64), rows(48))
    check.model = Path("org/absent")
    done = check("sft", "--data", data)
    assert done.returncode == 76
    assert "org/absent is not in the Hugging Face cache, and HF_HUB_OFFLINE is set" in done.stderr
    check.model = Path("no such model")
    done = check("sft", "--data", data)
    assert done.returncode == 76
    assert "There is no model no such model" in done.stderr


@pytest.mark.parametrize("keep_eos", [False, True])
def test_tokens_are_counted_as_upstream_cuts_them(
    model: Path,  # noqa: F811
    patched: Path,
    tmp_path: Path,
    keep_eos: bool,
) -> None:
    """The arithmetic of preflight against upstream's tokenize_batch_element itself."""
    look = Path(demo.__file__).parent / "children" / "look_at_data.py"
    code = f"""
import json, random, runpy, sys
sys.path.insert(0, {str(patched)!r})
import transformers
from preference_datasets import tokenize_batch_element
look = runpy.run_path({str(look)!r})
tokenizer = transformers.AutoTokenizer.from_pretrained({str(model)!r})
count = look["open_tokenizer"]({str(model)!r}, None).lengths
rng = random.Random(0)
text = lambda: " ".join(rng.choices(["first", "check", "the", "ladder", "é", "never"], k=rng.randrange(1, 40)))
for _ in range(300):
    texts = [text() for _ in range(3)]
    prompt, *responses = (count([t])[0] for t in texts)
    element = tokenize_batch_element(*texts, "keep_start", tokenizer, 40, 15, {keep_eos})
    left, kept = look["cut_one"](prompt, [r + 1 for r in responses], 40, 15, {keep_eos})
    ids = [element[k + "_input_ids"] for k in ("prompt", "chosen", "rejected")]
    assert [left, left + kept[0], left + kept[1]] == [len(i) for i in ids], texts
    lost = sum(i[-1] != tokenizer.eos_token_id for i in ids[1:])
    assert look["cut"]([(prompt, *responses)], 40, 15, {keep_eos})["eos_lost"] == lost, texts
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_models_as_they_were_saved_years_ago_fit_their_checkpoints(tmp_path: Path) -> None:
    """Pickled shards, buffers among the weights, names without the prefix of the model's inner part."""
    import torch
    import transformers

    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=100)
    policy = transformers.GPT2LMHeadModel(config)
    archive = checkpoints.policy_shapes(save(tmp_path / "policy.pt", policy.state_dict()))
    old = {name.removeprefix("transformer."): tensor for name, tensor in policy.state_dict().items()}
    del old["lm_head.weight"]
    old["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    old["h.1.attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(old)
    shards = {"pytorch_model-1.bin": names[:5], "pytorch_model-2.bin": names[5:]}
    for file, kept in shards.items():
        torch.save({name: old[name] for name in kept}, tmp_path / file)
    weight_map = {name: file for file, kept in shards.items() for name in kept}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))

    shapes = checkpoints.model_shapes(tmp_path)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in old.items()}
    assert checkpoints.differences(archive, shapes) == []
    wrong = {**shapes, "wte.weight": (99, 8), "h.2.ln_1.weight": (8,)}
    del wrong["wpe.weight"]
    assert checkpoints.differences(archive, wrong) == [
        "h.2.ln_1.weight is missing",
        "transformer.wpe.weight is not the model's",
        "transformer.wte.weight is 100x8, not 99x8",
    ]
    (tmp_path / "pytorch_model-2.bin").write_bytes((tmp_path / "pytorch_model-2.bin").read_bytes()[:-50])
    with pytest.raises(ArchiveError, match=r"pytorch_model-2\.bin"):
        checkpoints.model_shapes(tmp_path)
    torch.save(old, tmp_path / "pytorch_model-2.bin", _use_new_zipfile_serialization=False)
    assert checkpoints.model_shapes(tmp_path) is None
    (tmp_path / "pytorch_model-2.bin").unlink()
    with pytest.raises(ArchiveError, match=r"pytorch_model-2\.bin"):
        checkpoints.model_shapes(tmp_path)


@pytest.mark.parametrize("change", [("flag_bits", 0x40), ("compress_type", 97), ("extract_version", 200)])
def test_a_zip_archive_that_python_does_not_read_is_an_error(tmp_path: Path, change: tuple[str, int]) -> None:
    """zipfile raises NotImplementedError for it, where it is opened or where a member is."""
    import torch

    field, value = change
    place = {"extract_version": 6, "flag_bits": 8, "compress_type": 10}[field]  # in an entry of the directory
    path = save(tmp_path / "policy.pt", {"a": torch.zeros(1)})
    content = bytearray(path.read_bytes())
    for entry in re.finditer(rb"PK\x01\x02", bytes(content)):
        content[entry.start() + place] = value
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="is not a whole checkpoint"):
        checkpoints.policy_shapes(path)


def test_a_file_of_weights_that_is_cut_off_is_an_error(check: Check, tmp_path: Path) -> None:
    data = write(tmp_path / "rows", rows(64), rows(48))
    broken = tmp_path / "broken"
    shutil.copytree(check.model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    check.model = broken
    done = check("sft", "--data", data)
    assert done.returncode == 76
    assert "model.safetensors is not a whole file of weights" in done.stderr


def test_a_config_of_a_model_that_is_damaged_is_an_error(check: Check, tmp_path: Path) -> None:
    data = write(tmp_path / "rows", rows(64), rows(48))
    broken = tmp_path / "broken"
    shutil.copytree(check.model, broken)
    (broken / "config.json").write_text('{"architectures": ')
    check.model = broken
    done = check("sft", "--data", data)
    assert done.returncode == 76
    assert "broken/config.json" in done.stderr


@pytest.mark.parametrize(
    ("given", "checkpoints"),
    [((), 2), (("eval_every=96",), 4), (("--save-every", "32"), 4), (("--save-every", "32", "--keep", "all"), 13)]
    + [(("--save-every", "5m"), 4)],
)
def test_the_plan_counts_the_checkpoints_that_will_be_there_at_once(
    check: Check, tmp_path: Path, given: tuple[str, ...], checkpoints: int
) -> None:
    """24 steps of 16 examples: one evaluation between, or one each 6 steps, or a save each 2."""
    data = write(tmp_path / "rows", rows(64), rows(48))
    done = check("sft", "--data", data, "eval_every=320", *given)
    assert f"= {checkpoints} checkpoints" in done.stdout


def test_a_key_that_upstream_has_not_is_an_error_and_the_one_that_is_meant_is_named(
    check: Check, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows", rows(64), rows(48))
    done = check(
        "sft",
        "--data",
        data,
        "n_epoch=1",
        "loss.betta=2",
        "wandb.entity=me",
        "+mine=1",
        "model.archive=null",
        "hydra/job_logging=none",
    )
    assert done.returncode == 76
    found = " ".join(done.stderr.split())
    assert "no key n_epoch. Is it n_epochs?" in found
    assert "no key loss.betta" in found
    assert found.count("has no key") == 2


@pytest.mark.parametrize(
    "wrong",
    [
        "save_every_examples=0", "keep_checkpoints=0", "keep_checkpoints=-1", "warmup_steps=-1", "warmup_steps=x",
        "max_grad_norm=-1", "max_grad_norm=0", "lr=-1", "lr=0", "save_every_minutes=0", "keep_best=lossx",
        "keep_best=rewards_eval/margins", "warmup_steps=null", "max_grad_norm=null", "lr=null", "n_eval_examples=0",
        "n_eval_examples=many", "wandb=null", "wandb=true", "batch_size=99999999999999999999",
    ],
)  # fmt: skip
def test_a_value_that_no_run_can_have_is_said_before_it_starts(check: Check, tmp_path: Path, wrong: str) -> None:
    data = write(tmp_path / "rows", rows(64), rows(48))
    done = check("sft", "--data", data, wrong)
    assert done.returncode != 0
    key, _, value = wrong.partition("=")
    assert re.search(rf"^error: .*\b{key if key != 'keep_best' else re.escape(value)}\b", done.stderr, re.MULTILINE)


def test_values_at_the_edge_of_what_a_run_can_have_are_taken(check: Check, tmp_path: Path) -> None:
    data = write(tmp_path / "rows", rows(64), rows(48))
    edge = ("save_every_examples=1", "keep_checkpoints=1", "warmup_steps=0", "save_every_minutes=0.5")
    done = check("sft", "--data", data, *edge, "keep_best=loss/eval")
    assert done.returncode == 0, done.stderr


def test_pairs_of_equal_responses_are_counted(check: Check, tmp_path: Path) -> None:
    alike = [{**row, "response_1": row["response_0"]} for row in rows(3)]
    data = write(tmp_path / "rows", [*alike, *rows(64)[3:]], rows(48))
    (tmp_path / "policy.pt").write_bytes(b"")
    done = check("dpo", "--data", data, "--archive", tmp_path / "policy.pt")
    assert "(train split): 3 pairs have the same text as chosen and as rejected." in done.stderr
    assert "as chosen and as rejected" not in check("sft", "--data", data).stderr


def test_a_tokenizer_without_an_eos_is_an_error(check: Check, tmp_path: Path) -> None:
    model = shutil.copytree(check.model, tmp_path / "without")  # noqa: F811
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    done = check("sft", "--data", write(tmp_path / "rows", rows(64), rows(48)), "--model", model)
    assert done.returncode != 0
    assert "error: The tokenizer has no EOS, which ends each response in training." in done.stderr

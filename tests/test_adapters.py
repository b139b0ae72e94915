"""Checkpoints of LoRA: what is checked of them, evaluated, sampled and exported is the base model with the adapter."""

import hashlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import Ambersafe, only_run, run_ambersafe, run_code
from fake_hub import FakeHub, serve
from test_export import make_llama, peak, request
from test_real_upstream import TINY, evaluate, model, rows  # noqa: F401, fixtures

from ambersafe_cli import as_trained, checkpoints, demo, environment, export, integrity, model_card, models, runs
from ambersafe_cli.errors import ArchiveError, ExportError, TrainingEnvironmentError

pytestmark = pytest.mark.slow

CHILDREN = Path(demo.__file__).parent / "children"
WEIGHTS, CONFIG = checkpoints.ADAPTER_FILES
Child = Callable[[str], ModuleType]


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    """Import a script of the folder `children` into this process, as it finds its siblings when it is run."""
    monkeypatch.syspath_prepend(str(CHILDREN))
    yield importlib.import_module
    for name in ("score_pairs", "generate", "load_policy", "export_checkpoint", "adapters", "answering"):
        sys.modules.pop(name, None)


def silent(step: str, done: float) -> None:
    assert 0 <= done <= 1


# --- checkpoints as training writes them, made with nothing but peft ---

SIZES: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
INNER: dict[str, Any] = {**SIZES, "intermediate_size": 64}
BASES: dict[str, tuple[str, dict[str, Any], str | list[str]]] = {
    "llama": ("LlamaConfig", {**INNER, "tie_word_embeddings": False}, "all-linear"),
    "llama, tied": ("LlamaConfig", {**INNER, "tie_word_embeddings": True}, "all-linear"),
    "llama, embeddings too": ("LlamaConfig", INNER, ["embed_tokens", "lm_head", "down_proj"]),
    "gpt2, weights the other way round, tied": (
        "GPT2Config",
        {"vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 4},
        ["c_attn", "c_fc"],
    ),
    "gpt-neox, renamed in files": ("GPTNeoXConfig", INNER, ["query_key_value"]),
    "mixtral, other layout in files": (
        "MixtralConfig",
        {**INNER, "num_key_value_heads": 2, "num_local_experts": 4},
        ["q_proj", "v_proj"],
    ),
}


def make_base(folder: Path, architecture: str, dtype: str = "float32") -> None:
    """Make the folder of a model with random weights, without a tokenizer."""
    import torch
    import transformers

    kind, values, _ = BASES[architecture]
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    made.to(getattr(torch, dtype)).save_pretrained(folder)


def make_adapter(
    base: Path, folder: Path, targets: str | list[str] = "all-linear", seed: int = 1, **values: Any
) -> Path:
    """Write the checkpoint of a LoRA run on a base model, with an adapter that changes it; return its policy.pt.

    Ranks and alphas differ between layers, as they do where the SFT stage and DPO had different ones.
    """
    import peft
    import torch
    import transformers

    torch.manual_seed(seed)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    pattern = {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {"down_proj": 10.5}}
    config = peft.LoraConfig(r=4, lora_alpha=6.5, target_modules=targets, task_type="CAUSAL_LM", **pattern)  # type: ignore[arg-type]
    adapted: Any = peft.get_peft_model(loaded, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    return save_policy(folder, **values)


def save_policy(folder: Path, **values: Any) -> Path:
    """Write the policy.pt of an adapter that lies in a folder."""
    import torch

    sha256 = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (WEIGHTS, CONFIG)}
    on = values.get("on")
    below = checkpoints.fingerprint(Path(on)) if isinstance(on, str) else None
    adapter = {"sha256": sha256, "on": None, "on_fingerprint": below, "quantize": None, **values}
    policy = {"step_idx": 640, "state": {}, "metrics": {"loss/eval": 1.25}, "adapter": adapter}
    torch.save(policy, folder / "policy.pt")
    return folder / "policy.pt"


def make_full(base: Path, path: Path) -> Path:
    """Write the policy.pt of full fine-tuning of a base model."""
    import torch
    import transformers

    torch.manual_seed(2)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    state = {name: value + 0.05 * torch.randn_like(value) for name, value in loaded.state_dict().items()}
    torch.save({"step_idx": 96, "state": state, "metrics": {}}, path)
    return path


@pytest.fixture(scope="module")
def tuned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:  # noqa: F811
    """A base model, and a run folder that upstream made by hand, with LoRA."""
    run = tmp_path_factory.mktemp("runs") / "mine_1"
    checkpoint = make_adapter(model, run / "LATEST")
    config = {"loss": {"name": "sft"}, "model": {"name_or_path": str(model), "archive": None}, "lora": True}
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "lora_rank": 4}))
    return SimpleNamespace(base=model, run=run, checkpoint=checkpoint)


def logits(base: Path, adapter: Path | None = None, on: Path | None = None) -> Any:
    """Those of some tokens in float32, of a base model or full weights, with an adapter by peft's own loading."""
    import peft
    import torch
    import transformers

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if on:
        loaded.load_state_dict(torch.load(on, weights_only=True)["state"])
    if adapter:
        loaded = peft.PeftModel.from_pretrained(loaded, str(adapter))
    with torch.no_grad():
        return loaded.eval()(torch.arange(40).reshape(2, 20)).logits


# --- whether a checkpoint is whole ---


def test_a_policy_tells_its_adapter_and_is_known_again_by_it(tuned: SimpleNamespace, tmp_path: Path) -> None:
    found = checkpoints.adapter_of(tuned.checkpoint)
    assert found
    assert (found.folder, found.on, found.quantize) == (tuned.checkpoint.parent, None, None)
    assert checkpoints.policy_shapes(tuned.checkpoint) == {}
    shapes = checkpoints.adapter_shapes(found)
    assert shapes["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"] == (6, 344)
    assert checkpoints.adapter_of(make_full(tuned.base, tmp_path / "full.pt")) is None
    other = make_adapter(tuned.base, tmp_path / "other", seed=2)
    assert checkpoints.fingerprint(other) != checkpoints.fingerprint(tuned.checkpoint)
    again = make_adapter(tuned.base, tmp_path / "again")
    assert checkpoints.fingerprint(again) == checkpoints.fingerprint(tuned.checkpoint)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_damage_of_an_adapters_files_is_damage_of_its_checkpoint(
    tuned: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "step-20"
    shutil.copytree(tuned.checkpoint.parent, folder)
    assert integrity.damage(folder / "policy.pt") is None
    integrity.require_whole(folder / "policy.pt")
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    assert f"the {name} beside it is not the one" in str(integrity.damage(folder / "policy.pt"))
    (folder / name).unlink()
    assert f"its adapter's {name} is not beside it" in str(integrity.damage(folder / "policy.pt"))
    with pytest.raises(ArchiveError, match="is not beside it"):
        integrity.require_whole(folder / "policy.pt")


def test_weights_below_an_adapter_that_are_gone_or_damaged_are_told(tuned: SimpleNamespace, tmp_path: Path) -> None:
    full = make_full(tuned.base, tmp_path / "full.pt")
    policy = make_adapter(tuned.base, tmp_path / "on", on=str(full))
    integrity.require_whole(policy)
    full.write_bytes(full.read_bytes()[:-1])
    with pytest.raises(ArchiveError, match=r"full.pt, whose weights are below the adapter of .* cut off"):
        integrity.require_whole(policy)
    full.unlink()
    with pytest.raises(ArchiveError, match=r"full.pt, whose weights are below the adapter of .* missing"):
        integrity.require_whole(policy)


@pytest.mark.parametrize("values", [{"quantize": "2bit"}, {"on": 3}, {"sha256": {"x": "y"}}, {"sha256": None}])
def test_an_adapter_of_an_unknown_kind_is_refused(tuned: SimpleNamespace, tmp_path: Path, values: Any) -> None:
    shutil.copytree(tuned.checkpoint.parent, tmp_path / "x")
    with pytest.raises(ArchiveError, match="an adapter of a kind that is not known"):
        checkpoints.adapter_of(save_policy(tmp_path / "x", **values))


# --- as trained ---


def weights(base: Path, checkpoint: Path | None, **values: Any) -> dict[str, Any]:
    own = {"label": "it", "model": str(base), "revision": None, "tokenizer": str(base), "tokenizer_revision": None}
    plain = {"dtype": "float32", "casts_buffers": False, "autocast": None, "quantize": None}
    more = {"adapter_dtype": "float32", "trained_rank": None, "merges": False}
    return {**own, **plain, **more, "checkpoint": checkpoint and str(checkpoint), **values}


def loaded_logits(child: Child, given: dict[str, Any]) -> Any:
    import torch

    loaded, _ = child("load_policy").load_model(given)
    with torch.no_grad():
        return loaded(torch.arange(40).reshape(2, 20)).logits


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("is_on_full", [False, True])
def test_a_policy_is_loaded_as_peft_loads_it(
    child: Child, tuned: SimpleNamespace, tmp_path: Path, is_on_full: bool, merges: bool
) -> None:
    full = make_full(tuned.base, tmp_path / "full.pt") if is_on_full else None
    policy = make_adapter(tuned.base, tmp_path / "on", on=full and str(full))
    wanted = logits(tuned.base, policy.parent, full)
    found = loaded_logits(child, weights(tuned.base, policy, merges=merges))
    assert (found - wanted).abs().max() < 1e-5
    assert (wanted - logits(tuned.base, None, full)).abs().max() > 0.01, "or this shows nothing"
    saved = child("load_policy").load_model(weights(tuned.base, policy))[1]
    assert (saved["step_idx"], saved["metrics"]) == (640, {"loss/eval": 1.25})


def test_the_adapters_of_two_stages_are_added_one_by_one_as_in_training(
    child: Child, tuned: SimpleNamespace, tmp_path: Path
) -> None:
    """In bfloat16 that is not the same numbers as one adapter of both."""
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file

    policy = make_adapter(tuned.base, tmp_path / "both", targets=["q_proj", "v_proj"])
    saved = load_file(policy.parent / WEIGHTS)
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(tuned.base, dtype=torch.bfloat16)
    for adapter, place in (("archive", slice(0, 3)), ("default", slice(3, 4))):
        # Of a rank of 4 and an alpha of 6.5, with one scaling.
        rank = place.stop - place.start
        own = peft.LoraConfig(r=rank, lora_alpha=6.5 / 4 * rank, target_modules=["q_proj", "v_proj"])  # type: ignore[arg-type]
        peft.inject_adapter_in_model(own, base, adapter)
        for name, layer in base.named_modules():
            if hasattr(layer, "lora_A"):
                a, b = (saved[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
                layer.lora_A[adapter].weight = torch.nn.Parameter(a[place])
                layer.lora_B[adapter].weight = torch.nn.Parameter(b[:, place])
                layer.set_adapter([each for each in ("archive", "default") if each in layer.lora_A])
                layer.cast_input_dtype_enabled = False
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = base.eval()(torch.arange(40).reshape(2, 20)).logits
    given = weights(tuned.base, policy, dtype="bfloat16", autocast="bfloat16", trained_rank=1)
    assert torch.equal(loaded_logits(child, given), wanted)
    assert not torch.equal(loaded_logits(child, {**given, "trained_rank": None}), wanted)
    for autocast in (None, "bfloat16"):
        loaded, _ = child("load_policy").load_model({**given, "autocast": autocast})
        layers = child("adapters").layers_of(loaded).values()
        assert {layer.cast_input_dtype_enabled for layer in layers} == {autocast is None}


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_base_model_is_that_of_training(
    child: Child, tuned: SimpleNamespace, tmp_path: Path, bits: str
) -> None:
    """The adapter is on what bitsandbytes makes of the base model, which differs from it."""
    import peft
    import torch
    import transformers

    policy = make_adapter(tuned.base, tmp_path / "quantized", quantize=bits)
    own: dict[str, Any] = {"load_in_8bit": True}
    if bits == "4bit":
        own = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
        own |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    quantization: Any = transformers.BitsAndBytesConfig(**own)
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tuned.base, dtype=torch.float32, quantization_config=quantization
    )
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(base, str(policy.parent)).eval()
        wanted = adapted(torch.arange(40).reshape(2, 20)).logits
    found = loaded_logits(child, weights(tuned.base, policy, quantize=bits))
    assert torch.equal(found, wanted)
    assert not torch.equal(found, loaded_logits(child, weights(tuned.base, policy)))


def test_precision_is_that_of_the_training_and_the_reference_model_is_the_policys(tuned: SimpleNamespace) -> None:
    run = runs.look(tuned.run, by_hand=True)
    config = {**as_trained.config(run), "model.policy_dtype": "bfloat16", "mixed_precision": "bfloat16"}
    config |= {"trainer": "BasicTrainer", "lora_rank": 8}
    adapter = replace(checkpoints.adapter_of(tuned.checkpoint), quantize="4bit")  # type: ignore[type-var]
    policy = as_trained.policy_precision(config, adapter)
    assert (policy.dtype, policy.autocast, policy.quantize) == ("bfloat16", "bfloat16", "4bit")
    assert (policy.adapter_dtype, policy.trained_rank) == ("float32", 8)
    assert as_trained.reference_precision(config, adapter) == replace(policy, trained_rank=None)
    assert as_trained.reference_precision(config).dtype == config["model.reference_dtype"]
    sharded = as_trained.policy_precision({**config, "trainer": "FSDPTrainer"}, adapter)
    assert (sharded.dtype, sharded.autocast, sharded.adapter_dtype) == ("bfloat16", None, "bfloat16")
    config |= {"mixed_precision": None, "model.fsdp_policy_mp": None}
    sharded = as_trained.policy_precision({**config, "trainer": "FSDPTrainer"}, adapter)
    assert (sharded.dtype, sharded.adapter_dtype) == ("bfloat16", "float32"), "nothing is cast"


def test_only_a_published_model_is_quantized(tuned: SimpleNamespace, tmp_path: Path) -> None:
    full = make_full(tuned.base, tmp_path / "full.pt")
    on_full = make_adapter(tuned.base, tmp_path / "on", on=str(full))
    precision = as_trained.Precision("bfloat16", quantize="4bit")
    base = models.of_model(str(tuned.base), None)
    for checkpoint, quantized in ((None, "4bit"), (tuned.checkpoint, "4bit"), (full, None), (on_full, None)):
        found = as_trained.for_child(replace(base, checkpoint=checkpoint), precision)
        assert found["quantize"] == quantized
    assert as_trained.for_child(replace(base, checkpoint=tuned.checkpoint), precision, merges=True)["quantize"] is None


def test_what_the_interpreter_lacks_is_told_before_anything_is_loaded(
    tuned: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_, plain = models.find(str(tuned.run)), models.of_model(str(tuned.base), None)
    probed = environment.probe(sys.executable)
    monkeypatch.setattr(environment, "probe", lambda python: replace(probed, extras={}))
    as_trained.require_packages("some-python", [plain], [None])
    with pytest.raises(TrainingEnvironmentError, match="lacks peft, which the adapter of") as raised:
        as_trained.require_packages("some-python", [plain, weights_], ["4bit"])
    assert "'ambersafe-cli[lora]'" in raised.value.hint
    monkeypatch.setattr(environment, "probe", lambda python: replace(probed, extras={"peft": "1"}))
    as_trained.require_packages("some-python", [weights_], [None])
    with pytest.raises(TrainingEnvironmentError, match="lacks bitsandbytes, which a model in 4bit") as raised:
        as_trained.require_packages("some-python", [weights_], ["4bit", None])
    assert "'ambersafe-cli[quantize]'" in raised.value.hint
    lacking: Any = export.Request(str(tuned.run), None, None, False, None, False, None, False, "some-python", False)
    monkeypatch.setattr(environment, "probe", lambda python: replace(probed, extras={}))
    with pytest.raises(TrainingEnvironmentError, match="lacks peft"):
        export.run(lacking)
    assert not (tuned.run / "hugging_face").exists()


# --- export ---

WITHOUT_PEFT = """
import sys

sys.modules["peft"] = None
import torch, transformers

folder, wanted = sys.argv[1:]
loaded, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(found.values()), found
assert loaded.dtype == torch.float32
with torch.no_grad():
    print("difference", float((loaded(torch.arange(40).reshape(2, 20)).logits - torch.load(wanted)).abs().max()))
"""


def difference_without_peft(folder: Path, wanted: Any, place: Path) -> float:
    """Between the logits of an exported folder, loaded where peft cannot be imported, and those that are wanted."""
    import torch

    torch.save(wanted, place / "wanted.pt")
    said = run_code(WITHOUT_PEFT, folder, place / "wanted.pt")
    assert said.startswith("difference ")
    return float(said.split()[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", BASES)
def test_merged_logits_are_those_of_the_base_model_with_the_adapter(
    architecture: str,
    dtype: str,
    child: Child,
    model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    make_base(tmp_path / "base", architecture, dtype)
    policy = make_adapter(tmp_path / "base", tmp_path / "step-640", BASES[architecture][2])
    out, given = tmp_path / "out", {"checkpoint": str(policy), "tokenizer": str(model), "shard_bytes": 30_000}
    answer = child("export_checkpoint").main(request(tmp_path / "base", out, merge=True, **given), silent)
    wanted = logits(tmp_path / "base", policy.parent)
    assert difference_without_peft(out, wanted, tmp_path) < 1e-5
    assert (wanted - logits(tmp_path / "base")).abs().max() > 1e-3, "or this shows nothing"
    export.require_whole(out, answer, export._shapes(answer["shapes"]))
    assert len(answer["left_out"]) == ("tied" in architecture)
    assert answer["dtype"] == "float32", "whatever the base model has: what was learned is not rounded away"


def test_merged_on_full_fine_tuning_is_that_with_the_adapter(
    tuned: SimpleNamespace, ambersafe: Ambersafe, tmp_path: Path
) -> None:
    full = make_full(tuned.base, tmp_path / "full.pt")
    policy = make_adapter(tuned.base, tmp_path / "on", on=str(full))
    done = ambersafe("export", policy, "--model", tuned.base)
    assert done.returncode == 64
    assert "no published model has" in " ".join(done.stderr.split())
    assert "--merge" in done.stderr
    done = ambersafe("export", policy, "--model", tuned.base, "--merge")
    assert done.returncode == 0, done.stderr
    folder = policy.parent / "hugging_face-merged"
    assert done.stdout == f"{folder}\n"
    assert difference_without_peft(folder, logits(tuned.base, policy.parent, full), tmp_path) < 1e-5
    assert "the weights, fully fine-tuned, that it was trained on" in (folder / "README.md").read_text()


ALONE = """
import sys
import peft, torch, transformers

folder, base, step = sys.argv[1:]
ids = torch.arange(40).reshape(2, 20)
with torch.no_grad():
    one, other = (
        peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), each)(ids).logits
        for each in (folder, step)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, transformers.AutoModelForCausalLM.from_pretrained(base)(ids).logits)
words = [transformers.AutoTokenizer.from_pretrained(each) for each in (folder, base)]
for text in ("Hello  world", "\\n\\nHuman: I\\'ve a question.\\n\\nAssistant:", "é 你好 🙂 \\t </s> <s>x"):
    assert words[0](text)["input_ids"] == words[1](text)["input_ids"]
scope = {}
exec(open(f"{folder}/README.md").read().partition("```python\\n")[2].partition("```")[0], scope)
with torch.no_grad():
    assert torch.equal(scope["model"](ids).logits, one), "the card loads the same"
assert not [name for name in sys.modules if name.startswith("ambersafe")]
print("equal")
"""


def test_an_exported_adapter_loads_with_peft_and_its_card_can_be_followed(
    tuned: SimpleNamespace, ambersafe: Ambersafe
) -> None:
    done = ambersafe("export", tuned.run)
    folder = tuned.run / "hugging_face"
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}\n"
    names = {path.name for path in folder.iterdir()}
    assert {WEIGHTS, CONFIG, "README.md", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    assert (folder / WEIGHTS).read_bytes() == (tuned.checkpoint.parent / WEIGHTS).read_bytes()
    assert run_code(ALONE, folder, tuned.base, tuned.checkpoint.parent, cwd=tuned.run).endswith("equal\n")
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card
    assert "parameters of an adapter (LoRA) in float32" in card
    assert str(tuned.base) not in card


def test_an_exported_adapter_in_bfloat16_is_the_checkpoints_rounded(
    tuned: SimpleNamespace, ambersafe: Ambersafe, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    out = tmp_path / "out"
    done = ambersafe("export", tuned.run, "--out", out, "--dtype", "bfloat16", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dtype"] == "bfloat16"
    found, wanted = (load_file(place / WEIGHTS) for place in (out, tuned.checkpoint.parent))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name].bfloat16()) for name in wanted)
    adapter = checkpoints.adapter_of(tuned.checkpoint)
    assert adapter
    answer = {"tensors": {name: [list(tensor.shape), "BF16"] for name, tensor in wanted.items()}}
    export.require_whole_adapter(out, answer, adapter)
    answer["tensors"].popitem()
    with pytest.raises(ExportError, match="does not hold"):
        export.require_whole_adapter(out, answer, adapter)


def test_an_adapter_with_another_byte_than_the_checkpoints_is_not_whole(
    tuned: SimpleNamespace, child: Child, tmp_path: Path
) -> None:
    out, adapter = tmp_path / "out", checkpoints.adapter_of(tuned.checkpoint)
    assert adapter
    answer = child("export_checkpoint").main(request(tuned.base, out, checkpoint=str(tuned.checkpoint)), silent)
    export.require_whole_adapter(out, answer, adapter)
    content = bytearray((out / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (out / WEIGHTS).write_bytes(content)
    with pytest.raises(ExportError, match="does not hold"):
        export.require_whole_adapter(out, answer, adapter)
    (out / WEIGHTS).write_bytes(content[:-1])
    with pytest.raises(ExportError, match="cannot be read again"):
        export.require_whole_adapter(out, answer, adapter)


def test_of_a_model_on_the_hub_name_and_commit_are_in_the_config_and_merging_fetches_the_weights(
    tuned: SimpleNamespace, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in tuned.base.iterdir()}
    shutil.copytree(tuned.checkpoint.parent, tmp_path / "mine")
    given = ("export", tmp_path / "mine" / "policy.pt", "--model", "org/tiny")
    env = {"HF_HOME": str(tmp_path / "home")}
    with serve(FakeHub({"models/org/tiny": {"main": files}})) as fake:
        online = {**env, "HF_ENDPOINT": fake.url, "HF_HUB_OFFLINE": ""}
        done = run_ambersafe(*given, cwd=tmp_path, env=online)
        assert done.returncode == 0, done.stderr
        assert "model.safetensors" not in {Path(path).name for path in fake.fetched()}
        offline = run_ambersafe(*given, "--merge", cwd=tmp_path, env={**env, "HF_HUB_OFFLINE": "1"})
        assert offline.returncode == 77, offline.stderr
        assert "lacks model.safetensors" in " ".join(offline.stderr.split())
        done = run_ambersafe(*given, "--merge", cwd=tmp_path, env=online)
        assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "mine" / "hugging_face" / CONFIG).read_text())
    (snapshot,) = (tmp_path / "home" / "hub" / "models--org--tiny" / "snapshots").iterdir()
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", snapshot.name)
    card = (tmp_path / "mine" / "hugging_face" / "README.md").read_text()
    assert "base_model: org/tiny\nbase_model_relation: adapter" in card
    merged = tmp_path / "mine" / "hugging_face-merged"
    assert "base_model_relation: finetune" in (merged / "README.md").read_text()
    assert difference_without_peft(merged, logits(tuned.base, tuned.checkpoint.parent), tmp_path) < 1e-5


def test_what_is_pushed_has_no_path_of_this_machine(tuned: SimpleNamespace, tmp_path: Path) -> None:
    hub = FakeHub(tokens={"hf_write": True})
    with serve(hub) as fake:
        env = {"HF_ENDPOINT": fake.url, "HF_HUB_OFFLINE": "", "HF_TOKEN": "hf_write"}
        given = ("--out", tmp_path / "out", "--push", "org/mine")
        done = run_ambersafe("export", tuned.run, *given, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    pushed = hub.repositories["models/org/mine"]["main"]
    assert pushed[WEIGHTS] == (tuned.checkpoint.parent / WEIGHTS).read_bytes()
    assert json.loads(pushed[CONFIG])["base_model_name_or_path"] == tuned.base.name
    assert not [name for name, content in pushed.items() if str(tuned.base).encode() in content]


def dora(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved = load_file(folder / WEIGHTS)
    more = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight": next(
            iter(saved.values())
        ).clone()
    }
    save_file({**saved, **more}, folder / WEIGHTS)


def lacking(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved = load_file(folder / WEIGHTS)
    saved.popitem()
    save_file(saved, folder / WEIGHTS)


def other_layers(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "target_modules": ["nowhere"]}))


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("change", [dora, lacking, other_layers])
def test_an_adapter_that_is_not_the_models_is_refused(
    tuned: SimpleNamespace, child: Child, tmp_path: Path, change: Callable[[Path], None], merge: bool
) -> None:
    shutil.copytree(tuned.checkpoint.parent, tmp_path / "x")
    change(tmp_path / "x")
    asked = request(tuned.base, tmp_path / "out", checkpoint=str(save_policy(tmp_path / "x")), merge=merge)
    main, problem = child("export_checkpoint").main, child("answering").Problem
    with pytest.raises(problem, match="holds no adapter of this model") as raised:
        main(asked, silent)
    assert raised.value.kind == "checkpoint"
    assert not list((tmp_path / "out").iterdir())


def test_an_adapter_of_one_side_of_tied_embeddings_cannot_be_merged(
    child: Child,
    model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    make_base(tmp_path / "base", "llama, tied")
    policy = make_adapter(tmp_path / "base", tmp_path / "step-640", ["embed_tokens"])
    given = {"checkpoint": str(policy), "tokenizer": str(model), "merge": True}
    main, problem = child("export_checkpoint").main, child("answering").Problem
    with pytest.raises(problem, match=r"lm_head.weight and model.embed_tokens.weight differ, which the model ties"):
        main(request(tmp_path / "base", tmp_path / "out", **given), silent)


@pytest.mark.parametrize("published", ["float32", "bfloat16"])
def test_merging_takes_a_copy_of_the_weights_in_float32_beside_the_mapped_files(
    tuned: SimpleNamespace, tmp_path: Path, published: str
) -> None:
    """All that is resident at a time, beyond what a model of almost nothing takes; mapped pages of files count too."""
    import torch
    import transformers

    peaks, sizes = [], []
    for name, layers in (("nothing", 0), ("large", 12)):
        base = tmp_path / name
        make_llama(base, tuned.base, layers)
        state = torch.load(base / "policy.pt", weights_only=True)["state"]
        loaded = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(base))
        loaded.load_state_dict(state)
        loaded.to(getattr(torch, published)).save_pretrained(base)
        sizes.append(sum(tensor.nbytes for tensor in state.values()))
        adapter = make_adapter(base, base / "step-1", "all-linear" if layers else ["embed_tokens"])
        peaks.append(peak(base, None, checkpoint=str(adapter), merge=True))
    assert peaks[1] - peaks[0] > 0.5 * sizes[1], "or this shows nothing"
    assert peaks[1] - peaks[0] < 2.3 * sizes[1]


def test_sums_that_a_dtype_does_not_have_are_an_error(tuned: SimpleNamespace, child: Child, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tuned.checkpoint.parent, tmp_path / "x")
    saved = {name: tensor * 1e4 for name, tensor in load_file(tmp_path / "x" / WEIGHTS).items()}
    save_file(saved, tmp_path / "x" / WEIGHTS, metadata={"format": "pt"})
    given = {"checkpoint": str(save_policy(tmp_path / "x")), "merge": True, "dtype": "float16"}
    main, problem = child("export_checkpoint").main, child("answering").Problem
    with pytest.raises(problem, match="too large for float16") as raised:
        main(request(tuned.base, tmp_path / "out", **given), silent)
    assert raised.value.kind == "usage"


def test_a_policy_without_its_adapter_is_one_error(
    tuned: SimpleNamespace, ambersafe: Ambersafe, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    shutil.copyfile(tuned.checkpoint, work / "policy.pt")
    for merge in ((), ("--merge",)):
        done = ambersafe("export", "policy.pt", "--model", tuned.base, *merge)
        assert done.returncode == 66
        assert f"its adapter's {WEIGHTS} is not beside it" in " ".join(done.stderr.split())
        assert done.stderr.count("error:") == 1
        assert "Traceback" not in done.stderr
    assert [path.name for path in work.iterdir()] == ["policy.pt"]


def test_a_card_of_qlora_tells_what_the_weights_below_were(tuned: SimpleNamespace) -> None:
    adapter = replace(checkpoints.adapter_of(tuned.checkpoint), quantize="4bit")  # type: ignore[type-var]
    values: dict[str, Any] = {
        "weights": models.find(str(tuned.run)), "name": "org/x", "step": 1, "metrics": {}, "fingerprint": "f" * 64,
        "dtype": "float32", "parameters": 10, "base_commit": None, "adapter": adapter,
    }  # fmt: skip
    for is_merged, said in ((False, "on the base model as it was published they are not"), (True, "here they are not")):
        card = model_card.render(model_card.Subject(**values, is_merged=is_merged))
        assert f"quantized to 4 bits (NF4 with double quantization) in training; {said}" in card or said in card
        assert ("PeftModel" in card) == (not is_merged)
        assert "  - lora" in card or "- lora" in card


# --- with real runs ---

LORA = ("lora=true", "lora_rank=4", "lora_alpha=8", "lr=1e-2", "trainer=BasicTrainer")
"""A rate at which an adapter moves in a few steps, so that policy and reference differ in every digit."""


@pytest.fixture(scope="module")
def real(patched: Path, model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A working folder with an SFT and a DPO run with LoRA in it, computed in bfloat16."""
    work = tmp_path_factory.mktemp("real")
    train(work, patched, model, rows, "sft", *LORA, "mixed_precision=bfloat16", "model.policy_dtype=bfloat16")
    train(work, patched, model, rows, "dpo", *LORA, "mixed_precision=bfloat16", "model.policy_dtype=bfloat16")
    return work


def train(
    work: Path, clone: Path, base: Path, data: Path, stage: str, *overrides: str, archive: Path | None = None
) -> None:
    given = ("--dir", clone, "--model", base, "--data", data, "--exp-name", stage)
    where = ("--archive", archive) if archive else ()
    done = run_ambersafe(stage, *given, *where, *TINY, *overrides, cwd=work)
    assert done.returncode == 0, done.stderr


def evaluate_in_bfloat16(run: Path, work: Path) -> Any:
    """What `ambersafe evaluate` finds of a run, with log-probabilities of the training to five digits.

    Rewards are differences of such, of which the padding of a batch rounds the last digits.
    """
    done = run_ambersafe("evaluate", run, "--json", cwd=work)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    compared = found["upstream"]["metrics"]
    assert "logps_eval/chosen" in compared
    for name, each in compared.items():
        least = 1e-3 if name.startswith("rewards") else 0.0
        if "accuracies" not in name:
            assert each["here"] == pytest.approx(each["upstream"], rel=1e-5, abs=least), name
    return found


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_evaluate_of_lora_in_bfloat16_has_the_log_probabilities_of_training(
    real: Path, tmp_path: Path, stage: str
) -> None:
    found = evaluate_in_bfloat16(only_run(real, stage), tmp_path)
    assert found["settings"]["policy_dtype"] == "bfloat16"
    assert found["reference"]["label"] == {"sft": "base", "dpo": "sft"}[stage]
    policy = checkpoints.adapter_of(only_run(real, stage) / "LATEST" / "policy.pt")
    assert policy
    ranks = {shape[0] for name, shape in checkpoints.adapter_shapes(policy).items() if "lora_A" in name}
    assert ranks == {{"sft": 4, "dpo": 8}[stage]}, "in DPO it is the sum of both"


def test_sample_answers_with_each_stages_adapter(real: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("How do I use a ladder?\n")
    given = ("--prompts", tmp_path / "prompts.txt", "--max-new-tokens", "4", "--json")
    done = run_ambersafe("sample", only_run(real, "dpo"), *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (sample,) = json.loads(done.stdout)
    assert [each["label"] for each in sample["answers"]] == ["base", "sft", "dpo"]
    assert len({each["text"] for each in sample["answers"]}) > 1


def test_a_real_run_is_exported_both_ways_with_the_same_logits(real: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    run = only_run(real, "dpo")
    for flags in ((), ("--merge",)):
        done = run_ambersafe("export", run, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    wanted = logits(model, run / "LATEST")
    assert difference_without_peft(run / "hugging_face-merged", wanted, tmp_path) < 1e-5
    assert bool((logits(model, run / "hugging_face") == wanted).all())
    assert "trained with SFT and then DPO (beta 0.1)" in (run / "hugging_face" / "README.md").read_text()


@pytest.mark.parametrize("policy", ["plain", "full on an adapter", "an adapter on full", "quantized"])
def test_evaluate_equals_the_trainings_last_evaluation(
    real: Path,
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
    policy: str,
) -> None:
    if policy == "plain":
        for stage in ("sft", "dpo"):
            train(tmp_path, patched, model, rows, stage, *LORA)
    elif policy == "full on an adapter":
        archive = only_run(real, "sft") / "LATEST" / "policy.pt"
        train(tmp_path, patched, model, rows, "dpo", "trainer=BasicTrainer", archive=archive)
    elif policy == "an adapter on full":
        train(tmp_path, patched, model, rows, "sft", "trainer=BasicTrainer")
        train(tmp_path, patched, model, rows, "dpo", *LORA)
    else:
        train(tmp_path, patched, model, rows, "sft", *LORA, "quantize=4bit", "model.policy_dtype=bfloat16")
        train(tmp_path, patched, model, rows, "dpo", *LORA, "quantize=4bit", "model.policy_dtype=bfloat16")
    compare = evaluate_in_bfloat16 if policy == "quantized" else evaluate
    found = compare(only_run(tmp_path, "dpo"), tmp_path)
    assert found["settings"]["quantize"] == ("4bit" if policy == "quantized" else None)

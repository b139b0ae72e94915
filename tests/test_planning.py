"""The arithmetic of memory and time, against autograd, bitsandbytes, real runs and by hand; and `ambersafe plan`."""

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bench_data
import bench_memory
import pytest
from conftest import ROOT, Ambersafe
from hypothesis import given, settings
from hypothesis import strategies as st
from terminal import Terminal

from ambersafe_cli import cards, checkpoints, environment, launch, memory, planning, recipe
from ambersafe_cli.errors import UsageError
from ambersafe_cli.overrides import Value

GIB = 2**30
LENGTHS = memory.Lengths(longest=512, response=512)
BASE: Mapping[str, Value] = {
    "model.policy_dtype": "float32",
    "model.reference_dtype": "float32",
    "optimizer": "AdamW",
    "trainer": "BasicTrainer",
    "batch_size": 8,
    "gradient_accumulation_steps": 2,
    "activation_checkpointing": False,
    "response_logits_only": True,
}
LORA: Mapping[str, Value] = {**BASE, "lora": True, "model.policy_dtype": "bfloat16", "mixed_precision": "bfloat16"}


def llama(shape: bench_data.Shape) -> checkpoints.Shapes:
    """The tensors of a LLaMA by name, as transformers calls them."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.hidden),
        "lm_head.weight": (shape.vocabulary, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    for number in range(shape.layers):
        layer = f"model.layers.{number}"
        found |= {f"{layer}.self_attn.{each}_proj.weight": (shape.hidden, shape.hidden) for each in "qkvo"}
        found |= {f"{layer}.mlp.{each}_proj.weight": (shape.ffn, shape.hidden) for each in ("gate", "up")}
        found[f"{layer}.mlp.down_proj.weight"] = (shape.hidden, shape.ffn)
        found |= {f"{layer}.{each}_layernorm.weight": (shape.hidden,) for each in ("input", "post_attention")}
    return found


AMBERCHAT = llama(bench_data.SHAPES["6.7B"])
SMALL = llama(bench_data.SHAPES["60M"])


def at(name: str, stage: str, config: Mapping[str, Any], shapes: checkpoints.Shapes = SMALL) -> dict[str, int]:
    """The parts of the moment that has `name` in its own."""
    (found,) = (
        each for each in memory.moments(stage, config, memory.shape_of(shapes), LENGTHS, 1) if name in each.name
    )
    return {part.name: part.bytes for part in found.parts}


def stage_of(name: recipe.StageName, recipe_name: str = "ambersafe", *overrides: str, **flags: Value) -> recipe.Stage:
    return recipe.resolve(name, recipe.load(recipe_name), recipe.Flags(flags), overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "mixed", "lora"),
    [
        ("float32", None, None),
        ("bfloat16", None, None),
        ("float32", "bfloat16", None),
        ("float32", None, "all-linear"),
        ("bfloat16", "bfloat16", "all-linear"),
        ("float32", "bfloat16", "all-linear"),
        ("bfloat16", None, "all-linear"),
        ("bfloat16", "bfloat16", ["q_proj", "v_proj"]),
        ("bfloat16", "bfloat16", ["q_proj", "down_proj"]),
    ],
)
def test_activations_are_reckoned_as_autograd_keeps_them(
    dtype: str, mixed: str | None, lora: str | list[str] | None
) -> None:
    """Against the tensors that autograd saves in a forward pass without weights and copies of them."""
    import peft
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=344, num_hidden_layers=6, num_attention_heads=4
    )
    policy = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    if lora:
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=4, target_modules=lora, task_type="CAUSAL_LM"), policy, "default"
        )
        for name, weights in policy.named_parameters():
            weights.requires_grad_("lora_" in name)
            weights.data = weights.data.float() if "lora_" in name else weights.data
        for module in policy.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = mixed is None
    shapes = {tuple(each.shape) for each in policy.parameters()}
    shapes |= {tuple(reversed(shape)) for shape in shapes}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, 1000, (4, 100))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed is not None),
    ):
        policy.model(tokens, attention_mask=torch.ones_like(tokens))
    measured = sum(t.untyped_storage().nbytes() for t in saved.values() if tuple(t.shape) not in shapes)

    settings: Mapping[str, Any] = {
        **BASE,
        "model.policy_dtype": dtype,
        "mixed_precision": mixed,
        "lora": lora is not None,
        "lora_rank": 4,
        "lora_targets": lora,
    }
    model = llama(bench_data.Shape(hidden=128, layers=6, heads=4, ffn=344, vocabulary=1024))
    lengths = memory.Lengths(100, 100)
    (moment,) = (
        each
        for each in memory.moments("sft", settings, memory.shape_of(model), lengths, 1)
        if "forward pass ends" in each.name
    )
    (activations,) = (part.bytes for part in moment.parts if part.name == "activations")
    assert activations == pytest.approx(measured, rel=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantized_weights_take_what_bitsandbytes_holds(bits: str) -> None:
    import torch
    from bitsandbytes import nn

    shape = (688, 256)
    if bits == "4bit":
        four: Any = nn.modules.Params4bit(
            torch.randn(shape), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        weights = four.to("cpu")
        state = weights.quant_state
        held = weights.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    else:
        layer: Any = nn.modules.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
        layer = layer.to("cpu")
        held = layer.weight.CB.nbytes + layer.weight.SCB.nbytes
    assert memory.quantized(shape, bits) == held


def test_states_of_8_bits_leave_small_tensors_in_32() -> None:
    assert memory.state_bytes("AdamW8bit", [2**20]) == 2 * (2**20 + 4 * 2**12)
    assert memory.state_bytes("AdamW8bit", [1000]) == memory.state_bytes("AdamW", [1000]) == 8000
    assert memory.state_bytes("RMSprop", [1000]) == 4000
    assert memory.state_bytes("SGD", [1000]) == 0


def test_an_adapter_has_two_matrices_for_each_target() -> None:
    shape = memory.shape_of(SMALL)
    hidden, inner, layers = 512, 1376, 8
    whole = memory.trained(shape, {"lora": True, "lora_rank": 4})
    assert sum(whole) == layers * 4 * (4 * 2 * hidden + 3 * (hidden + inner))
    part = memory.trained(shape, {"lora": True, "lora_rank": 4, "lora_targets": ["q_proj", "v_proj"]})
    assert sum(part) == layers * 4 * 2 * 2 * hidden
    assert sum(memory.trained(shape, {})) == checkpoints.parameters(SMALL)


def test_what_does_not_live_at_the_same_time_is_not_added() -> None:
    config = {**BASE, "cache_reference": True}
    begins, ends = at("backward pass begins", "dpo", config), at("backward pass ends", "dpo", config)
    steps, takes = at("optimizer steps", "dpo", config), at("log-probabilities", "dpo", config)
    assert ends["activations"] < begins["activations"] / 4
    assert "activations" not in steps
    assert "reference model" in takes
    assert not {"AdamW", "gradients", "activations"} & takes.keys()
    assert "reference model" not in begins
    uncut = at("backward pass begins", "dpo", {**config, "gradient_accumulation_steps": 1})
    assert "gradients" in begins
    assert "gradients" not in uncut


def test_a_step_at_once_takes_a_number_for_each_parameter_of_a_rank() -> None:
    """FSDPTrainer on GPUs; one tensor after the other, which BasicTrainer takes, only that of the largest."""
    parameters, largest = checkpoints.parameters(SMALL), max(map(math.prod, SMALL.values()))
    shape, config = memory.shape_of(SMALL), {**BASE, "optimizer": "RMSprop"}

    def working(trainer: str, shards: int, on_gpu: bool) -> int:
        found = memory.moments("sft", {**config, "trainer": trainer}, shape, LENGTHS, shards, on_gpu)
        return next(part.bytes for part in found[-1].parts if part.name == "working memory")

    assert working("FSDPTrainer", 4, True) == parameters * 4 // 4
    assert working("FSDPTrainer", 4, False) == largest * 4 // 4
    assert working("BasicTrainer", 1, True) == largest * 4


def test_the_reference_model_is_there_as_the_settings_say() -> None:
    own = {**BASE, "cache_reference": False}
    whole = at("backward pass ends", "dpo", own)["reference model"]
    assert whole == 4 * checkpoints.parameters(SMALL)
    offloaded = at("backward pass ends", "dpo", {**own, "offload_reference": True})["reference model"]
    assert offloaded == 4 * math.prod(SMALL["lm_head.weight"])
    assert not any("reference model" in at(when, "dpo", LORA) for when in ("evaluates", "backward pass ends"))
    assert "reference model" not in at("backward pass ends", "sft", own)


def test_checkpointing_keeps_the_input_of_each_layer_and_one_whole_layer() -> None:
    again = {**LORA, "activation_checkpointing": True}
    tokens = 4 * 512
    begins = at("backward pass begins", "sft", again)["activations"]
    assert begins == tokens * 8 * 512 * 2
    in_layer = at("last layer", "sft", again)["activations"]
    assert in_layer - begins == at("last layer", "sft", LORA)["activations"] // 8


def test_an_older_clone_without_the_keys_of_lora_is_full_fine_tuning() -> None:
    assert at("backward pass ends", "sft", BASE)["weights"] == 4 * checkpoints.parameters(SMALL)


@pytest.mark.parametrize("way", ["full", "LoRA", "QLoRA"])
def test_the_microbatch_is_the_largest_that_fits(way: str) -> None:
    stage = stage_of("dpo")
    (chosen,) = (each for each in planning.ways(stage, 1) if each.name == way)
    shape = memory.shape_of(SMALL)
    room = 3 * GIB if way == "full" else 2 * GIB
    found = planning.fit(stage, chosen, shape, LENGTHS, 1, room)
    assert found.spare >= 0
    assert 1 <= found.microbatch < 32
    accumulated = found.values["gradient_accumulation_steps"]
    assert isinstance(accumulated, int)
    assert found.microbatch * accumulated == 32
    larger = {**found.values, "gradient_accumulation_steps": accumulated // 2}
    moments = memory.moments("dpo", planning.config_of(stage, larger), shape, LENGTHS, 1)
    assert memory.peak(moments).bytes > planning.usable(room)


def test_an_evaluation_that_would_not_fit_takes_fewer_at_a_time() -> None:
    stage, shape = stage_of("dpo"), memory.shape_of(AMBERCHAT)
    (qlora,) = (way for way in planning.ways(stage, 1) if way.name == "QLoRA")
    assert "eval_batch_size" not in planning.fit(stage, qlora, shape, LENGTHS, 1, 24 * GIB).values
    tight = planning.fit(stage, qlora, shape, LENGTHS, 1, 9 * GIB)
    assert tight.spare >= 0
    assert tight.values["eval_batch_size"] in (1, 2, 4, 8, 16)
    mine = stage_of("dpo", "ambersafe", "eval_batch_size=32")
    assert planning.fit(mine, qlora, shape, LENGTHS, 1, 9 * GIB).spare < 0


def test_auto_takes_less_and_less_as_cards_get_smaller() -> None:
    stage = stage_of("sft")
    taken: list[tuple[Value, Value, Value]] = []
    for size in (200, 140, 116, 80, 24, 20, 17, 10, 7):
        choice = planning.choose(stage, AMBERCHAT, LENGTHS, 1, size * GIB)
        assert choice
        values = choice.values
        kind = (values.get("lora", False), values.get("quantize"), values.get("activation_checkpointing", False))
        assert str(values.get("gradient_accumulation_steps", "")) != "0"
        taken += [kind] if not taken or kind != taken[-1] else []
    full, adapter, four = (False, None), (True, None), (True, "4bit")
    order = [(*way, again) for way in (full, adapter, four) for again in (False, True)]
    assert taken == [each for each in order if each in taken], "in the order that --auto promises"
    assert {each[:2] for each in taken} == {full, adapter, four}
    assert planning.choose(stage, AMBERCHAT, LENGTHS, 1, 4 * GIB) is None


def test_auto_never_trains_weights_in_bfloat16() -> None:
    for size in (200, 116):
        choice = planning.choose(stage_of("sft"), AMBERCHAT, LENGTHS, 1, size * GIB)
        assert choice
        config = planning.config_of(stage_of("sft"), choice.values)
        assert (config["lora"], config["model.policy_dtype"], config["mixed_precision"]) == (
            False,
            "float32",
            "bfloat16",
        )


@pytest.mark.parametrize(
    ("flags", "overrides", "size"),
    [
        ({"lora": True}, (), 200),
        ({"quantize": "4bit", "lora": True}, (), 80),
        ({"gradient_accumulation_steps": 16}, (), 24),
        ({"activation_checkpointing": True}, (), 24),
        ({"lr": 3e-5, "optimizer": "SGD"}, (), 24),
        ({}, ("lora=true", "model.policy_dtype=float32", "eval_batch_size=4"), 80),
    ],
)
def test_what_the_user_gave_wins_over_auto(flags: dict[str, Value], overrides: tuple[str, ...], size: int) -> None:
    stage = stage_of("dpo", "ambersafe", *overrides, **flags)
    choice = planning.choose(stage, AMBERCHAT, LENGTHS, 1, size * GIB)
    assert choice
    given = {**flags, **{override.key: override.value for override in stage.overrides}}
    assert not given.keys() & choice.values.keys()
    config = planning.config_of(stage, choice.values)
    assert {key: config[key] for key in given} == given
    moments = memory.moments("dpo", config, memory.shape_of(AMBERCHAT), LENGTHS, 1)
    assert memory.peak(moments).bytes <= planning.usable(size * GIB)


def test_auto_says_what_it_took_and_what_did_not_fit() -> None:
    choice = planning.choose(stage_of("dpo"), AMBERCHAT, LENGTHS, 1, 24 * GIB)
    assert choice
    assert re.match(r"LoRA, microbatches of 1, without checkpointing, lr 5e-06: [\d.]+ GB of", choice.reason)
    assert "full lacks" in choice.reason


def test_several_gpus_share_full_weights_and_no_quantized_ones() -> None:
    stage = stage_of("dpo")
    assert [way.name for way in planning.ways(stage, 8)] == ["full", "LoRA"]
    choice = planning.choose(stage, AMBERCHAT, LENGTHS, 8, 80 * GIB)
    assert choice
    assert not choice.values.get("lora")
    assert planning.config_of(stage, choice.values)["trainer"] == "FSDPTrainer"
    with pytest.raises(UsageError, match="cannot be divided over 3 GPUs"):
        planning.choose(stage, AMBERCHAT, LENGTHS, 3, 80 * GIB)


def test_a_recipe_of_adapters_is_not_trained_in_full_at_its_learning_rate() -> None:
    stage = stage_of("sft", "ambersafe-lora")
    assert [way.name for way in planning.ways(stage, 1)] == ["LoRA", "QLoRA"]
    assert all("lr" not in way.values for way in planning.ways(stage, 1))


def test_an_adapter_gets_a_rate_and_an_optimizer_of_its_own_unless_there_are_some() -> None:
    def values(stage: recipe.Stage) -> Mapping[str, Value]:
        (found,) = (way.values for way in planning.ways(stage, 1) if way.name == "QLoRA")
        return {key: found.get(key) for key in ("lr", "optimizer")}

    own: Mapping[str, Value] = {"lr": planning.RATES["sft"], "optimizer": "PagedAdamW8bit"}
    assert values(stage_of("sft")) == values(stage_of("sft", lora=True)) == own
    assert values(stage_of("sft", optimizer="SGD")) == {"lr": own["lr"], "optimizer": None}
    assert values(stage_of("sft", lr=1e-6)) == {**own, "lr": 1e-6}
    assert values(stage_of("sft", "ambersafe-lora")) == {"lr": None, "optimizer": None}


def test_time_is_operations_by_rate() -> None:
    shape = memory.shape_of(llama(bench_data.Shape(hidden=8, layers=2, heads=2, ffn=16, vocabulary=100)))
    matrices = 2 * (4 * 64 + 3 * 128) + 800
    data = planning.Data(10, 5.0, memory.Lengths(5, 5), "")
    config = {"n_epochs": 3, "batch_size": 1, "activation_checkpointing": False, "cache_reference": True}

    def operations(stage: str, **settings: Value) -> float:
        return planning.seconds(stage, {**config, **settings}, shape, data, 2, 1.0) * 2

    forward = 2 * matrices + 2 * 2 * 8 * 5
    assert operations("sft") == 10 * 5 * 3 * 3 * forward, "6 N, and the attention"
    assert operations("sft", lora=True) == 10 * 5 * 3 * (3 * forward - 2 * matrices), "4 N"
    assert operations("sft", activation_checkpointing=True) == 10 * 5 * 3 * 4 * forward
    assert operations("dpo") == 2 * 10 * 5 * (3 * 3 + 1) * forward
    assert operations("dpo", cache_reference=False) == 2 * 10 * 5 * (3 * 3 + 3) * forward
    assert operations("sft", n_examples=5) == 5 * 5 * 3 * forward, "whichever limit comes first"
    assert operations("sft", batch_size=4) == 8 * 5 * 3 * 3 * forward, "the end of an epoch is dropped"


@pytest.mark.parametrize(
    ("gpus", "is_sharded", "recipe_name", "flags", "found"),
    [
        (8, None, "ambersafe-qlora", {}, {"LoRA": ("FSDPTrainer", "AdamW")}),
        (1, True, "ambersafe-lora", {}, {"LoRA": ("FSDPTrainer", "AdamW")}),
        (8, None, "ambersafe", {"optimizer": "AdamW8bit"}, {}),
        (8, None, "ambersafe", {"offload_reference": True}, {}),
        (1, None, "ambersafe", {"lora": True, "quantize": "8bit"}, {"LoRA, 8bit": ("BasicTrainer", "PagedAdamW8bit")}),
    ],
)
def test_every_way_goes_with_its_trainer(
    gpus: int, is_sharded: bool | None, recipe_name: str, flags: dict[str, Value], found: dict[str, tuple[str, str]]
) -> None:
    stage = stage_of("sft", recipe_name, **flags)
    ways = planning.ways(stage, gpus, is_sharded=is_sharded)
    made = {way.name: stage.with_values(way.values) for way in ways}
    assert {name: (way.trainer, way.get("optimizer")) for name, way in made.items()} == found
    for way in ways:
        assert bool(launch.needs_basic_trainer(stage.with_values(way.values))) <= (
            way.values["trainer"] == "BasicTrainer"
        )


def test_layers_outside_of_blocks_can_be_targets() -> None:
    shape = memory.shape_of(SMALL)
    assert set(memory.targets(shape, {"lora_targets": ["lm_head"]})) == {"lm_head.weight"}
    assert len(memory.targets(shape, {"lora_targets": ["self_attn.q_proj"]})) == shape.layers
    assert memory.targets(shape, {"lora_targets": ["mlp", "proj"]}) == {}, "peft takes no part of a name"


def test_operations_are_those_of_the_benchmark() -> None:
    shape = bench_data.SHAPES["6.7B"]
    data = planning.Data(7, 100.0, memory.Lengths(100, 100), "")
    config = {"n_epochs": 1, "batch_size": 1, "activation_checkpointing": False}
    found = planning.seconds("sft", config, memory.shape_of(llama(shape)), data, 1, 1.0)
    assert found == pytest.approx(shape.operations(700, 100), rel=1e-3)


def test_a_card_is_named_or_has_a_size() -> None:
    assert cards.find("rtx 4090")[0] == cards.find("RTX-4090")[0]
    assert cards.find("a100-80")[0].name == "A100-80GB"
    assert "there is A100-80GB, too" in str(cards.find("A100")[1])
    assert cards.find("24") == cards.find("24GB")
    for nonsense in ("", "0", "0GB", "9000GB", "GB", "A1", "card"):
        with pytest.raises(UsageError):
            cards.find(nonsense)
    card, said = cards.find("24GB")
    alike = [each for each in cards.CARDS if cards.nominal(each) == 24]
    assert card.rate == min(each.rate for each in alike)
    assert card.memory == min(each.memory for each in alike)
    assert said
    assert "slowest card of 24 GB" in said
    larger, said = cards.find("32GB")
    assert (larger.memory, larger.rate) == (32 * GIB, card.rate)
    assert said
    assert "24 GB" in said
    assert cards.find("10 GB")[0].bfloat16 == min(each.bfloat16 for each in cards.CARDS if each.bfloat16)
    for wrong in ("Voodoo2", "", "GB"):
        with pytest.raises(UsageError, match="no card"):
            cards.find(wrong)


@pytest.fixture
def amberchat(tmp_path: Path) -> Path:
    """AmberChat's config, without weights."""
    shape = bench_data.SHAPES["6.7B"]
    folder = tmp_path / "AmberChat"
    folder.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "vocab_size": shape.vocabulary, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """Files of a LLaMA of a million parameters, of which only headers are looked at."""
    folder = tmp_path / "small_model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    header: dict[str, Any] = {}
    end = 0
    for name, sizes in llama(bench_data.Shape(128, 4, 4, 344, 1024)).items():
        begin, end = end, end + 4 * math.prod(sizes)
        header[name] = {"dtype": "F32", "shape": list(sizes), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return folder


@pytest.mark.slow
def test_the_plan_needs_a_config_alone_and_its_commands_can_be_pasted(
    ambersafe: Ambersafe, amberchat: Path, fake_clone: Path
) -> None:
    planned = ambersafe("plan", "--model", amberchat, "--gpu", "24GB", env={"COLUMNS": "80"})
    assert planned.returncode == 0, planned.stderr
    assert "6.74 billion parameters" in planned.stdout
    lines = planned.stdout.splitlines()
    shown = (ROOT / "README.md").read_text().partition("$ ambersafe plan --gpu 24GB --stage dpo")[2].partition("```")[0]
    rows = [line for line in shown.splitlines() if line.startswith((" way", " full", " LoRA", " QLoRA"))]
    assert len(rows) == 5
    assert {line.rstrip() for line in lines} >= set(rows), "the README shows what the command prints"
    joined = planned.stdout.replace(" \\\n   ", "").splitlines()
    commands = [line.strip() for line in joined if line.startswith("  ambersafe ")]
    assert max(len(line.rstrip()) for line in lines if str(amberchat) not in line) <= 80
    assert [shlex.split(each)[1] for each in commands] == ["sft", "sft", "dpo", "dpo"], "LoRA and QLoRA fit, full not"
    known = {each["way"]: each for each in planned_as_json(ambersafe, amberchat)["stages"]["sft"]["ways"]}
    assert [name for name, each in known.items() if each["fits"]] == ["LoRA", "QLoRA"]
    for line, way in zip(commands[:2], ("LoRA", "QLoRA"), strict=True):
        assert line == known[way]["command"]
        dry = ambersafe(*shlex.split(line)[1:], "--dir", fake_clone, "--dry-run")
        assert dry.returncode == 0, dry.stderr
        told = dict(word.split("=", 1) for word in shlex.split(dry.stdout) if "=" in word)
        assert told["lora"] == "true"
        assert told["trainer"] == "BasicTrainer"
        assert told["model.policy_dtype"] == told["mixed_precision"] == "bfloat16"
        assert int(told["gradient_accumulation_steps"]) == known[way]["values"]["gradient_accumulation_steps"]
        assert told.get("quantize") == ("'4bit'" if way == "QLoRA" else None), "quoted, as Hydra wants it"
        assert float(told["lr"]) == known[way]["values"]["lr"]
        assert told["optimizer"] == known[way]["values"]["optimizer"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=30), min_size=1, max_size=12))
def test_a_command_in_lines_is_the_same_for_a_shell(words: list[str]) -> None:
    told = planning.in_lines(shlex.join(["printf", "%s\\0", *words]))
    printed = subprocess.run(["bash", "-c", told], capture_output=True, check=True).stdout.decode()
    assert printed.split("\0")[:-1] == words


def planned_as_json(ambersafe: Ambersafe, model: Path, *given: object) -> dict[str, Any]:
    done = ambersafe("plan", "--model", model, "--gpu", "24GB", "--json", *given)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.slow
def test_what_does_not_fit_says_how_much_it_lacks(ambersafe: Ambersafe, amberchat: Path) -> None:
    done = ambersafe("plan", "--model", amberchat, "--gpu", "T4", "--stage", "sft")
    assert done.returncode == UsageError.exit_status
    assert re.search(r"Nothing fits for SFT: LoRA lacks [\d.]+ GB, when", done.stderr)
    assert "no bfloat16" in done.stdout
    assert "--gpus" in done.stderr
    unknown = ambersafe("plan", "--model", "no/such/model", "--gpu", "24GB", env={"HF_HUB_OFFLINE": "1"})
    assert unknown.returncode != 0
    assert "Traceback" not in unknown.stderr


@pytest.mark.slow
def test_a_measured_rate_and_rows_on_this_machine_take_the_place_of_assumptions(
    ambersafe: Ambersafe, tmp_path: Path
) -> None:
    shape = bench_data.SHAPES["7M"]
    bench_data.build_model(tmp_path, shape)
    rows = bench_data.write_data(tmp_path / "data", 50, shape)
    given = ("--data", tmp_path / "data", "--stage", "sft", "--recipe", "tiny", "--rate", "10", "keep_eos=true")
    answer = planned_as_json(ambersafe, tmp_path / "model", *given)
    data = answer["stages"]["sft"]["data"]
    assert answer["rate"] == 10e12
    assert data["examples"] == len(rows)
    lengths = [min(row.sft_tokens, 128) for row in rows]
    assert data["lengths"]["longest"] == max(lengths)
    assert data["mean"] == pytest.approx(sum(lengths) / len(lengths), abs=0.5)
    shown = ambersafe("plan", "--model", tmp_path / "model", "--gpu", "L4", *given).stdout
    assert "assumed" not in shown
    assert "measured" in shown


@pytest.mark.slow
def test_the_plan_is_readable_in_a_small_terminal(amberchat: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ambersafe_cli", "plan", "--model", str(amberchat), "--gpu", "RTX-4090"]
    terminal = Terminal([*command, "--stage", "dpo"], tmp_path)
    assert terminal.wait() == 0
    text = terminal.text()
    assert re.search(r"^ LoRA +1 +no( +-?[\d.]+){6}", text, re.MULTILINE), text
    assert re.search(r"^ QLoRA +\d+ +(no|yes)( +-?[\d.]+){6}", text, re.MULTILINE), text


TORCH = """
from types import SimpleNamespace
_all = [SimpleNamespace(name="NVIDIA A100-SXM4-80GB", total_memory=85_000_000_000, major=8)] * 2
cuda = SimpleNamespace(device_count=lambda: len(_all), get_device_properties=lambda number: _all[number])
"""


def test_torch_is_asked_for_the_memory_of_each_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TORCH)
    (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = '12.8'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = environment.probe(sys.executable, ask_torch=True)
    assert found.gpus == ("NVIDIA A100-SXM4-80GB",) * 2
    assert found.gpu_bytes == (85_000_000_000,) * 2 and found.has_bfloat16
    assert environment.probe(sys.executable).gpu_bytes == ()


def pretend_gpu(folder: Path, size: float, major: int = 9) -> dict[str, str]:
    """The environment variables with which torch has a GPU of so many bytes."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text("cuda: Optional[str] = '12.8'\n")
    (folder / "torch" / "__init__.py").write_text(
        f"""
import types
properties = types.SimpleNamespace(total_memory={int(size)}, major={major}, name="A card")
cuda = types.SimpleNamespace(device_count=lambda: 1, get_device_properties=lambda number: properties)
"""
    )
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    ("size", "flags", "there", "not_there"),
    [
        (80 * GIB, (), ["mixed_precision=bfloat16"], ["lora=true"]),
        (1.06e9, (), ["lora=true", "optimizer=AdamW", "lr=0.0001"], ["quantize"]),
        (80 * GIB, ("--lora",), ["lora=true", "model.policy_dtype=bfloat16"], ["quantize"]),
        (80 * GIB, ("--lora", "--quantize", "4bit"), ["quantize='4bit'", "trainer=BasicTrainer"], []),
        (80 * GIB, ("--grad-accum", "8"), ["gradient_accumulation_steps=8"], []),
    ],
)
def test_auto_takes_what_fits_the_gpu_of_this_machine(
    size: float,
    flags: tuple[str, ...],
    there: list[str],
    not_there: list[str],
    ambersafe: Ambersafe,
    fake_clone: Path,
    small_model: Path,
    tmp_path: Path,
) -> None:
    env = {**pretend_gpu(tmp_path / "site", size), "HF_HUB_OFFLINE": "1"}
    done = ambersafe(
        "sft", "--model", small_model, "--auto", "--dry-run", "max_length=64", "max_prompt_length=32", *flags, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "--auto takes" in done.stderr
    shown = done.stdout.replace("'\"'\"'", "'")
    assert all(each in shown for each in there), shown
    assert not any(each in shown for each in not_there), shown


def test_auto_says_what_it_cannot_know(
    ambersafe: Ambersafe, fake_clone: Path, small_model: Path, tmp_path: Path
) -> None:
    done = ambersafe("sft", "--model", small_model, "--auto", "--dry-run")
    assert done.returncode == 64
    assert "there is none" in done.stderr and "ambersafe plan --gpu" in done.stderr
    env = {**pretend_gpu(tmp_path / "site", 1.05e9), "HF_HUB_OFFLINE": "1"}
    done = ambersafe("sft", "--model", small_model, "--auto", "--dry-run", env=env)
    assert done.returncode == 64 and "Nothing fits" in done.stderr, done.stderr
    slurm = ("--slurm", "--gpus-per-node", "1")
    done = ambersafe("sft", "--model", small_model, "--auto", "--dry-run", *slurm, env=env)
    assert done.returncode == 64 and "not at Slurm's" in done.stderr, done.stderr


@pytest.mark.parametrize(("name", "card"), [("ambersafe-lora", "A100-80GB"), ("ambersafe-qlora", "RTX-4090")])
def test_the_figures_of_the_recipes_are_those_of_the_arithmetic(name: str, card: str) -> None:
    text = recipe.path_of(name).read_text()
    found, _ = cards.find(card)
    assert f"{card} at {planning.UTILISATION * 100:.0f} % of\n# its {found.rate:g} TFLOP/s" in text
    shape = memory.shape_of(AMBERCHAT)
    data = planning.Data(100_000, 512.0, LENGTHS, "")
    for stage_name in ("sft", "dpo"):
        stage = stage_of(stage_name, name)
        config = planning.config_of(stage, {})
        most = memory.peak(memory.moments(stage_name, config, shape, LENGTHS, 1)).bytes
        rate = found.rate * 1e12 * planning.UTILISATION
        hours = planning.seconds(stage_name, config, shape, data, 1, rate) / 3600
        assert f"#   {stage_name.upper()}: {most / 1e9:.1f} GB, {hours:.1f} hours" in text
        assert most <= planning.usable(found.memory)


@pytest.mark.parametrize("name", ["ambersafe-lora", "ambersafe-qlora"])
def test_recipes_of_adapters_differ_from_ambersafe_in_what_adapters_need_alone(name: str) -> None:
    stages: tuple[recipe.StageName, ...] = ("sft", "dpo")
    for stage in stages:
        own, ambersafe = (dict(recipe.load(each).values[stage]) for each in (name, "ambersafe"))
        different = {key for key in own | ambersafe if own.get(key) != ambersafe.get(key)}
        assert different <= {
            "lora", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "quantize", "optimizer", "trainer", "lr",
            "mixed_precision", "model.policy_dtype", "gradient_accumulation_steps", "activation_checkpointing",
            "exp_name",
        }  # fmt: skip
        assert own["batch_size"] == ambersafe["batch_size"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        bench_memory.Case("sft", 256, 16, 2, bench_memory.FULL),
        bench_memory.Case("dpo", 256, 16, 2, {**bench_memory.LORA, "activation_checkpointing": True}),
    ],
    ids=["full", "lora"],
)
def test_a_real_run_takes_the_memory_that_was_planned(case: bench_memory.Case, patched: Path, tmp_path: Path) -> None:
    bench_data.build_model(tmp_path / "model", bench_data.SHAPES["7M"])
    bench_data.build_model(tmp_path / "nothing", bench_memory.NOTHING)
    moments, measured = bench_memory.compare(tmp_path / "model", tmp_path / "nothing", patched, case)
    assert memory.peak(moments).bytes == pytest.approx(measured, rel=0.15)

"""The arithmetic of scripts/scaling: against known sizes, against memory.py, and by hand on tiny numbers."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import bench_data
import pytest
from test_planning import llama

from ambersafe_cli import memory

HERE = Path(__file__).resolve().parent
FOLDER = HERE if (HERE / "scaling.md").exists() else HERE.parent / "scripts"


def load() -> ModuleType:
    path = FOLDER / "scaling" if (FOLDER / "scaling").exists() else FOLDER / "scaling.py"
    spec = importlib.util.spec_from_loader("scaling", importlib.machinery.SourceFileLoader("scaling", str(path)))
    assert spec
    assert spec.loader
    sys.modules["scaling"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scaling = load()
TINY = scaling.Shape(hidden=2, layers=3, inner=2, vocabulary=3, heads=1)  # blocks of 16 + 12 + 4, a root of 14
DEFAULT = scaling.Assumptions()


@pytest.mark.parametrize(("name", "known"), [("7B", 6738415616), ("13B", 13015864320), ("70B", 68976648192)])
def test_parameters_are_those_of_the_published_models(name: str, known: int) -> None:
    assert scaling.MODELS[name].parameters == known


def test_parameters_and_operations_are_those_of_the_benchmark() -> None:
    of_benchmark = bench_data.SHAPES["6.7B"]
    assert scaling.MODELS["7B"].parameters == of_benchmark.parameters
    assert scaling.MODELS["7B"].operations(1000, 183) == of_benchmark.operations(1000, 183)


def test_a_ring_sends_what_it_does_by_hand() -> None:
    assert (TINY.block, TINY.root, TINY.parameters) == (32, 14, 110)
    moved = scaling.traffic(TINY, shards=2, a=DEFAULT, replicas=4)
    assert moved.forward == 110 * 2 / 2
    assert moved.backward == (96 * 2 + 110 * 4) / 2  # the blocks once more, and all gradients
    assert moved.across == 2 * 3 / 4 * 110 * 4
    alone = scaling.traffic(TINY, shards=1, a=DEFAULT)
    assert (alone.forward, alone.backward, alone.across) == (0, 0, 0)


def test_a_ring_takes_what_it_does_by_hand() -> None:
    a = scaling.Assumptions(nvlink=10, network=40, link_efficiency=0.5, hop=2, network_hop=10)
    assert a.ring_seconds(5e9, 100, ranks=8, machines=1) == pytest.approx(1 + 100 * 7 * 2e-6)
    assert a.ring_seconds(5e9, 100, ranks=16, machines=2) == pytest.approx(2 + 100 * (14 * 2e-6 + 10e-6))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 24, 512])
def test_shards_add_up_to_the_whole(ranks: int) -> None:
    for shape in (TINY, *scaling.MODELS.values()):
        assert 0 <= ranks * shape.shard(ranks) - shape.parameters < ranks * (shape.layers + 1)
        if all(unit % ranks == 0 for unit in (shape.root, shape.block)):
            assert ranks * shape.shard(ranks) == shape.parameters


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_that_of_the_plan(checkpointing: bool) -> None:
    config = {
        "model.policy_dtype": "float32",
        "optimizer": "RMSprop",
        "mixed_precision": "bfloat16",
        "trainer": "FSDPTrainer",
        "cache_reference": True,
        "batch_size": 32,
        "gradient_accumulation_steps": 4,
        "activation_checkpointing": checkpointing,
        "response_logits_only": True,
    }
    shape = scaling.MODELS["7B"]
    model = memory.shape_of(llama(bench_data.SHAPES["6.7B"]))
    moments = memory.moments("dpo", config, model, memory.Lengths(512, 512), 8)
    plan = {part.name: part.bytes for moment in moments for part in moment.parts if "evaluates" not in moment.name}
    in_layer = {part.name: part.bytes for each in moments if "last layer" in each.name for part in each.parts}
    found = scaling.memory(shape, 8, 2, DEFAULT)
    assert in_layer["activations"] == (found.checkpointed if checkpointing else found.activations)
    assert (plan["weights"], plan["gradients"], plan["RMSprop"]) == pytest.approx(
        (found.weights, found.gradients, found.optimizer), rel=1e-6
    ), "but for FSDP's padding"
    assert plan["gathered layers"] == pytest.approx(found.unsharded, rel=1e-6), "but for the last norm"
    assert plan["logits"] == found.logits


@pytest.mark.parametrize(("stage", "batch", "microbatches", "tokens"), [("sft", 64, 2, 183), ("dpo", 32, 4, 148)])
def test_the_pace_is_that_of_the_recipe(stage: str, batch: int, microbatches: int, tokens: int) -> None:
    assert round(scaling.pace(scaling.Job(stage, batch, microbatches))) == tokens
    assert scaling.pace(scaling.Job(stage, batch, 1)) > 1.5 * tokens


def test_a_step_takes_the_longer_of_compute_and_links() -> None:
    for links in (1, 1e6):
        a = scaling.Assumptions(nvlink=links, padded=100)
        it = scaling.step(scaling.MODELS["7B"], scaling.Job("sft", 64, 2), 1, False, False, a)
        assert it.seconds == pytest.approx(it.communication if links == 1 else it.compute)
        assert it.sent == pytest.approx(93.4e9, rel=1e-3)  # 2 x 7/8 x (2 bytes x 13.2e9 gathered + 4 x 6.74e9)


@pytest.mark.parametrize(
    ("stage", "batch", "microbatches", "gpus", "share"),
    [("dpo", 32, 4, 8, 1), ("dpo", 32, 4, 16, None), ("dpo", 32, 1, 24, None), ("sft", 64, 2, 32, 1)],
)
def test_a_batch_divides_or_not(stage: str, batch: int, microbatches: int, gpus: int, share: int | None) -> None:
    assert scaling.Job(stage, batch, microbatches).share(gpus) == share


def test_batches_that_do_not_divide_are_reported() -> None:
    text = scaling.report(["--tables", "division", "memory", "steps", "--model", "7B", "--machines", "1", "3", "64"])
    assert text.count("**not divisible: idle**") == 4  # memory and steps, of SFT and of DPO
    assert "| DPO, batch 32 in 4 | 1 | **no** (0.333) | **no** (0.0156) | 1 (8 GPUs) |" in text
    assert "| SFT, batch 64 in 1 | 8 | **no** (2.67) | **no** (0.125) | 8 (64 GPUs) |" in text
    assert "idle" in scaling.report(["--check-shape", "2,3,2,3,1", "--ranks", "64"])
    assert "does not fit" in scaling.report(["--tables", "steps", "--stage", "sft", "--model", "70B"])


def test_scaling_md_has_what_the_script_prints() -> None:
    text = (FOLDER / "scaling.md").read_text(encoding="utf-8")
    assert text.count("\n```\nscripts/scaling ") == text.count("\n<!-- end -->\n") == 10
    assert text.count("Assumed: ") == 10
    assert scaling.fill(text) == text


def test_what_is_compared_with_measurements_is_what_the_script_predicts() -> None:
    text, _, compared = (
        (FOLDER / "scaling.md").read_text(encoding="utf-8").rpartition("| figure | predicted | measured |")
    )
    predicted = [line.split(" | ")[1] for line in compared.splitlines() if " MB | " in line]
    assert len(predicted) == 4
    assert all(f"| {size} |" in text for size in predicted)

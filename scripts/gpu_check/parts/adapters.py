"""LoRA on AmberChat's 32 layers, and QLoRA in the memory of a card of 24 GB: time, and memory beside the plan."""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from bench_data import Shape

from ambersafe_cli import memory
from gpu_check import expected, models
from gpu_check.figures import Report, Setup, fits, free_memory, peak_bytes, reset_peak, seconds

PAIRS, EVALUATED = 8, 64
CAP = 24 * 10**9
RANK = 16
COMMON: Mapping[str, Any] = {
    "trainer": "BasicTrainer", "optimizer": "AdamW", "model.policy_dtype": "bfloat16", "mixed_precision": "bfloat16",
    "response_logits_only": True, "lora": True, "lora_rank": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0,
    "lora_targets": "all-linear", "gradient_accumulation_steps": 1, "cache_reference": True,
}  # fmt: skip


def quantize(model: Any, setup: Setup) -> None:
    """Put NF4 weights in the place of those of all layers, one after the other, as `quantize: 4bit` loads them."""
    nn: Any = importlib.import_module("bitsandbytes.nn")

    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, old in list(parent.named_children()):
                if not isinstance(old, torch.nn.Linear):
                    continue
                new = nn.Linear4bit(
                    old.in_features, old.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
                    compress_statistics=True, device="meta",  # its own random weights would take a minute on the CPU
                )  # fmt: skip
                new.weight = nn.Params4bit(
                    old.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
                )
                new.support_avx512bf16_for_cpu = False
                setattr(parent, name, new.to(setup.device))
    model.is_loaded_in_4bit = True  # what peft looks for


def prepare(setup: Setup, config: Mapping[str, Any]) -> Any:
    """A trainer with an adapter on a frozen model."""
    adapters = models.upstream("adapters")
    shape = models.AMBERCHAT if setup.on_gpu else models.TOY
    policy = models.llama(shape, setup, torch.bfloat16)
    if config.get("quantize"):
        quantize(policy, setup)
    flat = {key: value for key, value in config.items() if "." not in key}
    made = models.trainer(setup, policy, **flat, seed=0, model={"name_or_path": "a LLaMA"})
    adapters.add_adapters(policy, made.config, None, 0)
    if config.get("activation_checkpointing"):
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made.adapters = adapters
    policy.to(setup.device)
    return made


def plan(shape: Shape, config: Mapping[str, Any], length: int) -> tuple[int, int]:
    """Bytes that `ambersafe plan` says of a step of DPO, and of an evaluation."""
    lengths = memory.Lengths(length, length - length // 2)
    # In DPO an evaluation takes both responses of each of its pairs.
    own = {**config, "eval_batch_size": config["eval_batch_size"] // 2}
    moments = memory.moments("dpo", own, models.memory_shape(shape), lengths, 1)
    training = [moment for moment in moments if moment.name not in memory.WITHOUT_GRADIENT]
    (evaluating,) = [moment for moment in moments if moment.name == memory.WITHOUT_GRADIENT[0]]
    return memory.peak(training).bytes, evaluating.bytes


def measure(name: str, setup: Setup, report: Report, config: Mapping[str, Any]) -> None:
    shape, length = models.AMBERCHAT if setup.on_gpu else models.TOY, setup.size(512, 32)
    count, evaluated = config["batch_size"], config["eval_batch_size"]
    planned_step, planned_evaluation = plan(shape, config, length)
    if problem := fits(setup, max(planned_step, planned_evaluation)):
        for each in expected.of("adapters", setup.on_gpu):
            if each.figure.startswith(f"{name},"):
                report.not_run(each.figure, problem)
        return
    made = prepare(setup, config)
    trained = [weight for weight in made.policy.parameters() if weight.requires_grad]
    before = (
        [weight.detach().cpu() for weight in trained]
        if setup.on_gpu
        else [weight.detach().clone() for weight in trained]
    )
    optimizer = models.upstream("utils").make_optimizer(config["optimizer"], trained, 1e-4)
    batch = models.sequences(shape, setup, 2 * count, length)
    reset_peak(setup)

    def step() -> None:
        made.policy.train()
        models.backward(models.forward(made, batch))
        made.clip_gradient()
        optimizer.step()
        optimizer.zero_grad()

    def evaluate() -> None:
        made.policy.eval()
        with torch.no_grad():
            models.forward(made, models.sequences(shape, setup, evaluated, length))

    step()
    report.figure(f"{name}, a step of {count} pairs of {length}, ms", 1000 * seconds(setup, step))
    moved = sum(bool((weight.cpu() != old).any()) for weight, old in zip(trained, before, strict=True))
    report.figure(f"{name}, weights that moved", moved, f"of {len(trained)}")
    compare(f"{name}, peak of a step", setup, report, planned_step)
    reset_peak(setup)
    report.figure(f"{name}, an evaluation of {evaluated}x{length}, ms", 1000 * seconds(setup, evaluate))
    compare(f"{name}, peak of an evaluation", setup, report, planned_evaluation)


def compare(name: str, setup: Setup, report: Report, planned: int) -> None:
    if setup.on_gpu:
        measured = peak_bytes(setup)
        report.figure(
            f"{name}, measured by planned", measured / planned, f"{measured / 1e9:.2f} of {planned / 1e9:.2f} GB"
        )


def run(setup: Setup, report: Report) -> None:
    sizes = {"batch_size": setup.size(PAIRS, 2), "eval_batch_size": setup.size(EVALUATED, 4)}
    measure("LoRA", setup, report, {**COMMON, **sizes})
    if importlib.util.find_spec("bitsandbytes") is None:
        for figure in ("QLoRA, peak of a step, measured by planned", "QLoRA, weights that moved"):
            report.not_run(figure, "bitsandbytes is missing")
        return
    free_memory(setup)
    if setup.on_gpu:
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / torch.cuda.get_device_properties(0).total_memory))
    own = {"quantize": "4bit", "activation_checkpointing": True, "optimizer": "PagedAdamW8bit"}
    measure("QLoRA", setup, report, {**COMMON, **sizes, **own})

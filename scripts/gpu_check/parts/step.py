"""One training step of 8 layers of AmberChat's size with an output layer: where its time and memory go."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from bench_data import Shape
from torch.profiler import ProfilerActivity, profile

from ambersafe_cli import cards, memory
from gpu_check import models
from gpu_check.figures import Report, Setup, fits, peak_bytes, reset_peak, seconds
from gpu_check.parts import ceilings

TURNS = 5
PHASES = ("forward", "backward", "clipping", "step")
# Names of kernels on a card, and of operations on a CPU.
MATRIX = ("gemm", "nvjet", "cutlass", "xmma", "cublas", "aten::mm", "aten::addmm", "aten::bmm", "mkldnn")
ATTENTION = ("flash", "fmha", "attention", "sdpa", "cudnn")


def shape_of(setup: Setup) -> Shape:
    return models.EIGHT_LAYERS if setup.on_gpu else models.TOY


def prepare(setup: Setup, shape: Shape) -> tuple[Any, torch.optim.Optimizer]:
    """A trainer with float32 weights that computes in bfloat16 (--bf16), and the recipe's optimizer."""
    made = models.trainer(setup, models.llama(shape, setup, torch.float32).train())
    return made, models.upstream("utils").make_optimizer(
        "RMSprop", list(made.policy.parameters()), 5e-7, foreach=made.steps_at_once()
    )


def time_phases(
    setup: Setup, made: Any, optimizer: torch.optim.Optimizer, batch: Mapping[str, Any]
) -> dict[str, float]:
    """Seconds of each phase of a step, the medians of TURNS."""
    took: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for turn in range(TURNS + 1):
        losses: list[torch.Tensor] = []

        def forward(kept: list[torch.Tensor] = losses) -> None:
            kept.append(models.forward(made, dict(batch)))

        def backward(kept: list[torch.Tensor] = losses) -> None:
            models.backward(kept[0])

        works: tuple[Callable[[], object], ...] = (forward, backward, made.clip_gradient, optimizer.step)
        for phase, work in zip(PHASES, works, strict=True):
            found = seconds(setup, work)
            took[phase] += [found] if turn else []
        optimizer.zero_grad()
    return {phase: statistics.median(values) for phase, values in took.items()}


def shares(setup: Setup, work: Callable[[], object]) -> dict[str, float]:
    """Of a profiled step: the parts of its time that are matrix products, attention, all else, and nothing."""
    work()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setup.on_gpu else [])]
    with profile(activities=kinds) as found:
        wall = seconds(setup, work) * 1e6
    sums = {"matrix products": 0.0, "attention": 0.0, "elementwise": 0.0}
    for event in found.key_averages():
        is_kernel = str(event.device_type).endswith("CUDA")
        # On a card the optimizer's own label stands beside its kernels, as long as all of them.
        if setup.on_gpu != is_kernel or getattr(event, "is_user_annotation", False):
            continue
        name = event.key.lower()
        took = float(event.self_device_time_total if setup.on_gpu else event.self_cpu_time_total)
        kind = "attention" if any(each in name for each in ATTENTION) else "elementwise"
        sums["matrix products" if any(each in name for each in MATRIX) and kind != "attention" else kind] += took
    return {kind: took / wall for kind, took in sums.items()} | {"idle": max(0.0, 1 - sum(sums.values()) / wall)}


def planned(shape: Shape, sequences: int, length: int) -> int:
    """Bytes that `ambersafe plan` says for it."""
    config = {
        "trainer": "BasicTrainer", "optimizer": "RMSprop", "model.policy_dtype": "float32",
        "mixed_precision": "bfloat16",
        "batch_size": sequences, "gradient_accumulation_steps": 1, "response_logits_only": True, "eval_batch_size": 1,
    }  # fmt: skip
    lengths = memory.Lengths(length, length - length // 2)
    return memory.peak(memory.moments("sft", config, models.memory_shape(shape), lengths, 1)).bytes


def run(setup: Setup, report: Report) -> None:
    shape, length = shape_of(setup), setup.size(512, 64)
    if problem := fits(setup, planned(shape, setup.size(16, 4), length)):
        report.not_run("", problem)
        return
    made, optimizer = prepare(setup, shape)
    ceiling = ceilings.product(setup)
    name = ceilings.card_name(torch.cuda.get_device_name()) if setup.on_gpu else None
    sheet = next((card.bfloat16 for card in cards.CARDS if card.name == name), None)
    most = setup.size(16, 4)
    for sequences in (most // 2, most):
        batch = models.sequences(shape, setup, sequences, length)
        reset_peak(setup)
        took = time_phases(setup, made, optimizer, batch)
        whole = sum(took.values())
        label = f"the {'smaller' if sequences < most else 'larger'} batch"
        for phase, each in took.items():
            report.figure(f"{phase}, {label}, ms", 1000 * each)
        report.text(label, f"{sequences} sequences of {length} tokens")
        rate = models.operations(shape, sequences, length) / whole
        peak = (sheet or 0) * 1e12 or ceiling
        report.figure(
            f"model FLOP utilisation, {label}", rate / peak, "of the data sheet" if sheet else "of the product"
        )
        report.figure(f"rate by that of the product, {label}", rate / ceiling)
        if setup.on_gpu:
            report.figure(
                f"peak memory, {label}, GB",
                peak_bytes(setup) / 1e9,
                f"planned {planned(shape, sequences, length) / 1e9:.1f}",
            )
    if setup.on_gpu:
        report.figure("peak memory, measured by planned", peak_bytes(setup) / planned(shape, sequences, length))

    def step() -> None:
        models.backward(models.forward(made, batch))
        made.clip_gradient()
        optimizer.step()
        optimizer.zero_grad()

    found = shares(setup, step)
    for kind, share in found.items():
        if found["idle"] == 1:
            report.not_run(f"{kind}, share of a step", "the profiler saw no kernel")
        else:
            report.figure(f"{kind}, share of a step", share)

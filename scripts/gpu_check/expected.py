"""What the parts of `scripts/gpu-check` are expected to find, and where that is from: all of it is in this table.

A figure counts on a card, on a CPU (`--cpu`, at toy size), or on both. It is ok if it lies between `least` and `most`.
"""

from dataclasses import dataclass
from typing import Literal

from ambersafe_cli import planning

Where = Literal["gpu", "cpu", "both"]


@dataclass(frozen=True)
class Expected:
    """A figure of a part by its name, its bounds, those included, and the source of them."""

    part: str
    figure: str
    least: float | None
    most: float | None
    source: str
    where: Where = "both"

    @property
    def bounds(self) -> str:
        """The bounds as the table shows them."""
        if self.least is not None and self.least == self.most:
            return f"{self.least:g}"
        if self.least is None:
            return f"<= {self.most:g}"
        return f">= {self.least:g}" if self.most is None else f"{self.least:g} to {self.most:g}"


_BF16 = 2**-8  # half a unit in the last place of 1
_CODE = "by the code"

EXPECTED = (
    Expected("ceilings", "bf16 product, share of the data sheet", 0.6, None, "assumed", "gpu"),
    Expected("ceilings", "copy, share of the data sheet", 0.75, None, "assumed", "gpu"),
    Expected("ceilings", "product, TFLOP/s", 1e-6, None, "any CPU", "cpu"),
    Expected("ceilings", "copy, TB/s", 1e-6, None, "any CPU", "cpu"),
    Expected("commands", "commands that failed", 0, 0, _CODE),
    Expected("commands", "SFT, first 3 losses, TF32 off, by a CPU's, relative", 0, 1e-4, "5 printed digits", "gpu"),
    Expected("commands", "SFT, all losses, TF32 off, by a CPU's, relative", 0, 1e-2, "assumed: steps amplify", "gpu"),
    Expected("commands", "SFT, first 3 losses, TF32 on, by a CPU's, relative", 0, 2e-3, "TF32 has 10 bits", "gpu"),
    Expected("commands", "SFT, all losses, TF32 on, by a CPU's, relative", 0, 3e-2, "assumed: steps amplify", "gpu"),
    Expected("commands", "DPO, first 3 losses, TF32 off, by a CPU's, relative", 0, 1e-3, "sums over a response", "gpu"),
    Expected("commands", "DPO, all losses, TF32 off, by a CPU's, relative", 0, 5e-2, "assumed: steps amplify", "gpu"),
    Expected("commands", "DPO, first 3 losses, TF32 on, by a CPU's, relative", 0, 1e-2, "TF32 has 10 bits", "gpu"),
    Expected("commands", "DPO, all losses, TF32 on, by a CPU's, relative", 0, 0.1, "assumed: steps amplify", "gpu"),
    Expected("commands", "SFT loss, FSDP by BasicTrainer, relative", 0, 1e-2, "TF32, in another order", "gpu"),
    Expected(
        "commands", "SFT loss, FSDP by BasicTrainer, relative", 0, 1e-4, "4 digits, tests/test_machines.py", "cpu"
    ),
    Expected("commands", "DPO loss, FSDP by BasicTrainer, relative", 0, 3e-2, "TF32, in another order", "gpu"),
    Expected(
        "commands", "DPO loss, FSDP by BasicTrainer, relative", 0, 1e-4, "4 digits, tests/test_machines.py", "cpu"
    ),
    Expected("commands", "largest reward at step 0 of DPO", 0, 1e-2, "reference and policy in one dtype", "gpu"),
    Expected("commands", "largest reward at step 0 of DPO", 0, 1e-4, "reference and policy in one dtype", "cpu"),
    Expected("commands", "checkpoints saved at SIGTERM", 2, 2, "one of each trainer"),
    Expected("commands", "loss after resume, by an undisturbed run's, relative", 0, 1e-2, "sums by atomics", "gpu"),
    Expected("commands", "loss after resume, by an undisturbed run's, relative", 0, 0, "tests/test_resume.py", "cpu"),
    Expected("commands", "evaluate by the run's own evaluation, relative", 0, 1e-2, "TF32, other batches", "gpu"),
    Expected(
        "commands", "evaluate by the run's own evaluation, relative", 0, 1e-4, "tests/test_real_upstream.py", "cpu"
    ),
    Expected("attention", "lengths of 20 that cuDNN computes, put last", 0, 0, "PyTorch's order of kernels"),
    Expected("attention", "first call, put last, beyond the second, ms", None, 20, "no plan for each length", "gpu"),
    Expected(
        "attention", "second call, put last by as it is, with padding", None, 1.3, "or cuDNN first is better", "gpu"
    ),
    Expected("attention", "second call, put last by as it is, without", None, 1.3, "or cuDNN first is better", "gpu"),
    Expected("attention", "error against math, relative", None, 4 * _BF16, "rounding of bfloat16"),
    Expected(
        "step",
        "model FLOP utilisation, the larger batch",
        planning.UTILISATION,
        None,
        "`ambersafe plan` assumes",
        "gpu",
    ),
    Expected("step", "model FLOP utilisation, the larger batch", 1e-6, None, "any CPU", "cpu"),
    Expected("step", "idle, share of a step", None, 0.1, "the host is ahead of the GPU", "gpu"),
    Expected("step", "matrix products, share of a step", 0.5, None, "the rest is elementwise", "gpu"),
    Expected("step", "matrix products, share of a step", 0.05, None, "any CPU", "cpu"),
    Expected("step", "peak memory, measured by planned", 0.9, 1.1, "`ambersafe plan`", "gpu"),
    Expected("loop", "host waits in a microbatch of DPO", None, 12, "positions, padding, and each metric", "gpu"),
    Expected("loop", "host waits in a microbatch of DPO", None, 4, "positions and padding", "cpu"),
    Expected("loop", "step of 4 microbatches by that of 1", None, 1.5, "assumed: each casts the weights anew", "gpu"),
    Expected("loop", "step of 4 microbatches by that of 1", None, 4, "the same tokens", "cpu"),
    Expected("loop", "optimizer, one by one by foreach, time", None, 1.5, "a few hundred tensors", "gpu"),
    Expected("loop", "optimizer, one by one by foreach, time", None, 20, "a few hundred tensors", "cpu"),
    Expected("loop", "prefetch on by off, examples/s", 0.95, None, "no waiting for the tokenizer", "gpu"),
    Expected("loop", "prefetch on by off, examples/s", 0.3, None, "cores that are full", "cpu"),
    Expected("adapters", "LoRA, peak of a step, measured by planned", 0.9, 1.1, "`ambersafe plan`", "gpu"),
    Expected("adapters", "LoRA, peak of an evaluation, measured by planned", 0.9, 1.1, "`ambersafe plan`", "gpu"),
    Expected("adapters", "LoRA, weights that moved", 1, None, _CODE),
    Expected("adapters", "QLoRA, peak of a step, measured by planned", 0.9, 1.1, "`ambersafe plan`", "gpu"),
    Expected("adapters", "QLoRA, weights that moved", 1, None, _CODE),
    Expected("sharding", "optimizer, one by one by foreach, the host's time", 1.5, None, "3.8 was seen on a CPU"),
    Expected("sharding", "step of 1 pair x 4 by 4 pairs x 1", None, 2.5, "four times the gathering", "gpu"),
    Expected("sharding", "step of 1 pair x 4 by 4 pairs x 1", None, 10, "four times the gathering", "cpu"),
    Expected("rewards", "same shapes, largest", 0, 0, "the same sums in the same order"),
    Expected("rewards", "other shapes, largest", None, 0.1, "rounding of bfloat16, times beta"),
    Expected("rewards", "other shapes, mean's distance from 0", None, 0.02, "rounding has no direction"),
    Expected("trl", "tokens/s by TRL's", 1.0, None, "3.1 was seen on a CPU in float32"),
)


def of(part: str, on_gpu: bool) -> list[Expected]:
    """What is expected of a part here."""
    here = ("both", "gpu" if on_gpu else "cpu")
    return [each for each in EXPECTED if each.part == part and each.where in here]


BANDWIDTHS = {
    "A100-40GB": 1.555, "A100-80GB": 2.039, "H100": 3.35, "H200": 4.8, "L40S": 0.864, "RTX-4090": 1.008,
    "RTX-3090": 0.936, "A40": 0.696, "RTX-A6000": 0.768, "L4": 0.3, "A10": 0.6, "T4": 0.32,
}  # fmt: skip
"""TB/s of the cards of ambersafe_cli/cards.py, by the same data sheets; of H100 and H200 those of SXM."""

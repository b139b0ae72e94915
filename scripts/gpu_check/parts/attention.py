"""Attention at lengths that come once each, as batches that are trimmed have them: PyTorch's order of kernels, as it is
and with cuDNN's put last. The order is read from the environment once, so that each gets a process of its own."""

import functools
import json
import os
import statistics
import subprocess
import sys
from typing import Any

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_check.figures import Report, Setup, seconds

ORDER = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
LENGTHS = 20
FORMS = ("with padding", "without")


def lengths(setup: Setup) -> list[int]:
    """Odd ones, no two alike."""
    step = setup.size(20, 5)
    return [setup.size(97, 17) + step * number + number % 3 for number in range(LENGTHS)]


def inputs(setup: Setup, length: int, form: str) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Queries, keys and values, and the mask that transformers makes of a batch in which a sequence is padded."""
    sequences, heads, width = setup.size(16, 2), setup.size(32, 4), setup.size(128, 16)
    shape = (sequences, heads, length, width)
    made = [torch.randn(shape, device=setup.device).to(torch.bfloat16).requires_grad_() for _ in range(3)]
    if form == "without":
        return made, None
    mask = torch.ones(length, length, dtype=torch.bool, device=setup.device).tril().repeat(sequences, 1, 1, 1)
    mask[0, :, :, length - length // 4 :] = False
    return made, mask


def attend(made: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
    query, key, value = made
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)


def forward_and_backward(made: list[torch.Tensor], mask: torch.Tensor | None) -> None:
    torch.autograd.backward(attend(made, mask).sum())


def kernel(made: list[torch.Tensor], mask: torch.Tensor | None) -> str:
    """The name of the kernel that PyTorch takes for these."""
    query, key, value = made
    chosen = torch._fused_sdp_choice(query, key, value, attn_mask=mask, is_causal=mask is None)
    return str(SDPBackend(chosen).name) if chosen >= 0 else "none"


def error(made: list[torch.Tensor], mask: torch.Tensor | None) -> float:
    """The largest difference from math in float32, by the largest number of that."""
    with torch.no_grad():
        found = attend(made, mask).float()
        with sdpa_kernel(SDPBackend.MATH):
            exact = attend([each.float() for each in made], mask)
    return float((found - exact).abs().max() / exact.abs().max())


def measure(setup: Setup) -> dict[str, Any]:
    """Of each form: milliseconds of the first and the second call, forward and backward; kernels; the largest error."""
    found: dict[str, Any] = {}
    warm, mask = inputs(setup, 8, "without")
    forward_and_backward(warm, mask)
    for form in FORMS:
        first, second, kernels, errors = [], [], [], []
        for length in lengths(setup):
            made, mask = inputs(setup, length, form)
            kernels.append(kernel(made, mask))
            work = functools.partial(forward_and_backward, made, mask)
            took = [1000 * seconds(setup, work) for _ in range(2)]
            first.append(took[0])
            second.append(took[1])
            errors.append(error(made, mask))
        found[form] = {"first": first, "second": second, "kernels": kernels, "error": max(errors)}
    return found


def in_a_process(setup: Setup, cudnn_last: bool) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != ORDER}
    environment |= {ORDER: "1"} if cudnn_last else {}
    command = [sys.executable, "-m", "gpu_check.parts.attention", *(["--cpu"] if not setup.on_gpu else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"attention ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(setup: Setup, report: Report) -> None:
    as_it_is, last = in_a_process(setup, False), in_a_process(setup, True)
    for name, found in (("as it is", as_it_is), ("put last", last)):
        for form in FORMS:
            own = found[form]
            first, second = statistics.median(own["first"]), statistics.median(own["second"])
            report.text(f"kernels, {name}, {form}", ", ".join(sorted(set(own["kernels"]))))
            report.figure(f"first call, {name}, {form}, ms", first, f"most {max(own['first']):.1f}")
            report.figure(f"second call, {name}, {form}, ms", second)
    beyond = [statistics.median(last[form]["first"]) - statistics.median(last[form]["second"]) for form in FORMS]
    report.figure("first call, put last, beyond the second, ms", max(beyond))
    for form in FORMS:
        ratio = statistics.median(last[form]["second"]) / statistics.median(as_it_is[form]["second"])
        report.figure(f"second call, put last by as it is, {form}", ratio)
    by_cudnn = max(last[form]["kernels"].count("CUDNN_ATTENTION") for form in FORMS)
    report.figure(f"lengths of {LENGTHS} that cuDNN computes, put last", by_cudnn)
    report.figure(
        "error against math, relative", max(found[form]["error"] for found in (as_it_is, last) for form in FORMS)
    )


if __name__ == "__main__":
    from pathlib import Path

    print(json.dumps(measure(Setup("--cpu" not in sys.argv, Path(), Path()))))

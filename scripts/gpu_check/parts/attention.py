"""Attention at lengths that come once each, as batches that are trimmed have them: PyTorch's order of kernels with
cuDNN's put last, and as it is. The order is read from the environment once, so that each gets a process of its own,
and a limit: where each new length is planned for a second, that is a finding, not a failure."""

import functools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_check.figures import Report, Setup, seconds

ORDER = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
LENGTHS = 20
FORMS = ("with padding", "without")
WITH_ERROR = (0, 9, 19)
"""The lengths whose results are held against math."""
LIMIT = 18
"""Seconds of each order on a card, imports included."""


def lengths(setup: Setup) -> list[int]:
    """No two alike."""
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


def forward_and_backward(made: list[torch.Tensor], mask: torch.Tensor | None, kept: list[torch.Tensor]) -> None:
    kept[:] = [attend(made, mask)]
    torch.autograd.backward(kept[0].sum())


def kernel(made: list[torch.Tensor], mask: torch.Tensor | None) -> str:
    """The name of the kernel that PyTorch takes for these."""
    query, key, value = made
    chosen = torch._fused_sdp_choice(query, key, value, attn_mask=mask, is_causal=mask is None)
    return str(SDPBackend(chosen).name) if chosen >= 0 else "none"


def error(found: torch.Tensor, made: list[torch.Tensor], mask: torch.Tensor | None) -> float:
    """The largest difference from math in float32, by the largest number of that."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        exact = attend([each.float() for each in made], mask)
    return float((found.detach().float() - exact).abs().max() / exact.abs().max())


def measure(setup: Setup, path: Path) -> None:
    """Write a line of JSON for each length and form: milliseconds of the first and the second call, forward and
    backward, the kernel, and of WITH_ERROR the error."""
    warm, mask = inputs(setup, 8, "without")
    forward_and_backward(warm, mask, [])
    with path.open("w", encoding="utf-8") as file:
        for number, length in enumerate(lengths(setup)):
            for form in FORMS:
                made, mask = inputs(setup, length, form)
                kept: list[torch.Tensor] = []
                work = functools.partial(forward_and_backward, made, mask, kept)
                first, second = (1000 * seconds(setup, work) for _ in range(2))
                line = {"form": form, "length": length, "first": first, "second": second, "kernel": kernel(made, mask)}
                line |= {"error": error(kept[0], made, mask)} if number in WITH_ERROR else {}
                file.write(json.dumps(line) + "\n")
                file.flush()


def in_a_process(setup: Setup, cudnn_last: bool) -> list[dict[str, Any]]:
    """What measure() writes with one of the two orders, as far as it comes within LIMIT."""
    environment = {key: value for key, value in os.environ.items() if key != ORDER}
    environment |= {ORDER: "1"} if cudnn_last else {}
    path = setup.folder / f"cudnn-{'last' if cudnn_last else 'as-it-is'}.jsonl"
    command = [sys.executable, "-m", "gpu_check.parts.attention", str(path), *([] if setup.on_gpu else ["--cpu"])]
    try:
        subprocess.run(command, env=environment, check=True, timeout=LIMIT * setup.size(1, 4))
    except subprocess.TimeoutExpired:
        print(f"  {path.stem}: its time is up")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def show(name: str, found: list[dict[str, Any]], report: Report) -> None:
    report.figure(f"lengths measured, {name}", len(found) // len(FORMS), f"of {LENGTHS}")
    for form in FORMS:
        own = [line for line in found if line["form"] == form]
        if own:
            report.text(f"kernels, {name}, {form}", ", ".join(sorted({line["kernel"] for line in own})))
            most = max(line["first"] for line in own)
            first = statistics.median(line["first"] for line in own)
            report.figure(f"first call, {name}, {form}, ms", first, f"most {most:.1f}")
            report.figure(f"second call, {name}, {form}, ms", statistics.median(line["second"] for line in own))


def run(setup: Setup, report: Report) -> None:
    last = in_a_process(setup, True)
    show("put last", last, report)
    beyond = [line["first"] - line["second"] for line in last]
    report.figure("first call, put last, beyond the second, ms", statistics.median(beyond))
    by_cudnn = {line["length"] for line in last if line["kernel"] == "CUDNN_ATTENTION"}
    report.figure(f"lengths of {LENGTHS} that cuDNN computes, put last", len(by_cudnn))
    report.figure("error against math, relative", max(line["error"] for line in last if "error" in line))
    as_it_is = in_a_process(setup, False)
    show("as it is", as_it_is, report)
    for form in FORMS:
        theirs = {line["length"]: line["second"] for line in as_it_is if line["form"] == form}
        ours = {line["length"]: line["second"] for line in last if line["form"] == form}
        ratios = [ours[length] / theirs[length] for length in theirs.keys() & ours.keys()]
        report.figure(f"second call, put last by as it is, {form}", statistics.median(ratios))


if __name__ == "__main__":
    measure(Setup("--cpu" not in sys.argv, Path(), Path()), Path(sys.argv[1]))

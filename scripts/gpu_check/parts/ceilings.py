"""Versions, and the two ceilings of everything that follows: the rate of a matrix product and of a copy."""

import importlib.metadata
import platform
import re
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from ambersafe_cli import cards
from gpu_check import expected
from gpu_check.figures import Report, Setup, seconds

PINS = Path(__file__).resolve().parents[2] / "constraints.txt"
SHOWN = ("torch", "transformers", "accelerate", "datasets", "peft", "bitsandbytes", "trl", "numpy")
TURNS = 7


def card_name(text: str) -> str | None:
    """The name in ambersafe_cli.cards of the card that its driver calls so, or None; variants of one name, of which the
    data sheet says other figures, are told apart by their memory."""
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    memory = torch.cuda.get_device_properties(0).total_memory
    for card in cards.CARDS:
        is_named = re.sub(r"[^a-z0-9]", "", card.name.lower().partition("-")[0]) in plain
        if is_named and "pcie" not in plain and "nvl" not in plain and abs(card.memory / memory - 1) < 0.05:
            return card.name
    return None


def show_versions(setup: Setup, report: Report) -> None:
    report.text("Python", platform.python_version())
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", PINS.read_text(), re.MULTILINE)) if PINS.exists() else {}
    for name in SHOWN:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        pinned = pins.get(name)
        differs = pinned and version.partition("+")[0] != pinned
        report.text(name, f"{version}{f' (tested with {pinned})' if differs else ''}")
    if setup.on_gpu:
        cudnn: Any = torch.backends.cudnn
        report.text("CUDA, cuDNN, nccl", f"{torch.version.cuda}, {cudnn.version()}, {torch.cuda.nccl.version()}")
        asked = "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm"
        if tool := shutil.which("nvidia-smi"):
            said = subprocess.run([tool, asked, "--format=csv,noheader"], capture_output=True, text=True, check=False)
            report.text("card", said.stdout.strip())


def product(setup: Setup) -> float:
    """Operations a second of a product of two square matrices in bfloat16: the median of TURNS."""
    n, times = setup.size(8192, 512), setup.size(20, 4)
    a, b = (torch.randn(n, n, device=setup.device).to(torch.bfloat16) for _ in range(2))
    took = [seconds(setup, lambda: [a @ b for _ in range(times)]) for _ in range(TURNS + 2)][2:]
    return 2 * n**3 * times / statistics.median(took)


def copy(setup: Setup) -> float:
    """Bytes a second that a copy reads and writes: the median of TURNS."""
    size = setup.size(2**32, 2**26)
    source = torch.zeros(size, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    took = [seconds(setup, lambda: target.copy_(source)) for _ in range(TURNS + 2)][2:]
    return 2 * size / statistics.median(took)


def run(setup: Setup, report: Report) -> None:
    show_versions(setup, report)
    rate = product(setup)
    report.figure("product, TFLOP/s", rate / 1e12, f"bfloat16, {setup.size(8192, 512)} squared")
    bandwidth = copy(setup)
    report.figure("copy, TB/s", bandwidth / 1e12, "read and written")
    if not setup.on_gpu:
        return
    name = card_name(torch.cuda.get_device_name())
    if name is None:
        for figure in ("bf16 product, share of the data sheet", "copy, share of the data sheet"):
            report.not_run(figure, f"no data sheet of {torch.cuda.get_device_name()} is known")
        return
    card = next(card for card in cards.CARDS if card.name == name)
    if card.bfloat16:
        report.figure(
            "bf16 product, share of the data sheet", rate / 1e12 / card.bfloat16, f"{card.bfloat16:g}, {card.source}"
        )
    else:
        report.not_run("bf16 product, share of the data sheet", f"{name} has no bfloat16")
    if name in expected.BANDWIDTHS:
        of_sheet = expected.BANDWIDTHS[name]
        report.figure("copy, share of the data sheet", bandwidth / 1e12 / of_sheet, f"{of_sheet:g} TB/s, {card.source}")
    else:
        report.not_run("copy, share of the data sheet", f"the bandwidth of {name} is not in expected.py")

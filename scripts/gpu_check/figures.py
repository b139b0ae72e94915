"""What a part of `scripts/gpu-check` knows of where it runs, and how it tells what it finds."""

import gc
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Setup:
    """Where a part runs: on a card or, at toy size, on a CPU; its own empty folder; and a patched clone of upstream."""

    on_gpu: bool
    folder: Path
    clone: Path

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        return "cuda" if self.on_gpu else "cpu"

    def size(self, of_gpu: int, of_cpu: int) -> int:
        """A size, of which a CPU gets a toy's."""
        return of_gpu if self.on_gpu else of_cpu


class Report:
    """Prints each figure as it is found, and keeps it as a line of JSON for whoever runs the part."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def figure(self, name: str, value: float, note: str = "") -> None:
        """A number; one that is not finite is kept as None, as JSON has no other word for it."""
        if not math.isfinite(value):
            note, kept = f"{value}{f', {note}' if note else ''}", None
            self._keep({"figure": name, "value": kept, "note": note}, f"{name}: {note}")
            return
        self._keep(
            {"figure": name, "value": value, "note": note}, f"{name}: {value:.6g}{f'  ({note})' if note else ''}"
        )

    def text(self, name: str, value: str) -> None:
        self._keep({"text": name, "value": value}, f"{name}: {value}")

    def not_run(self, name: str, reason: str) -> None:
        """A figure, or with "" the whole part, cannot be had here."""
        self._keep({"not_run": name, "reason": reason}, f"{name or 'this part'}: not run, {reason}")

    def _keep(self, entry: dict[str, Any], line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"  {line}", flush=True)


def wait(setup: Setup) -> None:
    """Until the card has done what it was given."""
    if setup.on_gpu:
        torch.cuda.synchronize()


def seconds(setup: Setup, work: Callable[[], object]) -> float:
    """How long some work takes, the card's part included."""
    wait(setup)
    begun = time.perf_counter()
    work()
    wait(setup)
    return time.perf_counter() - begun


def host_seconds(setup: Setup, work: Callable[[], object]) -> float:
    """How long some work keeps the host, which may be done before the card is."""
    wait(setup)
    begun = time.perf_counter()
    work()
    found = time.perf_counter() - begun
    wait(setup)
    return found


def free_memory(setup: Setup) -> None:
    """Give back what nobody refers to any more; parts of a model refer to one another in circles."""
    gc.collect()
    if setup.on_gpu:
        torch.cuda.empty_cache()


def fits(setup: Setup, needed: int) -> str:
    """Why so many bytes do not fit the card, or "" if they do."""
    if not setup.on_gpu or needed < (there := torch.cuda.get_device_properties(0).total_memory):
        return ""
    return f"it needs {needed / 1e9:.0f} GB, and the card has {there / 1e9:.0f}"


def reset_peak(setup: Setup) -> None:
    if setup.on_gpu:
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(setup: Setup) -> int:
    """The most that PyTorch has had of the card's memory since reset_peak(); 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if setup.on_gpu else 0

"""What a step pays for its form: microbatches, the optimizer's way, waiting for the card, waiting for the tokenizer."""

import statistics
import sys
import warnings
from typing import Any

import bench_data
import bench_runs
import numpy as np
import torch
from bench_data import Shape
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_check import models
from gpu_check.figures import Report, Setup, fits, free_memory, peak_bytes, reset_peak, seconds
from gpu_check.parts import step

TURNS = 3
# Operations whose result the host has to have before it can go on.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")


class CountWaits(TorchDispatchMode):
    """Counts what makes the host wait for a card, on a CPU as well: numbers that are read, shapes that depend on data,
    and copies to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.partition(".")[0]
        is_index = name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1])
        to_cpu = name == "_to_copy" and str((kwargs or {}).get("device", "")) == "cpu" and args[0].is_cuda
        self.count += name in WAITS or is_index or to_cpu
        return function(*args, **(kwargs or {}))


def time_microbatches(setup: Setup, made: Any, shape: Shape, length: int) -> dict[int, float]:
    """Seconds of forward and backward passes of 16 sequences in 1 and in 4 microbatches."""
    batch = models.sequences(shape, setup, setup.size(16, 8), length)
    found = {}
    for count in (1, 4):
        size = len(batch["chosen_labels"]) // count
        parts = [{k: v[i * size : (i + 1) * size] for k, v in batch.items()} for i in range(count)]

        def work(parts: list[dict[str, torch.Tensor]] = parts) -> None:
            for part in parts:
                models.backward(models.forward(made, part) / len(parts))

        work()
        found[count] = statistics.median(seconds(setup, work) for _ in range(TURNS))
    return found


def time_optimizers(setup: Setup, made: Any, report: Report) -> None:
    """Of RMSprop, as the recipe has it, one by one and foreach; of AdamW also fused, which RMSprop has not."""
    parameters = list(made.policy.parameters())
    took: dict[str, float] = {}
    for name, how in (
        ("RMSprop", {"foreach": False}), ("RMSprop", {"foreach": True}), ("AdamW", {"foreach": False}),
        ("AdamW", {"foreach": True}), ("AdamW", {"fused": True}),
    ):  # fmt: skip
        label = f"{name}, {'fused' if 'fused' in how else 'foreach' if how['foreach'] else 'one by one'}"
        own: Any = getattr(torch.optim, name)
        optimizer = own(parameters, lr=0.0, **how)
        optimizer.step()
        held = torch.cuda.memory_allocated() if setup.on_gpu else 0
        reset_peak(setup)
        took[label] = statistics.median(seconds(setup, optimizer.step) for _ in range(TURNS))
        report.figure(
            f"{label}, ms", 1000 * took[label], f"{(peak_bytes(setup) - held) / 1e9:.2f} GB more" if held else ""
        )
        del optimizer
    report.figure("optimizer, one by one by foreach, time", took["RMSprop, one by one"] / took["RMSprop, foreach"])


def count_waits(setup: Setup, made: Any, shape: Shape, length: int, report: Report) -> None:
    """Of a microbatch of DPO with the cache of the reference, its metrics included."""
    batch: dict[str, Any] = dict(models.pairs(shape, setup, 2, length)) | {"index": np.arange(2)}
    made.uses_reference_cache, made.reference_caches = True, {"train": ("", np.zeros((2, 2), dtype=np.float32))}
    loss = OmegaConf.create({"name": "dpo", "beta": 0.1, "reference_free": False, "label_smoothing": 0.0})
    with CountWaits() as counted:
        made.get_batch_metrics(batch, loss, train=True)[0].backward()
    said = ""
    if setup.on_gpu:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made.get_batch_metrics(batch, loss, train=True)[0].backward()
        torch.cuda.set_sync_debug_mode("default")
        said = f"{sum('synchroniz' in str(each.message) for each in caught)} by PyTorch's own count"
    report.figure("host waits in a microbatch of DPO", counted.count, said)
    made.policy.zero_grad()


def time_prefetch(setup: Setup, report: Report) -> None:
    """Real runs of a model that is quick beside its tokenizer."""
    shape = bench_data.SHAPES["7M"] if setup.on_gpu else models.TOY
    bench_data.build_model(setup.folder, shape)
    examples = 64 * setup.size(40, 4)
    bench_data.write_data(setup.folder / "data", examples, shape)
    speed = {}
    for ahead in (2, 0):
        folder = setup.folder / f"prefetch-{ahead}"
        folder.mkdir()
        command = [
            *(sys.executable, "-m", "ambersafe_cli", "sft", "--plain", "--no-preflight", "--trainer", "BasicTrainer"),
            *("--dir", str(setup.clone), "--model", str(setup.folder / "model"), "--data", str(setup.folder / "data")),
            *("--epochs", "1", f"prefetch_batches={ahead}", "do_first_eval=false", "do_final_eval=false"),
            *("n_eval_examples=8", "eval_batch_size=8", "eval_every=64000000", "minimum_log_interval_secs=0"),
        ]
        made = bench_runs.steps(bench_runs.run(command, folder, {"HF_HUB_OFFLINE": "1"}).lines)
        speed[ahead] = (made[-1].examples - made[0].examples) / (made[-1].time - made[0].time)
        report.figure(f"prefetch_batches={ahead}, examples/s", speed[ahead])
    report.figure("prefetch on by off, examples/s", speed[2] / speed[0])


def run(setup: Setup, report: Report) -> None:
    shape, length = step.shape_of(setup), setup.size(512, 64)
    if problem := fits(setup, step.planned(shape, setup.size(16, 8), length)):
        report.not_run("", problem)
        return
    made, optimizer = step.prepare(setup, shape)
    del optimizer
    found = time_microbatches(setup, made, shape, length)
    report.figure("1 microbatch, ms", 1000 * found[1])
    report.figure("4 microbatches, ms", 1000 * found[4])
    report.figure("step of 4 microbatches by that of 1", found[4] / found[1])
    time_optimizers(setup, made, report)
    count_waits(setup, made, shape, length, report)
    del made
    free_memory(setup)
    time_prefetch(setup, report)

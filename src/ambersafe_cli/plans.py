"""What a run will do: steps, evaluations, checkpoints, disk and memory, by arithmetic that is shown.

The arithmetic of memory is memory.py's.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambersafe_cli import checkpoints, memory
from ambersafe_cli.memory import Moment, Part


@dataclass(frozen=True)
class Plan:
    """What a run will do: counts; sizes in bytes, None where the model's size is not known.

    `memory` are the parts of what a process needs at the moment when it needs most, whose name is `memory_when`.
    """

    examples_an_epoch: int
    examples: int
    steps: int
    evaluations: int
    checkpoints_kept: int
    parameters: int | None
    checkpoint_bytes: int | None
    disk_bytes: int | None
    disk_free_bytes: int
    memory: tuple[Part, ...] | None
    memory_when: str | None


def make_plan(
    stage: str,
    processes: int,
    run_folder: Path,
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    model: checkpoints.Shapes | None,
) -> Plan:
    """Steps, evaluations, checkpoints, disk and memory, by arithmetic on the config and the model's shapes."""
    batch, every = config["batch_size"], max(config["eval_every"] // config["batch_size"] * config["batch_size"], 1)
    n = data["splits"]["train"]["examples"]
    steps = count_steps(n, batch, config["n_epochs"], config["n_examples"], bool(config.get("fill_last_batch")))
    saves = max(steps * batch - 1, 0) // every
    between = config.get("save_every_examples")
    written = saves + (max(steps * batch - 1, 0) // max(between, batch) if isinstance(between, int) else 0)
    if config.get("save_every_minutes") and config.get("keep_checkpoints") is not None:
        written = max(written, config["keep_checkpoints"] + 1)  # how many it will be depends on the machine
    kept = written if config.get("keep_checkpoints") is None else min(written, config["keep_checkpoints"] + 1)
    kept += config.get("keep_best") is not None
    shape = memory.shape_of(model) if model else None
    checkpoint = memory.checkpoint_bytes(stage, config, shape) if shape else None
    most = _peak(stage, processes, config, data, shape) if shape else None
    return Plan(
        examples_an_epoch=n,
        examples=steps * batch,
        steps=steps,
        evaluations=saves + bool(config["do_first_eval"]) + bool(config.get("do_final_eval")),
        checkpoints_kept=kept + 1,
        parameters=shape.parameters if shape else None,
        checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * (kept + 1) if checkpoint else None,
        disk_free_bytes=shutil.disk_usage(_existing(run_folder)).free,
        memory=most.parts if most else None,
        memory_when=most.name if most else None,
    )


def count_steps(
    examples: int, batch_size: int, n_epochs: int | None, n_examples: int | None, fill_last_batch: bool
) -> int:
    """How many steps train.py does: upstream's get_batch_iterator, with or without the last batch of each epoch.

    What is dropped behind an epoch's last batch counts towards n_examples.
    """
    limits = []
    batches = examples // batch_size
    if n_epochs is not None:
        limits.append(-(-examples * n_epochs // batch_size) if fill_last_batch else batches * n_epochs)
    if n_examples is not None and (fill_last_batch or not batches):
        limits.append(-(-n_examples // batch_size))
    elif n_examples is not None:
        whole_epochs = max(0, -(-(n_examples - batches * batch_size) // examples))
        limits.append(whole_epochs * batches + max(1, -(-(n_examples - whole_epochs * examples) // batch_size)))
    return min(limits)


def _peak(
    stage: str, processes: int, config: Mapping[str, Any], data: Mapping[str, Any], shape: memory.Shape
) -> Moment:
    """The moment at which a process needs most memory."""
    sampled = data["splits"]["train"]["sampled"]
    lengths = memory.Lengths(sampled["tokens_longest"], sampled.get("response_longest", sampled["tokens_longest"]))
    return memory.peak(memory.moments(stage, config, shape, lengths, processes))


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def describe(plan: Plan) -> list[tuple[str, str]]:
    """The plan in words, with the arithmetic."""
    rows = [
        ("examples an epoch", f"{plan.examples_an_epoch:,}"),
        ("optimizer steps", f"{plan.steps:,}, {plan.examples:,} examples in all"),
        ("evaluations", f"{plan.evaluations:,}"),
    ]
    if plan.parameters and plan.checkpoint_bytes and plan.disk_bytes and plan.memory is not None:
        rows += [
            ("parameters", f"{plan.parameters:,}"),
            ("a checkpoint", f"{in_gigabytes(plan.checkpoint_bytes)}, weights and optimizer"),
            ("disk", f"{in_gigabytes(plan.disk_bytes)} = {plan.checkpoints_kept} checkpoints"),
        ]
        rows += [(f"  {part.name}", f"{in_gigabytes(part.bytes)} = {part.how}") for part in plan.memory]
        total = in_gigabytes(sum(part.bytes for part in plan.memory))
        rows.insert(-len(plan.memory), ("memory a process, about", f"{total}, when {plan.memory_when}"))
    else:
        rows.append(("disk and memory", "not known: the model is not on this machine"))
    return [*rows, ("disk that is free", in_gigabytes(plan.disk_free_bytes))]


def in_gigabytes(size: int) -> str:
    """A size for people, in powers of ten, as disks are sold."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"

"""What a run will do: steps, evaluations, checkpoints, disk and memory, by arithmetic that is shown.

Activations: what autograd keeps of a layer of LLaMA is 10 times the hidden and 4 times the inner size a token, as its
saved tensors say (transformers 5.23, sdpa attention); under autocast 18 times the hidden size, in numbers of 16 bits.
Other architectures keep about as much.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambersafe_cli import checkpoints

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
_OPTIMIZER_STATES = {"RMSprop": 1, "SGD": 0, "Adam": 2, "AdamW": 2, "Adagrad": 1}
"""Numbers that an optimizer keeps a parameter, with upstream's settings (no momentum)."""


_EMBEDDING = re.compile(r"embed_tokens|embed_in|wte|word_embeddings")


@dataclass(frozen=True)
class Part:
    """A part of the memory that a process needs: its name, its size in bytes, and the arithmetic behind it."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True)
class Plan:
    """What a run will do: counts; sizes in bytes, None where the model's size is not known."""

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
    size = checkpoints.parameters(model) if model else None
    weights = _BYTES.get(str(config["model.policy_dtype"]), 4)
    states = _OPTIMIZER_STATES.get(str(config["optimizer"]), 2)
    checkpoint = size * weights * (1 + states) if size else None
    return Plan(
        examples_an_epoch=n,
        examples=steps * batch,
        steps=steps,
        evaluations=saves + bool(config["do_first_eval"]) + bool(config.get("do_final_eval")),
        checkpoints_kept=kept + 1,
        parameters=size,
        checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * (kept + 1) if checkpoint else None,
        disk_free_bytes=shutil.disk_usage(_existing(run_folder)).free,
        memory=_memory(stage, processes, config, size, data, model) if size and model else None,
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


def _memory(
    stage: str, shards: int, config: Mapping[str, Any], size: int, data: Mapping[str, Any], model: checkpoints.Shapes
) -> tuple[Part, ...]:
    """Bytes a process needs, by part."""
    weights = _BYTES.get(str(config["model.policy_dtype"]), 4)
    over = f" / {shards} processes" if shards > 1 else ""
    states = _OPTIMIZER_STATES.get(str(config["optimizer"]), 2)

    def sharded(name: str, bytes_each: int) -> Part:
        return Part(name, size * bytes_each // shards, f"{size:,} x {bytes_each} bytes{over}")

    parts = [sharded("weights", weights), sharded("gradients", weights)]
    if states:
        parts.append(sharded(f"{config['optimizer']}", weights * states))
    mixed = config.get("mixed_precision")
    if mixed and "FSDP" not in str(config["trainer"]):
        parts.append(sharded(f"weights in {mixed}", _BYTES.get(str(mixed), 2)))  # which autocast makes
    if stage == "dpo" and not config.get("cache_reference"):
        parts.append(sharded("reference model", _BYTES.get(str(config["model.reference_dtype"]), 2)))
    sequences = config["batch_size"] // (config["gradient_accumulation_steps"] * shards) * (2 if stage == "dpo" else 1)
    longest = data["splits"]["train"]["sampled"]["tokens_longest"]
    tokens, how = sequences * longest, f"{sequences} sequences x {longest} tokens"
    hidden, layers, inner = _sizes(model)
    compute = _BYTES.get(str(mixed or config.get("model.fsdp_policy_mp")), weights)
    # Autocast keeps what flows from layer to layer, and into norms, in the type of the weights.
    hiddens = 18 if mixed and "FSDP" not in str(config["trainer"]) else 10
    if config["activation_checkpointing"]:
        between = layers * hidden * (2 if hiddens == 18 else 1)
        kept, kept_how = between + hiddens * hidden + 4 * inner, f"({between} + one layer)"
    else:
        kept = layers * (hiddens * hidden + 4 * inner)
        kept_how = f"{layers} layers x ({hiddens} x {hidden} + 4 x {inner})"
    parts.append(Part("activations", tokens * kept * compute, f"{how} x {kept_how} x {compute} bytes"))
    vocabulary = max((shape[0] for name, shape in model.items() if _EMBEDDING.search(name)), default=0)
    if config.get("response_logits_only"):
        # The gradient is written over them. Which of the tokens are of responses is not counted here.
        parts.append(Part("logits", compute * tokens * vocabulary, f"{how} at most x {vocabulary:,} x {compute} bytes"))
    else:
        # What upstream's loss holds at once: logits and their log-softmax in float32, and the gradient.
        parts.append(Part("logits", 3 * 4 * tokens * vocabulary, f"{how} x {vocabulary:,} x 3 x 4 bytes"))
    return tuple(parts)


def _sizes(model: checkpoints.Shapes) -> tuple[int, int, int]:
    """The hidden size, the number of layers and the inner size of the feed-forward part, by the names of tensors."""
    hidden = max((shape[1] for name, shape in model.items() if _EMBEDDING.search(name)), default=0)
    layers = len({match[0] for name in model if (match := re.search(r"\.\d+\.", name))})
    inner = max((max(shape) for name, shape in model.items() if "mlp" in name and len(shape) == 2), default=4 * hidden)
    return hidden, layers, inner


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
        rows.insert(-len(plan.memory), ("memory a process, about", total))
    else:
        rows.append(("disk and memory", "not known: the model is not on this machine"))
    return [*rows, ("disk that is free", in_gigabytes(plan.disk_free_bytes))]


def in_gigabytes(size: int) -> str:
    """A size for people, in powers of ten, as disks are sold."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"

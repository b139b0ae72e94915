"""What preflight says of LoRA, quantized weights and optimizers: what is not installed, or does not go together."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambersafe_cli import checkpoints
from ambersafe_cli.findings import Finding
from ambersafe_cli.launch import BITSANDBYTES, LORA_PATCH
from ambersafe_cli.memory import EMBEDDING, OUTPUT

if TYPE_CHECKING:
    from ambersafe_cli.environment import TrainingEnvironment
    from ambersafe_cli.recipe import Stage

OPTIMIZERS = (
    "RMSprop", "AdamW", "Adam", "SGD", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Adafactor",
    *BITSANDBYTES,
)  # fmt: skip
"""Those of torch.optim that take any weights and need no closure, and of bitsandbytes."""


LEAST_RATES = {"sft": 1e-5, "dpo": 1e-6}
"""Learning rates below which an adapter is hardly trained: published ones are 10 times these or more (QLoRA,
https://arxiv.org/abs/2305.14314, Table 9: 1e-4 to 2e-4 in SFT; Zephyr's QLoRA recipe of DPO: 5e-6)."""


def of_needs(stage: str, config: Mapping[str, Any], environment: "TrainingEnvironment") -> Iterator[Finding]:
    """Findings by the settings alone: packages, the GPU, the optimizer's name."""
    optimizer = str(config["optimizer"])
    if optimizer not in OPTIMIZERS:
        known = {name.lower(): name for name in OPTIMIZERS}
        close = difflib.get_close_matches(optimizer.lower(), known, n=1)
        mend = f"Is it {known[close[0]]}? " if close else ""
        yield Finding("error", f"There is no optimizer {optimizer}.", f"{mend}There are {', '.join(OPTIMIZERS)}.")
    if config.get("lora") and "peft" not in environment.extras:
        yield _lacks(environment.python, "peft", "--lora", "lora")
    for flag, needs_it in (
        (f"--quantize {config.get('quantize')}", bool(config.get("quantize"))),
        (f"--optimizer {optimizer}", optimizer in BITSANDBYTES),
    ):
        if needs_it and "bitsandbytes" not in environment.extras:
            yield _lacks(environment.python, "bitsandbytes", flag, "quantize")
    if optimizer.startswith("Paged") and not environment.gpus:
        yield Finding(
            "error",
            f"{optimizer} moves its state out of the memory of a GPU, and there is none here.",
            f"--optimizer {optimizer.removeprefix('Paged')} is the same without that.",
        )
    if config.get("quantize") and not environment.gpus:
        yield Finding("warning", "Without a GPU quantized weights are slow: bitsandbytes unpacks them each time.", "")
    if config.get("lora") and config["lr"] < LEAST_RATES[stage]:
        yield Finding(
            "warning",
            f"lr {config['lr']} is one for all weights: an adapter, which begins at 0, hardly moves at it.",
            f"--recipe ambersafe-lora has rates for adapters; --lr {LEAST_RATES[stage] * 10:g} is one.",
        )
    if config.get("lora") and config.get("offload_reference"):
        yield Finding("warning", "offload_reference does nothing with LoRA, which has no second model.", "")


def _lacks(python: str, package: str, flag: str, extra: str) -> Finding:
    mend = f"Install it there: pip install 'ambersafe-cli[{extra}]'"
    return Finding("error", f"{python} lacks {package}, which {flag} needs.", mend)


def of_archive(
    stage: "Stage",
    config: Mapping[str, Any],
    environment: "TrainingEnvironment",
    model: checkpoints.Shapes | None,
    applied: Collection[str],
) -> Iterator[Finding]:
    """Findings of an archive that has an adapter, or that one is to lie on. Raises ArchiveError if it is not whole.

    `applied` are the subjects of the patches that the clone has.
    """
    path = Path(str(stage.get("model.archive")))
    adapter = checkpoints.adapter_of(path)
    if adapter is None:
        if config.get("quantize"):
            yield Finding(
                "error",
                f"{path} holds all weights, which cannot be loaded into quantized ones.",
                "Train SFT with --lora too, or leave --quantize away.",
            )
        return
    if LORA_PATCH not in applied:
        yield Finding("error", f"{path} has an adapter, which needs the patch {LORA_PATCH!r}.", "`ambersafe setup`")
    if not config.get("lora"):
        if "peft" not in environment.extras:
            yield _lacks(environment.python, "peft", "the adapter of the archive", "lora")
        yield Finding(
            "warning",
            f"{path} is of a run with LoRA, and this run trains all weights"
            + (f", which are not in {adapter.quantize} as they were." if adapter.quantize else "."),
            "--lora trains an adapter again, in far less memory.",
        )
    elif adapter.quantize != config.get("quantize"):
        then, now = (f"in {bits}" if bits else "not quantized" for bits in (adapter.quantize, config.get("quantize")))
        yield Finding(
            "warning",
            f"The adapter of {path} was trained on weights {then}, and goes on with weights {now}.",
            f"--quantize {adapter.quantize} goes on as it was." if adapter.quantize else "Leave --quantize away.",
        )
    if adapter.on and not adapter.on.is_file():
        yield Finding("error", f"{adapter.on} is gone, whose weights the adapter of {path} is for.", "Bring it back.")
    for what in list(_misfits(checkpoints.adapter_shapes(adapter), model))[:3] if model else ():
        yield Finding("error", f"The adapter of {path} does not fit the model {stage.model}: {what}.", "")


def _misfits(adapter: checkpoints.Shapes, model: checkpoints.Shapes) -> Iterator[str]:
    """Where the layers of an adapter are not the model's, in words."""
    known = {name.removesuffix(".weight"): shape for name, shape in model.items()}
    for name, shape in adapter.items():
        layer, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
        # Files of some models lack the prefix of the part that is not the output layer.
        found = known.get(layer) or known.get(layer.partition(".")[2])
        if found is None:
            yield f"the model has no {layer}"
        elif len(shape) != 2:
            yield f"{name} is no matrix"
        elif (size := shape[1] if "A" in kind else shape[0]) not in found:
            yield f"{layer} is {'x'.join(map(str, found))}, and the adapter is for {size}"


def of_targets(stage: "Stage", config: Mapping[str, Any], model: checkpoints.Shapes) -> Iterator[Finding]:
    """Findings of the layers that are to have an adapter."""
    targets = config.get("lora_targets")
    if not config.get("lora") or not isinstance(targets, list):
        return
    layers = {name.rpartition(".")[0] for name, shape in model.items() if len(shape) == 2}
    for target in targets:
        if not any(_is_target(layer, [target]) for layer in layers):
            ends = sorted({layer.rpartition(".")[2] for layer in layers})
            yield Finding(
                "error",
                f"lora_targets names {target}, and no layer of {stage.model} ends so.",
                f"There are {', '.join(ends)}.",
            )
    embeddings = [layer for layer in layers if EMBEDDING.search(layer) and _is_target(layer, targets)]
    if embeddings and not any(OUTPUT.search(f"{layer}.") for layer in layers):
        yield Finding(
            "error",
            f"{stage.model} ties its input and output embeddings, which cannot have an adapter ({embeddings[0]}).",
            "Leave it out of --lora-targets.",
        )


def _is_target(layer: str, targets: Iterable[object]) -> bool:
    return any(f".{layer}".endswith(f".{target}") for target in targets)

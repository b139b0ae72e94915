"""Put the adapter of a LoRA checkpoint into a model; shared by load_policy.py and export_checkpoint.py.

Runs under the training interpreter, which has peft then. The adapter lies beside the policy.pt in peft's own format:
https://huggingface.co/docs/peft/developer_guides/checkpoint. Upstream: adapters.py, add_adapters().
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ambersafe_cli.children.answering import Problem, innermost
else:
    from answering import Problem, innermost

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RANK_AT = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
"""The parts of an adapter in a layer, and which dimension of each is the rank."""
TRAINED, ARCHIVE = "default", "archive"


def require_finite(tensors: dict[str, torch.Tensor], where: str) -> None:
    """Raise Problem for weights that are not finite: whatever is made of them would look like any other."""
    for name, tensor in tensors.items():
        # A sum takes no memory, and tells at once that all are finite: of one that is not, nothing finite can come.
        is_sure = not tensor.is_floating_point() or bool(tensor.sum(dtype=torch.float32).isfinite())
        if not is_sure and not bool(tensor.isfinite().all()):
            raise Problem("checkpoint", f"{where} holds weights that are not finite, {name} among them.")


def layers_of(model: Any) -> dict[str, Any]:
    """The layers with an adapter, by their names in the model."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def add(model: Any, folder: str, dtype: torch.dtype, trained_rank: int | None = None) -> None:
    """Put the adapter in a folder into a model, with weights of this dtype; into one on the meta device, too.

    `trained_rank`: what of a layer's rank comes before this is the archive's adapter, and is added by itself, as in
    training: in bfloat16 two sums are not rounded as one is. Raises Problem if it is another model's adapter.
    """
    import peft
    from safetensors.torch import load_file

    try:
        config: Any = peft.LoraConfig.from_pretrained(folder)
        config.lora_dropout = 0.0
        saved = load_file(os.path.join(folder, WEIGHTS))
        require_finite(saved, folder)
        peft.inject_adapter_in_model(config, model, TRAINED, low_cpu_mem_usage=True)
        layers = layers_of(model)
        require_fitting(layers, saved)
        archives = {n: max(layer.r[TRAINED] - (trained_rank or layer.r[TRAINED]), 0) for n, layer in layers.items()}
        if any(archives.values()):
            peft.inject_adapter_in_model(config, model, ARCHIVE, low_cpu_mem_usage=True)
        for name, layer in layers.items():
            first, rank = archives[name], layer.r[TRAINED]
            parts = {ARCHIVE: (0, first), TRAINED: (first, rank - first)} if first else {TRAINED: (0, rank)}
            for kind, key in names_of(name, layer).items():
                for adapter, (start, length) in parts.items():
                    fill(layer, kind, adapter, saved[key].narrow(RANK_AT[kind], start, length).to(dtype))
            layer.set_adapter(list(parts))
    except Problem:
        raise
    except Exception as error:  # peft raises many kinds
        raise Problem("checkpoint", f"{folder} holds no adapter of this model: {innermost(error)}") from error
    model.requires_grad_(False)


def deltas(model: Any) -> Iterator[tuple[str, Any, torch.Tensor]]:
    """What the adapter of a model adds to weights, in float32: the name of the layer, the layer, and the sum's part."""
    for name, layer in layers_of(model).items():
        yield name, layer, layer.get_delta_weight(TRAINED)


def merge(model: Any, folder: str) -> None:
    """Add the adapter in a folder to a model's weights, each in float32, and leave no adapter in it."""
    add(model, folder, torch.float32)
    for name, layer, delta in deltas(model):
        weight = layer.get_base_layer().weight
        weight.data = (weight.data.float() + delta).to(weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())


def names_of(name: str, layer: Any) -> dict[str, str]:
    """The parts that a layer's adapter has, and their names in the file."""
    return {
        kind: f"base_model.model.{name}.{kind}{'' if 'embedding' in kind else '.weight'}"
        for kind in RANK_AT
        if TRAINED in getattr(layer, kind)
    }


def require_fitting(layers: dict[str, Any], saved: dict[str, torch.Tensor]) -> None:
    """Raise ValueError if a file does not hold just the adapters that these layers have."""
    wanted = {
        key: tuple(getattr(entry := getattr(layer, kind)[TRAINED], "weight", entry).shape)
        for name, layer in layers.items()
        for kind, key in names_of(name, layer).items()
    }
    held = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    if wrong := sorted(key for key in wanted.keys() | held.keys() if wanted.get(key) != held.get(key)):
        raise ValueError(f"{wrong[0]}: it holds {held.get(wrong[0])}, and {wanted.get(wrong[0])} is wanted")


def fill(layer: Any, kind: str, adapter: str, weight: torch.Tensor) -> None:
    """Give a part of a layer's adapter its weight, on the device of the layer, if that holds numbers."""
    device = layer.get_base_layer().weight.device
    parameter = torch.nn.Parameter(weight.to("cpu" if device.type == "meta" else device), requires_grad=False)
    held = getattr(layer, kind)
    if isinstance(held[adapter], torch.nn.Module):
        held[adapter].weight = parameter
    else:
        held[adapter] = parameter

"""Models with random weights, batches of one length, and trainers of the patched upstream without their start.

The clone's folder has to be on sys.path: what is measured is its code, not another copy of it.
"""

import importlib
from typing import Any

import torch
import transformers
from bench_data import Shape
from omegaconf import OmegaConf

from ambersafe_cli import memory
from gpu_check.figures import Setup

AMBERCHAT = Shape(4096, 32, 32, 11008, 32000)
EIGHT_LAYERS = Shape(4096, 8, 32, 11008, 32000)
TOY = Shape(64, 2, 4, 172, 512)


def upstream(name: str) -> Any:
    """A module of the clone."""
    return importlib.import_module(name)


def llama(shape: Shape, setup: Setup, dtype: torch.dtype) -> Any:
    """A LLaMA, made where it computes, without dropout."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(setup.device):
            return transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def trainer(setup: Setup, policy: Any, kind: str = "BasicTrainer", **config: Any) -> Any:
    """One of the clone's trainers, with what a step needs of it and nothing read from a disk."""
    made: Any = object.__new__(getattr(upstream("trainers"), kind))
    common = {"response_logits_only": True, "mixed_precision": "bfloat16", "max_grad_norm": 10.0, "lora": False}
    made.config = OmegaConf.create({**common, "offload_reference": False, **config})
    mixed = made.config.mixed_precision
    made.mp_dtype = getattr(torch, mixed) if mixed else None
    made.device = torch.device(setup.device, 0) if setup.on_gpu else torch.device("cpu")
    made.rank, made.world_size, made.policy, made.reference_model = 0, 1, policy, None
    made.uses_reference_cache = False
    return made


def sequences(shape: Shape, setup: Setup, count: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """So many sequences of so many tokens, the second half of each the response, by the names that a batch has."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, shape.vocabulary, (count, length), generator=source).to(setup.device)
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return {"chosen_input_ids": ids, "chosen_attention_mask": torch.ones_like(ids), "chosen_labels": labels}


def pairs(shape: Shape, setup: Setup, count: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """So many pairs, chosen and rejected of the same length."""
    chosen = sequences(shape, setup, count, length, seed)
    rejected = sequences(shape, setup, count, length, seed + 1)
    return chosen | {name.replace("chosen", "rejected"): value for name, value in rejected.items()}


def operations(shape: Shape, count: int, length: int) -> float:
    """Operations of a training step on sequences(): 2 a number and token forward, twice that backward.

    Of the output layer only the response's tokens count, as only they get logits; attention as in bench_data.py
    (PaLM, appendix B, https://arxiv.org/abs/2204.02311), halved.
    """
    of_layers = shape.parameters - (2 * shape.vocabulary + 1) * shape.hidden
    tokens, responses = count * length, count * (length - length // 2)
    attention = 2 * shape.layers * shape.hidden * length
    return 3.0 * (tokens * (2 * of_layers + attention) + 2 * responses * shape.vocabulary * shape.hidden)


def forward(made: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of SFT, by the trainer's own way to the log-probabilities."""
    names = ("chosen_input_ids", "chosen_attention_mask", "chosen_labels")
    logps: torch.Tensor = made.get_logps(made.policy, *(batch[name] for name in names))
    return -logps.mean()


def memory_shape(shape: Shape) -> memory.Shape:
    """The same sizes for the arithmetic of `ambersafe plan`, by the names that LLaMA's tensors have."""
    hidden, inner = shape.hidden, shape.ffn
    of_layer: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"},
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    tensors = {f"model.layers.{n}.{name}": size for n in range(shape.layers) for name, size in of_layer.items()}
    outside = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (shape.vocabulary, hidden))
    return memory.shape_of(tensors | outside | {"model.norm.weight": (hidden,)})


def backward(loss: torch.Tensor) -> None:
    torch.autograd.backward(loss)

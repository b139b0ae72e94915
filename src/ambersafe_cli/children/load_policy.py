"""Load upstream's data code, a tokenizer and weights as train.py does; shared by score_pairs.py and generate.py.

Runs under the training interpreter. Upstream: train.py, main(), trainers.py, BasicTrainer.__init__(), utils.py,
load_model() and load_archive(), and adapters.py.
"""

import gc
import os
import sys
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from ambersafe_cli.children import adapters
    from ambersafe_cli.children.answering import Problem, innermost
else:
    import adapters
    from answering import Problem, innermost

torch.backends.cuda.matmul.allow_tf32 = True  # as train.py

Weights = dict[str, Any]
"""Which weights: label, model and its revision, tokenizer and tokenizer_revision, checkpoint (a policy.pt or null),
dtype, casts_buffers: whether buffers have that dtype as well, as FSDP's mixed precision has it, and autocast: the dtype
that autocast computes in, or null; quantize: 4bit, 8bit or null, of the model's weights. Where the checkpoint is an
adapter: adapter_dtype, trained_rank (see adapters.add, or null), and merges: whether it is added to the weights, as
full fine-tuning that begins with it does."""


def open_clone(folder: str) -> Any:
    """The module preference_datasets of a clone of upstream."""
    sys.path.insert(0, folder)
    try:
        import preference_datasets  # type: ignore[import-not-found]
    except Exception as error:
        raise Problem("clone", f"{folder} cannot be used: {innermost(error)}") from error
    return preference_datasets


def load_tokenizer(weights: Weights) -> Any:
    name, revision = weights["tokenizer"], weights["tokenizer_revision"]
    kind: Any = transformers.AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(name, revision=revision or "main")
    except Exception as error:
        raise Problem("model", f"Cannot open the tokenizer {name}: {innermost(error)}") from error
    if tokenizer.eos_token_id is None:
        raise Problem("usage", f"The tokenizer {name} has no EOS, which ends a response in training.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def load_model(weights: Weights) -> tuple[Any, dict[str, Any]]:
    """The model, ready to be evaluated, and what its checkpoint holds beside the weights: step_idx and metrics.

    On GPUs if there are any, spread over them. Frozen, as autocast would keep a copy of each weight that is not.
    """
    dtype = getattr(torch, weights["dtype"])
    places: dict[str, Any] = {"device_map": "balanced"} if torch.cuda.is_available() else {}
    if weights["quantize"]:
        places |= {"quantization_config": quantization(weights["quantize"])}
    kind: Any = transformers.AutoModelForCausalLM
    try:
        model = kind.from_pretrained(weights["model"], revision=weights["revision"] or "main", dtype=dtype, **places)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise Problem("model", f"Cannot load the model {weights['model']}: {innermost(error)}") from error
    for module in model.modules() if weights["quantize"] else ():
        module.support_avx512bf16_for_cpu = False  # as in training: the other way of computing rounds otherwise
    saved: dict[str, Any] = {}
    if weights["checkpoint"]:
        saved = load_checkpoint(model, weights, weights["checkpoint"])
    if weights["casts_buffers"]:
        model.to(dtype)
    if weights["autocast"]:
        model.forward = torch.autocast(model.device.type, getattr(torch, weights["autocast"]))(model.forward)
    return model.eval().requires_grad_(False), saved


def quantization(bits: str) -> Any:
    """As utils.py, quantization(): NF4 of QLoRA (https://arxiv.org/abs/2305.14314), or LLM.int8."""
    kind: Any = transformers.BitsAndBytesConfig
    if bits == "8bit":
        return kind(load_in_8bit=True)
    return kind(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load_checkpoint(model: Any, weights: Weights, path: str) -> dict[str, Any]:
    """Give a model the weights of a policy.pt, or its adapter, and return what else it holds."""
    try:
        saved = torch.load(path, map_location="cpu", mmap=True)
        state = saved.pop("state")
    except Exception as error:
        raise Problem("checkpoint", f"{path} cannot be read: {innermost(error)}") from error
    adapters.require_finite(state, path)
    if "adapter" in saved:
        if saved["adapter"]["on"]:
            load_checkpoint(model, weights, saved["adapter"]["on"])
        load_adapter(model, weights, os.path.dirname(path))
        return dict(saved)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        said = f"{innermost(error):.300}"
        raise Problem("checkpoint", f"{path} holds no weights of {weights['model']}: {said}") from error
    return dict(saved)


def load_adapter(model: Any, weights: Weights, folder: str) -> None:
    if weights["merges"]:
        adapters.merge(model, folder)
        return
    adapters.add(model, folder, getattr(torch, weights["adapter_dtype"]), weights["trained_rank"])
    for layer in adapters.layers_of(model).values():
        layer.cast_input_dtype_enabled = not weights["autocast"]


def require_fitting(tokenizer: Any, weights: Weights, model: Any) -> None:
    """Raise Problem if the tokenizer makes tokens that the model does not have."""
    rows = model.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise Problem(
            "usage",
            f"The tokenizer {weights['tokenizer']} makes tokens up to {highest}, and the model {weights['model']} "
            f"({weights['label']}) has {rows}: they do not belong together.",
        )


def render(module: Any, template: str | None, tokenizer: Any, prompt: str, responses: list[str]) -> tuple[str, ...]:
    """Prompt and responses in the form that training gives them."""
    if template is None:
        return (prompt, *responses)
    if not hasattr(module, "render_template"):
        raise Problem("clone", f"{module.__file__} knows no template: the clone lacks the patch that adds it.")
    try:
        rendered, answers = module.render_template(prompt, responses, template, tokenizer)
    except Exception as error:  # a chat template is a program of its own
        raise Problem("usage", f"The template {template} cannot be used: {innermost(error)}.") from error
    return (rendered, *answers)


def release() -> None:
    """Give back the memory of a model that nothing refers to any more, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

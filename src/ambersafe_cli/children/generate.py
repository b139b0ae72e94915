"""Have models answer prompts: `python generate.py`, the request on stdin; see answering.py.

Runs under the training interpreter. The request: clone (its folder), models (each as load_policy.Weights, and its
template), prompts (texts), or null and rows (datasets, split and count: the first distinct prompts of these; where
they come from is said by SAFERLHF_DATASET), max_new_tokens, temperature (0: always the likeliest token), seed,
batch_size.

The answer: prompts, and for each model a list of text, tokens (how many were generated, the EOS not counted) and
stopped (whether it came to its EOS), in the order of the prompts.
"""

import hashlib
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from ambersafe_cli.children.answering import Problem, Progress, answer, innermost
    from ambersafe_cli.children.load_policy import (
        Weights,
        load_model,
        load_tokenizer,
        open_clone,
        release,
        render,
        require_fitting,
    )
else:
    from answering import Problem, Progress, answer, innermost
    from load_policy import Weights, load_model, load_tokenizer, open_clone, release, render, require_fitting


class SeededSampling(transformers.LogitsProcessor):
    """Makes the likeliest token a sample at a temperature, with random numbers that each row has of its own.

    The Gumbel-max trick (E. J. Gumbel, 1954; C. J. Maddison and others, A* Sampling, 2014): the argmax of the logits
    over the temperature, each plus independent Gumbel noise, is distributed as their softmax. So what a prompt is
    answered does not depend on which others are in its batch.
    """

    def __init__(self, temperature: float, rows: list[torch.Generator]) -> None:
        self.temperature = temperature
        self.rows = rows

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        size = scores.shape[-1]
        waits = torch.stack([torch.empty(size).exponential_(generator=row) for row in self.rows])
        noise = -waits.clamp_min(torch.finfo(waits.dtype).tiny).log()
        return scores.float() / self.temperature + noise.to(scores.device)


def generator_for(seed: int, prompt: int) -> torch.Generator:
    """Random numbers for the answer to a prompt, by its place, the same for every model."""
    digest = hashlib.sha256(f"{seed} {prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def first_prompts(module: Any, rows: dict[str, Any]) -> list[str]:
    """The first distinct prompts of the rows, in their order."""
    found: dict[str, None] = {}
    for name in rows["datasets"]:
        found.update(dict.fromkeys(module.get_dataset(name, rows["split"], silent=True)))
    return list(found)[: rows["count"]]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Where an answer ends: at the EOS that training puts there, and at those that the model was published with."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own] if own is not None else [])})


def tokenize(module: Any, weights: Weights, tokenizer: Any, model: Any, request: dict[str, Any]) -> list[list[int]]:
    """The tokens of the prompts as training sees them: by the template, without special ones. Raises Problem."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    found = []
    for number, prompt in enumerate(request["prompts"], start=1):
        (text,) = render(module, weights["template"], tokenizer, prompt, [])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise Problem("usage", f"Prompt {number} has no tokens.")
        if room and len(ids) + request["max_new_tokens"] > room:
            raise Problem(
                "usage",
                f"Prompt {number} has {len(ids)} tokens, and with {request['max_new_tokens']} new ones that is more "
                f"than the {room} that the model of {weights['label']} has room for.",
            )
        found.append(ids)
    return found


def generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], request: dict[str, Any], progress: Progress, step: str
) -> list[dict[str, Any]]:
    """Answers in batches of prompts that are about as long, padded on the left."""
    ends = end_tokens(model, tokenizer)
    # Of its own, or a model's published one would bring a temperature, a repetition penalty and so on.
    kind: Any = transformers.GenerationConfig
    model.generation_config = kind(
        max_new_tokens=request["max_new_tokens"],
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: list[dict[str, Any]] = [{}] * len(prompts)
    for start in range(0, len(order), request["batch_size"]):
        progress(step, start / len(order))
        part = order[start : start + request["batch_size"]]
        longest = len(prompts[part[0]])
        ids = torch.full((len(part), longest), tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(part):
            own = prompts[index]
            ids[row, longest - len(own) :] = torch.tensor(own)
            mask[row, longest - len(own) :] = 1
        sampling = SeededSampling(request["temperature"], [generator_for(request["seed"], i) for i in part])
        with torch.no_grad():
            output = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                logits_processor=transformers.LogitsProcessorList([sampling] if request["temperature"] else []),
            )
        for index, new in zip(part, output[:, longest:].tolist(), strict=True):
            end = next((place for place, token in enumerate(new) if token in ends), None)
            text = tokenizer.decode(new[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            answers[index] = {"text": text, "tokens": len(new[:end]), "stopped": end is not None}
    return answers


def work(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    module = open_clone(request["clone"])
    if request["prompts"] is None:
        progress("reading the prompts", 0)
        try:
            request["prompts"] = first_prompts(module, request["rows"])
        except Exception as error:  # `datasets` raises many kinds
            raise Problem("data", innermost(error)) from error
    answers = []
    for weights in request["models"]:
        progress(f"loading {weights['label']}", 0)
        tokenizer = load_tokenizer(weights)
        model, _ = load_model(weights)
        require_fitting(tokenizer, weights, model)
        prompts = tokenize(module, weights, tokenizer, model, request)
        answers.append(generate(model, tokenizer, prompts, request, progress, f"answers of {weights['label']}"))
        del model
        release()
    return {"prompts": request["prompts"], "answers": answers}


if __name__ == "__main__":
    answer(work)

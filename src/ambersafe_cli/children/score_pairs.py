"""Score preference pairs with one model or two: `python score_pairs.py`, the request on stdin; see answering.py.

Runs under the training interpreter. Pairs are read, ordered and tokenized by the clone's own preference_datasets.py;
the rows come from where SAFERLHF_DATASET says.

The request: clone (its folder), datasets (upstream's names), split, limit (of pairs, or null), texts (whether to answer
with them), batch_size (pairs at a time), policy and reference (see load_policy.Weights; reference may be null),
settings (max_length, max_prompt_length, keep_eos, drop_eos, shuffle_pairs, template, as in the run's config), and
evaluation, which examples upstream's own evaluation was on, or null: stage (sft or dpo), n_examples, batch_size,
processes.

The answer: pairs, each with prompt (a number), categories, tokens, policy and reference (or null), each of these three
for the chosen and the rejected response: tokens counts those of the response, EOS included, and the others are
log-probabilities of the response in nats, summed over its tokens; with texts also prompt_text, chosen and rejected.
left_out: how many pairs were left out for holding the EOS. evaluation: null, or stage, step and metrics of the
policy's checkpoint and its examples: for each the policy's log-probabilities of chosen and rejected and those of the
reference, in DPO, or that of the target alone, in SFT.
"""

import inspect
import itertools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

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

Tokens = tuple[int, bytes]
"""How many of its tokens are the prompt's, and the tokens of prompt and response, as 4 bytes each."""

Texts = tuple[str, ...]
"""A prompt, its chosen and its rejected response, as rendered."""


def tokens_of(batch: dict[str, Any], side: str) -> list[Tokens]:
    """The sequences of one side, chosen or rejected, of upstream's batch, without its padding."""
    found = []
    for ids, mask, labels in zip(
        batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_labels"], strict=True
    ):
        length = int(mask.sum())
        prompt = int((labels[:length] == -100).sum())
        found.append((prompt, ids[:length].numpy().astype("<i4").tobytes()))
    return found


def batches(module: Any, request: dict[str, Any], tokenizer: Any, **given: Any) -> Iterator[dict[str, Any]]:
    """Upstream's batches with these settings, as far as the clone knows them."""
    settings = {**request["settings"], **given}
    known = inspect.signature(module.get_batch_iterator).parameters
    unknown = [key for key, value in settings.items() if key not in known and value and key not in given]
    if unknown:
        raise Problem("clone", f"{request['clone']} lacks the patch that adds {', '.join(unknown)}.")
    settings = {key: value for key, value in settings.items() if key in known}
    found: Iterator[dict[str, Any]] = module.get_batch_iterator(
        names=request["datasets"], tokenizer=tokenizer, split=request["split"], shuffle=True, silent=True, **settings
    )
    return found


def read_pairs(module: Any, request: dict[str, Any], tokenizer: Any) -> tuple[list[tuple[Texts, Tokens, Tokens]], int]:
    """The pairs in the order of upstream's evaluation, and how many are left out.

    One by one, so that none is dropped at the end, and without those that hold the EOS, on which training would stop.
    """
    known = inspect.signature(module.get_batch_iterator).parameters
    names, split = request["datasets"], request["split"]
    total = sum(len(e["pairs"]) for n in names for e in module.get_dataset(n, split, silent=True).values())
    drop = {"drop_eos": True} if "drop_eos" in known else {}
    found: list[tuple[Texts, Tokens, Tokens]] = []
    for batch in itertools.islice(
        batches(module, request, tokenizer, batch_size=1, n_epochs=1, **drop), request["limit"]
    ):
        texts = (batch["prompt"][0], batch["chosen_response_only"][0], batch["rejected_response_only"][0])
        (chosen,), (rejected,) = tokens_of(batch, "chosen"), tokens_of(batch, "rejected")
        found.append((texts, chosen, rejected))
    return found, 0 if request["limit"] else total - len(found)


def read_evaluation(module: Any, request: dict[str, Any], tokenizer: Any) -> list[tuple[Tokens, ...]]:
    """The examples of upstream's own evaluation, one of them as often as it is in it.

    Of each batch every process takes an equal part, and the rest is left away (utils.py,
    slice_and_move_batch_for_device).
    """
    wanted = request["evaluation"]
    sft = wanted["stage"] == "sft"
    found: list[tuple[Tokens, ...]] = []
    given = {"batch_size": wanted["batch_size"], "n_examples": wanted["n_examples"], "sft_mode": sft}
    for batch in batches(module, request, tokenizer, **given):
        sides = [tokens_of(batch, side) for side in (("chosen",) if sft else ("chosen", "rejected"))]
        examples = list(zip(*sides, strict=True))
        found += examples[: len(examples) // wanted["processes"] * wanted["processes"]]
    return found


def require_split(module: Any, request: dict[str, Any]) -> None:
    """Raise ValueError for a split that would be taken for another one: data without splits is divided into two."""
    if request["split"] in ("train", "test") or "saferlhf" not in request["datasets"]:
        return
    source = os.environ.get("SAFERLHF_DATASET") or module.SAFERLHF
    if set(module.open_saferlhf(source, os.environ.get("SAFERLHF_REVISION") or None, None)) == {"train"}:
        raise ValueError(f"{source} is divided into train and test, there is no split {request['split']}")


def read_categories(module: Any, request: dict[str, Any], tokenizer: Any) -> dict[Texts, list[str]]:
    """The harm categories of the unsafe response of each pair, where the rows have them."""
    if "saferlhf" not in request["datasets"]:
        return {}
    source = os.environ.get("SAFERLHF_DATASET") or module.SAFERLHF
    splits = module.open_saferlhf(source, os.environ.get("SAFERLHF_REVISION") or None, None)
    rows = splits["train" if set(splits) == {"train"} else request["split"]]
    columns = ["response_0_harm_category", "response_1_harm_category"]
    if not set(columns) <= set(rows.column_names):
        return {}
    found: dict[Texts, list[str]] = {}
    for row in rows.select_columns([*module.SAFERLHF_COLUMNS, *columns]):
        if row["is_response_0_safe"] != row["is_response_1_safe"]:
            safe, unsafe = (0, 1) if row["is_response_0_safe"] else (1, 0)
            responses = [row[f"response_{safe}"], row[f"response_{unsafe}"]]
            key = render(module, request["settings"].get("template"), tokenizer, row["prompt"], responses)
            named = row[columns[unsafe]]
            names = [name for name, holds in named.items() if holds] if isinstance(named, dict) else []
            found[key] = sorted({*found.get(key, []), *names})
    return found


def score(
    model: Any, sequences: list[Tokens], batch_size: int, pad: int, progress: Progress, step: str
) -> dict[Tokens, float]:
    """The log-probability of each response, in nats, summed over its tokens, as trainers.py has it, _get_batch_logps.

    The longest come first, so that memory is short at once or never, and those of a batch are about as long.
    """
    longest_first = sorted(sequences, key=lambda sequence: -len(sequence[1]))
    device = model.device
    scores: dict[Tokens, float] = {}
    for start in range(0, len(longest_first), batch_size):
        progress(step, start / len(longest_first))
        part = longest_first[start : start + batch_size]
        arrays = [np.frombuffer(ids, dtype="<i4") for _, ids in part]
        ids = torch.full((len(part), len(arrays[0])), pad, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, ((prompt, _), array) in enumerate(zip(part, arrays, strict=True)):
            ids[row, : len(array)] = torch.from_numpy(array.astype("int64"))
            mask[row, : len(array)] = 1
            labels[row, prompt : len(array)] = ids[row, prompt : len(array)]
        ids, mask, labels = ids.to(device), mask.to(device), labels[:, 1:].to(device)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1].to(torch.float32)
            counts = labels != -100
            logps = torch.gather(logits.log_softmax(-1), 2, labels.masked_fill(~counts, 0).unsqueeze(2)).squeeze(2)
        scores.update(zip(part, (logps * counts).sum(-1).tolist(), strict=True))
        del logits, logps
    return scores


def require_same_tokens(policy: Weights, reference: Weights, tokenizer: Any) -> None:
    """Raise Problem if the two models read texts as different tokens: their log-probabilities would not compare."""
    own = ("tokenizer", "tokenizer_revision")
    if [policy[key] for key in own] != [reference[key] for key in own]:
        other = load_tokenizer(reference)
        if (other.get_vocab(), other.eos_token_id) != (tokenizer.get_vocab(), tokenizer.eos_token_id):
            raise Problem(
                "usage",
                f"{reference['label']} has another tokenizer ({reference['tokenizer']}) than {policy['label']} "
                f"({policy['tokenizer']}): no reward can be had from the two.",
            )


def work(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    module = open_clone(request["clone"])
    policy, reference = request["policy"], request["reference"]
    tokenizer = load_tokenizer(policy)
    if reference:
        require_same_tokens(policy, reference, tokenizer)
    render(module, request["settings"]["template"], tokenizer, "a prompt", [])  # whether it can be, before it has to be
    progress("reading the pairs", 0)
    try:
        require_split(module, request)
        pairs, left_out = read_pairs(module, request, tokenizer)
        categories = read_categories(module, request, tokenizer)
    except Problem:
        raise
    except Exception as error:  # `datasets` raises many kinds; upstream's own code asserts
        raise Problem("data", innermost(error)) from error
    evaluation: list[tuple[Tokens, ...]] = []
    sequences = {side for _, *sides in pairs for side in sides}
    wanted = request["evaluation"]
    if wanted and len({texts[0] for texts, *_ in pairs} if wanted["stage"] == "sft" else pairs) >= wanted["batch_size"]:
        try:
            evaluation = read_evaluation(module, request, tokenizer)
        except (AssertionError, ValueError):  # it stops as training would, on a text that holds the EOS
            evaluation = []
        sequences |= {side for example in evaluation for side in example}

    scores: list[dict[Tokens, float]] = []
    saved: dict[str, Any] = {}
    for weights in [policy, *([reference] if reference else [])]:
        progress(f"loading {weights['label']}", 0)
        model, held = load_model(weights)
        saved = saved or held
        require_fitting(tokenizer, weights, model)
        step = f"scoring with {weights['label']}"
        scores.append(score(model, list(sequences), 2 * request["batch_size"], tokenizer.pad_token_id, progress, step))
        del model
        release()

    def of(examples: tuple[Tokens, ...]) -> list[list[float]]:
        return [[by_model[side] for side in examples] for by_model in scores]

    numbers: dict[str, int] = {}
    answers = []
    for texts, chosen, rejected in pairs:
        found = of((chosen, rejected))
        answers.append(
            {
                "prompt": numbers.setdefault(texts[0], len(numbers)),
                "categories": categories.get(texts, []),
                "tokens": [len(ids) // 4 - prompt for prompt, ids in (chosen, rejected)],
                "policy": found[0],
                "reference": found[1] if reference else None,
                **(dict(zip(("prompt_text", "chosen", "rejected"), texts)) if request["texts"] else {}),
            }
        )
    return {
        "pairs": answers,
        "left_out": left_out,
        "evaluation": {
            "stage": wanted["stage"],
            "step": saved.get("step_idx"),
            "metrics": saved.get("metrics") or {},
            "examples": [[value for by_model in of(example) for value in by_model] for example in evaluation],
        }
        if evaluation
        else None,
    }


if __name__ == "__main__":
    answer(work)

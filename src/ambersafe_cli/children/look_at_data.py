"""Count a run's rows and measure them with its tokenizer: `python look_at_data.py REQUEST.json-text`, JSON on stdout.

Runs under the training interpreter. The request: saferlhf and templates (the paths of saferlhf.py and templates.py),
template (or null), tokenizer (a folder, or a name on the hub; without one only fingerprints are taken), revision, stage
(an example is a prompt and its target in sft, a pair in dpo), max_length, max_prompt_length, keep_eos, drop_eos,
batch_size, sample (how many examples to tokenize). The rows come from where SAFERLHF_DATASET says. The EOS is looked
for in the texts as they stand, lengths are of rendered ones. The answer: for each split its counts and fingerprint; if
the template cannot be applied `not_rendered`, why; or only `error`, what `datasets` or the tokenizer said.
"""

import hashlib
import json
import os
import random
import runpy
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def load_module(path: str) -> Any:
    return types.SimpleNamespace(**runpy.run_path(path))


@dataclass(frozen=True)
class MeasuringTokenizer:
    """The EOS string, a function that counts each text's tokens as upstream does, without special ones, and the whole
    tokenizer of transformers where that was opened."""

    eos: str | None
    lengths: Callable[[list[str]], list[int]]
    whole: Any = None


def open_tokenizer(name: str, revision: str | None, template: str | None = None) -> MeasuringTokenizer:
    """Open a tokenizer; one that has a tokenizer.json without transformers, which takes seconds to import, unless its
    chat template is needed."""
    if template == "chat":
        return open_whole_tokenizer(name, revision)
    import huggingface_hub

    def file(filename: str) -> str:
        if os.path.isdir(name):
            return os.path.join(name, filename)
        return str(huggingface_hub.hf_hub_download(name, filename, revision=revision))

    try:
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(file("tokenizer.json"))
        with open(file("tokenizer_config.json"), encoding="utf-8") as config:
            eos = json.load(config).get("eos_token")
        return MeasuringTokenizer(
            eos["content"] if isinstance(eos, dict) else eos,
            lambda texts: [len(encoded.ids) for encoded in fast.encode_batch(texts, add_special_tokens=False)],
        )
    except Exception:  # an older model: only transformers can build its tokenizer, or say what is wrong with it
        return open_whole_tokenizer(name, revision)


def open_whole_tokenizer(name: str, revision: str | None) -> MeasuringTokenizer:
    import transformers

    whole: Any = transformers.AutoTokenizer.from_pretrained(name, revision=revision or "main")
    return MeasuringTokenizer(
        whole.eos_token,
        lambda texts: [len(ids) for ids in whole(texts, add_special_tokens=False)["input_ids"]],
        whole,
    )


def fingerprint(table: Any) -> str:
    """SHA-256 of the rows of a table of texts (large_string) and truth values without nulls, on whole Arrow buffers.

    It is over each column in turn: its name, the number of rows, then the length of each text in bytes (64 bits, little
    end first) and all texts, or a byte for each truth value. So equal rows in the same order have equal ones, however
    they are stored, cut into chunks or sliced.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    digest = hashlib.sha256()
    for name in table.column_names:
        digest.update(f"{name}\0{table.num_rows}\0".encode())
        chunks = [chunk for chunk in table[name].chunks if len(chunk)]
        if table.schema.field(name).type == pa.bool_():
            for chunk in chunks:
                digest.update(pc.cast(chunk, pa.uint8()).to_numpy())
            continue
        for chunk in chunks:
            digest.update(pc.binary_length(chunk).to_numpy().astype("<i8"))
        for chunk in chunks:
            _, offsets, texts = chunk.buffers()
            first, last = np.frombuffer(offsets, dtype=np.int64)[[chunk.offset, chunk.offset + len(chunk)]]
            if last > first:
                digest.update(memoryview(texts)[first:last])
    return digest.hexdigest()


LONGEST = 200
"""How many of the longest texts, by characters, are tokenized to know the longest by tokens."""

Example = tuple[str, ...]
"""A prompt and its one response (SFT), or its chosen and its rejected one (DPO)."""


def examples_of(data: dict[str, Any], stage: str) -> list[Example]:
    """What a stage trains on, in upstream's order."""
    if stage == "sft":
        return [(prompt, entry["sft_target"]) for prompt, entry in data.items()]
    return [(p, d["responses"][a], d["responses"][b]) for p, d in data.items() for a, b in d["pairs"]]


def holds_eos(example: Example, eos: str | None) -> bool:
    return eos is not None and any(eos in text for text in example)


def cut_one(
    prompt: int, responses: list[int], max_length: int, max_prompt_length: int, keep_eos: bool
) -> tuple[int, list[int]]:
    """The tokens that upstream's truncation (tokenize_batch_element, at whichever end of the prompt) leaves of a prompt
    and its responses, whose EOS is counted in."""
    longest = max(responses)
    if prompt + longest > max_length:
        prompt = min(prompt, max(max_prompt_length, max_length - longest) if keep_eos else max_prompt_length)
    if prompt + longest > max_length:
        room = max_length - prompt if keep_eos else max_length - max_prompt_length
        responses = [min(response, room) for response in responses]
    return prompt, responses


def cut(lengths: list[tuple[int, ...]], max_length: int, max_prompt_length: int, keep_eos: bool) -> dict[str, int]:
    """Count what truncation takes from examples, of which `lengths` has the tokens of prompt and responses."""
    counts = {"prompts_cut": 0, "responses_cut": 0, "eos_lost": 0, "tokens_lost": 0, "empty": 0}
    with_keep_eos = 0
    padded = []
    longest_response = 0
    for prompt, *texts in lengths:
        responses = [text + 1 for text in texts]  # each with its EOS
        kept_prompt, kept = cut_one(prompt, responses, max_length, max_prompt_length, keep_eos)
        counts["prompts_cut"] += kept_prompt < prompt
        counts["responses_cut"] += kept != responses
        counts["eos_lost"] += 0 if keep_eos else sum(a < b for a, b in zip(kept, responses))
        counts["tokens_lost"] += prompt - kept_prompt + sum(responses) - sum(kept)
        counts["empty"] += not all(kept) or not kept_prompt
        padded.append(kept_prompt + max(kept))
        longest_response = max(longest_response, *kept)
        best_prompt, best = cut_one(prompt, responses, max_length, max_prompt_length, keep_eos=True)
        with_keep_eos += prompt - best_prompt + sum(responses) - sum(best)
    padded.sort()
    longest = {
        "tokens_median": padded[len(padded) // 2] if padded else 0,
        "tokens_mean": round(sum(padded) / len(padded)) if padded else 0,
        "tokens_longest": padded[-1] if padded else 0,
        "response_longest": longest_response,
    }
    return {"examples": len(lengths), **counts, "tokens_lost_with_keep_eos": with_keep_eos, **longest}


def prompts_a_batch(data: dict[str, Any], batch_size: int) -> int:
    """How many prompts a DPO batch holds (median) if prompts are shuffled and keep their pairs together."""
    pairs_of = [len(entry["pairs"]) for entry in data.values()]
    random.Random(0).shuffle(pairs_of)  # noqa: S311
    prompt_of_pair = [prompt for prompt, pairs in enumerate(pairs_of) for _ in range(pairs)]
    batches = [prompt_of_pair[i : i + batch_size] for i in range(0, len(prompt_of_pair), batch_size)]
    held = sorted(batch[-1] - batch[0] + 1 for batch in batches[:-1] or batches)
    return held[len(held) // 2] if held else 0


def look(request: dict[str, Any]) -> dict[str, Any]:
    saferlhf = load_module(request["saferlhf"])
    saferlhf.datasets.disable_progress_bars()
    if request.get("tokenizer") is None:
        tables = {split: saferlhf.load_saferlhf(split, silent=True) for split in ("train", "test")}
        return {"splits": {split: {"fingerprint": fingerprint(table)} for split, table in tables.items()}}
    tokenizer = open_tokenizer(request["tokenizer"], request["revision"], request["template"])
    answer: dict[str, Any] = {"eos": tokenizer.eos, "splits": {}}
    for split in ("train", "test"):
        table = saferlhf.load_saferlhf(split, silent=True)
        data = saferlhf.group_saferlhf_pairs(table)
        every = examples_of(data, request["stage"])
        clean = [example for example in every if not holds_eos(example, tokenizer.eos)]
        bad = next((example for example in every if holds_eos(example, tokenizer.eos)), None)
        examples = clean if request["drop_eos"] else every
        answer["splits"][split] = {
            "rows": table.num_rows,
            "fingerprint": fingerprint(table),
            "prompts": len(data),
            "pairs": sum(len(entry["pairs"]) for entry in data.values()),
            "examples": len(examples),
            "with_eos": len(every) - len(clean),
            "first_with_eos": bad[0] if bad else None,
            "alike": sum(len(set(example[1:])) < len(example) - 1 for example in examples),
            "prompts_a_batch": prompts_a_batch(data, request["batch_size"]),
        }
        if split == "train":
            chosen = choose(examples, request["sample"])
            try:
                chosen = render(chosen, tokenizer, request)
            except Exception as error:  # a chat template is a program of its own
                answer["not_rendered"] = str(error).rstrip(".") or type(error).__name__
            answer["splits"][split]["sampled"] = measure(chosen, tokenizer, request)
    return answer


def choose(examples: list[Example], number: int) -> tuple[list[Example], list[Example]]:
    """A sample of the examples, and the longest by characters among all of them."""
    sample = random.Random(0).sample(examples, min(len(examples), number))  # noqa: S311
    return sample, sorted(examples, key=lambda example: len(example[0]) + max(map(len, example[1:])))[-LONGEST:]


def render(
    chosen: tuple[list[Example], list[Example]], tokenizer: MeasuringTokenizer, request: dict[str, Any]
) -> tuple[list[Example], list[Example]]:
    """The same in the form that training gives them. Raises whatever a chat template does."""
    templates = load_module(request["templates"])

    def rendered(example: Example) -> Example:
        prompt, responses = templates.render_template(
            example[0], list(example[1:]), request["template"], tokenizer.whole
        )
        return (prompt, *responses)

    sample, longest = ([rendered(example) for example in examples] for examples in chosen)
    return sample, longest


def measure(
    chosen: tuple[list[Example], list[Example]], tokenizer: MeasuringTokenizer, request: dict[str, Any]
) -> dict[str, int]:
    """What truncation takes from a sample of the examples; the longest, that memory has to do for, is among them or
    among those that were the longest by characters."""
    sample, longest = chosen
    columns = [tokenizer.lengths(list(texts)) for texts in zip(*sample, *longest)]
    lengths = list(zip(*columns))
    limits = request["max_length"], request["max_prompt_length"], request["keep_eos"]
    longest_ones = cut(lengths, *limits)
    return cut(lengths[: len(sample)], *limits) | {
        key: longest_ones[key] for key in ("tokens_longest", "response_longest")
    }


def main() -> None:
    try:
        answer = look(json.loads(sys.argv[1]))
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        answer = {"error": str(cause) or type(cause).__name__}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

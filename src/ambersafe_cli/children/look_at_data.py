"""Count a run's rows and measure them with its tokenizer: `python look_at_data.py REQUEST.json-text`, JSON on stdout.

Runs under the training interpreter. The request: saferlhf (the path of saferlhf.py), tokenizer (a folder, or a name on
the hub), revision, max_length, max_prompt_length, sample (how many pairs to tokenize). The rows come from where
SAFERLHF_DATASET says. The answer: for each split its counts and fingerprint; or `error`, and what `datasets` or the
tokenizer said.
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


def load_saferlhf_module(path: str) -> Any:
    return types.SimpleNamespace(**runpy.run_path(path))


@dataclass(frozen=True)
class MeasuringTokenizer:
    """The EOS string, and a function that counts each text's tokens as upstream does, without special ones."""

    eos: str | None
    lengths: Callable[[list[str]], list[int]]


def open_tokenizer(name: str, revision: str | None) -> MeasuringTokenizer:
    """Open a tokenizer; one that has a tokenizer.json without transformers, which takes seconds to import."""
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
        import transformers

        slow: Any = transformers.AutoTokenizer.from_pretrained(name, revision=revision or "main")
        return MeasuringTokenizer(
            slow.eos_token,
            lambda texts: [len(ids) for ids in slow(texts, add_special_tokens=False)["input_ids"]],
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


def with_eos(table: Any, eos: str) -> tuple[int, str | None]:
    """How many of the rows that count hold the EOS string in a text that is used, and the first of their prompts."""
    import pyarrow.compute as pc

    kept = table.filter(pc.xor(table["is_response_0_safe"], table["is_response_1_safe"]))
    found = None
    for column in ("prompt", "response_0", "response_1"):
        here = pc.match_substring(kept[column], eos)
        found = here if found is None else pc.or_(found, here)
    rows = kept.filter(found)
    return rows.num_rows, rows["prompt"][0].as_py() if rows.num_rows else None


def cut(lengths: list[tuple[int, int, int]], max_length: int, max_prompt_length: int) -> dict[str, int]:
    """What upstream's truncation (tokenize_batch_element, keep_start) takes from these pairs."""
    counts = {"pairs": len(lengths), "prompts_cut": 0, "responses_cut": 0, "eos_lost": 0, "tokens_lost": 0, "empty": 0}
    padded = []
    for prompt, chosen, rejected in lengths:
        responses = [chosen + 1, rejected + 1]  # each with its EOS
        kept_prompt = prompt
        if prompt + max(responses) > max_length:
            kept_prompt = min(prompt, max_prompt_length)
        kept = responses
        if kept_prompt + max(responses) > max_length:
            kept = [len(range(r)[: max_length - max_prompt_length]) for r in responses]
        counts["prompts_cut"] += kept_prompt < prompt
        counts["responses_cut"] += kept != responses
        counts["eos_lost"] += sum(a < b for a, b in zip(kept, responses))
        counts["tokens_lost"] += prompt - kept_prompt + sum(responses) - sum(kept)
        counts["empty"] += not all(kept) or not kept_prompt
        padded.append(kept_prompt + max(kept))
    padded.sort()
    counts["tokens_median"] = padded[len(padded) // 2] if padded else 0
    counts["tokens_longest"] = padded[-1] if padded else 0
    return counts


def look(request: dict[str, Any]) -> dict[str, Any]:
    saferlhf = load_saferlhf_module(request["saferlhf"])
    saferlhf.datasets.disable_progress_bars()
    tokenizer = open_tokenizer(request["tokenizer"], request["revision"])
    answer: dict[str, Any] = {"eos": tokenizer.eos, "splits": {}}
    for split in ("train", "test"):
        table = saferlhf.load_saferlhf(split, silent=True)
        data = saferlhf.group_saferlhf_pairs(table)
        n_eos, example = with_eos(table, tokenizer.eos) if tokenizer.eos else (0, None)
        pairs = [(p, d["responses"][a], d["responses"][b]) for p, d in data.items() for a, b in d["pairs"]]
        sample = random.Random(0).sample(pairs, min(len(pairs), request["sample"]))  # noqa: S311
        columns = [tokenizer.lengths([pair[i] for pair in sample]) for i in range(3)] if sample else [[], [], []]
        answer["splits"][split] = {
            "rows": table.num_rows,
            "sft": len(data),
            "dpo": len(pairs),
            "fingerprint": fingerprint(table),
            "rows_with_eos": n_eos,
            "first_with_eos": example,
            "sampled": cut(list(zip(*columns)), request["max_length"], request["max_prompt_length"]),
        }
    return answer


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

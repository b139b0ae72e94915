"""A model, a tokenizer and preference rows to measure training with: LLaMA shapes of random weights, made-up words.

    python scripts/training_inputs.py FOLDER SIZE PAIRS [SEED]

Runs under an interpreter that has torch and transformers. In FOLDER: `model`, a Hugging Face folder; `policy.pt`, the
same weights as a checkpoint of upstream; `rows`, with train.jsonl and test.jsonl.
"""

import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    inner: int
    vocabulary: int


SHAPES = {"7M": Shape(256, 4, 4, 688, 8192), "60M": Shape(512, 8, 8, 1376, 32000)}

# Like PKU-SafeRLHF's: medians in tokens, and sigmas of log-normals; 0.668 puts the 95th percentile at 3 medians.
PROMPT, RESPONSE, LONGEST = (15, 0.5), (55, 0.668), 500
HELD_OUT = 64
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")


def length(rng: random.Random, median: int, sigma: float) -> int:
    """A number of tokens, from 1 to LONGEST."""
    return max(1, min(LONGEST, round(rng.lognormvariate(math.log(median), sigma))))


def rows(count: int, words: list[str], seed: int) -> Iterator[dict[str, Any]]:
    """Preference rows of words that are a token each. All prompts differ, so SFT and DPO see as many examples."""
    rng = random.Random(seed)  # noqa: S311
    for number in range(count):
        texts = [" ".join(rng.choices(words, k=length(rng, *what))) for what in (PROMPT, RESPONSE, RESPONSE)]
        own = f"{words[number % len(words)]} {words[number // len(words)]}"
        safe = rng.random() < 0.5
        yield {
            "prompt": f"{own} {texts[0]}",
            "response_0": texts[1],
            "response_1": texts[2],
            "is_response_0_safe": safe,
            "is_response_1_safe": not safe,
        }


def write(path: Path, every: Iterator[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in every))


def main(folder: Path, size: str, pairs: int, seed: int) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    shape = SHAPES[size]
    words = [f"w{number}" for number in range(shape.vocabulary - len(SPECIAL))]
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    words_alone = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    words_alone.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unknown, begin, end, padding = SPECIAL
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_alone, unk_token=unknown, bos_token=begin, eos_token=end, pad_token=padding
    )
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        intermediate_size=shape.inner, vocab_size=shape.vocabulary, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    (folder / "rows").mkdir(parents=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    torch.save({"step_idx": 0, "state": model.state_dict(), "metrics": {}}, folder / "policy.pt")
    write(folder / "rows" / "train.jsonl", rows(pairs, words, seed))
    write(folder / "rows" / "test.jsonl", rows(HELD_OUT, words, seed + 1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]) if sys.argv[4:] else 0)

"""Preference rows of random words, and a LLaMA with random weights for them: what `bench_train.py` trains on.

    python scripts/bench_data.py FOLDER SIZE      # the model alone; needs torch and transformers

Each word is one token, so that lengths are known without a tokenizer. Everything is seeded.
"""

import json
import math
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

SEED = 0
MAX_LENGTH = 512
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
TEST_ROWS = 8


@dataclass(frozen=True)
class Shape:
    """A LLaMA's sizes."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        of_layer = 4 * self.hidden**2 + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * of_layer + (2 * self.vocabulary + 1) * self.hidden

    def operations(self, tokens: float, length: float) -> float:
        """Floating-point operations of training on so many tokens of sequences of that length on average.

        Forward and backward pass, 6 for each parameter but the input embedding's, and 12 for each token that a token
        can see, halved as it sees those before it only (PaLM, appendix B, https://arxiv.org/abs/2204.02311).
        """
        return tokens * (6 * (self.parameters - self.vocabulary * self.hidden) + 6 * self.layers * self.hidden * length)


SHAPES = {
    "7M": Shape(256, 4, 4, 688, 8192),
    "60M": Shape(512, 8, 8, 1376, 32000),
    # For a GPU. The last one is AmberChat's.
    "160M": Shape(768, 12, 12, 3072, 32000),
    "1.4B": Shape(2048, 24, 16, 5504, 32000),
    "6.7B": Shape(4096, 32, 32, 11008, 32000),
}


@dataclass(frozen=True)
class Lengths:
    """A log-normal distribution of lengths in words, and the bounds that it is clipped to."""

    median: float
    percentile_95: float
    lowest: int
    highest: int


PROMPTS = Lengths(median=15, percentile_95=40, lowest=4, highest=100)
RESPONSES = Lengths(median=55, percentile_95=165, lowest=1, highest=500)


@dataclass(frozen=True)
class Row:
    """One pair: a prompt and two responses, each a number of words; the chosen one comes first or second."""

    prompt: list[str]
    chosen: list[str]
    rejected: list[str]
    chosen_is_first: bool

    @property
    def sft_tokens(self) -> int:
        """Tokens of the chosen sequence, its EOS included."""
        return len(self.prompt) + len(self.chosen) + 1

    @property
    def dpo_tokens(self) -> int:
        """Tokens of both sequences, their EOS included."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected) + 2


def draw_length(lengths: Lengths, source: random.Random) -> int:
    sigma = math.log(lengths.percentile_95 / lengths.median) / statistics.NormalDist().inv_cdf(0.95)
    drawn = round(source.lognormvariate(math.log(lengths.median), sigma))
    return min(lengths.highest, max(lengths.lowest, drawn))


def make_rows(number: int, shape: Shape, seed: int) -> list[Row]:
    """So many rows, no two with the same prompt, none of which has to be cut to MAX_LENGTH tokens.

    The first rows of a larger number are those of a smaller one.
    """
    source = random.Random(seed)  # noqa: S311
    words = [f"w{index}" for index in range(shape.vocabulary - len(SPECIAL_TOKENS))]
    seen: set[tuple[str, ...]] = set()
    rows: list[Row] = []
    while len(rows) < number:
        prompt = source.choices(words, k=draw_length(PROMPTS, source))
        most = MAX_LENGTH - 1 - len(prompt)
        chosen, rejected = (source.choices(words, k=min(most, draw_length(RESPONSES, source))) for _ in range(2))
        chosen_is_first = source.random() < 0.5
        if tuple(prompt) not in seen:
            seen.add(tuple(prompt))
            rows.append(Row(prompt, chosen, rejected, chosen_is_first))
    return rows


def write_rows(rows: list[Row], path: Path) -> None:
    """Write them with the columns of PKU-SafeRLHF, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            # The space between prompt and response belongs to the response: the prompt's tokens stay as they are.
            chosen, rejected = " " + " ".join(row.chosen), " " + " ".join(row.rejected)
            columns = {
                "prompt": " ".join(row.prompt),
                "response_0": chosen if row.chosen_is_first else rejected,
                "response_1": rejected if row.chosen_is_first else chosen,
                "is_response_0_safe": row.chosen_is_first,
                "is_response_1_safe": not row.chosen_is_first,
            }
            file.write(json.dumps(columns) + "\n")


def write_data(folder: Path, number: int, shape: Shape) -> list[Row]:
    """Write `number` rows to train on and TEST_ROWS others into a folder, and return those to train on."""
    folder.mkdir(parents=True)
    rows = make_rows(number, shape, SEED)
    write_rows(rows, folder / "train.jsonl")
    write_rows(make_rows(TEST_ROWS, shape, SEED + 1), folder / "test.jsonl")
    return rows


def build_model(folder: Path, shape: Shape) -> None:
    """Save a float32 model with its tokenizer in `folder/model`, and the same weights as `folder/policy.pt`."""
    import tokenizers
    import torch
    import transformers

    names = [*SPECIAL_TOKENS, *(f"w{index}" for index in range(shape.vocabulary - len(SPECIAL_TOKENS)))]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[0]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    unk, bos, eos, pad = SPECIAL_TOKENS
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad
    )
    fast.save_pretrained(folder / "model")
    torch.manual_seed(SEED)
    # Weights of that many parameters are made on the GPU, and kept in 16 bits, as they are published.
    is_large = shape.parameters > 10**9
    torch.set_default_device("cuda" if is_large and torch.cuda.is_available() else "cpu")
    torch.set_default_dtype(torch.bfloat16 if is_large else torch.float32)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=vocabulary[bos],
        eos_token_id=vocabulary[eos],
        pad_token_id=vocabulary[pad],
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    torch.save({"step_idx": 0, "state": model.state_dict(), "metrics": {}}, folder / "policy.pt")
    print(f"{sum(weights.numel() for weights in model.parameters())} parameters")


if __name__ == "__main__":
    build_model(Path(sys.argv[1]), SHAPES[sys.argv[2]])

"""Build a tiny Llama with a tokenizer of its own: `python tiny_model.py FOLDER TEXTS.jsonl`, nothing is downloaded.

Runs under the training interpreter. The folder appears when it is whole. The same texts and versions give the same
weights: everything is seeded.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 1024


def build_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which has a token for every text, on these."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def build_model(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.LlamaForCausalLM:
    """Make a Llama of about half a million parameters with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def main(folder: str, texts_file: str) -> None:
    with Path(texts_file).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [row[column] for row in rows for column in ("prompt", "response_0", "response_1")]
    tokenizer = build_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    build_model(tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])

#!/usr/bin/env python3
"""How long preflight takes on 330,000 rows, the size of the data that AmberSafe was trained on.

    scripts/bench_preflight.py [--rows 330000] [--repeat 5] [--clone DIR]

Rows are made up, with lengths like PKU-SafeRLHF's and five rows to a prompt; the tokenizer is a byte-level BPE of
32,000 tokens that is trained on some of them. `ambersafe check sft` is timed whole, once with a cold cache of
`datasets` (it converts the file) and then warm, beside a bare reading of the rows.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_overhead import AMBERSAFE, prepare

from ambersafe_cli import saferlhf


def write_rows(path: Path, count: int, words: list[str], seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311
    texts = [" ".join(rng.choices(words, k=200)) for _ in range(2000)]

    def text(median: float, sigma: float) -> str:
        """A slice of ready-made text, by a log-normal number of words."""
        start = rng.randrange(100)
        length = max(1, round(rng.lognormvariate(0, sigma) * median))
        return " ".join(rng.choice(texts).split(" ", start + length)[start : start + length])

    with path.open("w") as file:
        prompt = ""
        for number in range(count):
            prompt = prompt if number % 5 else f"{text(11, 0.5)} {number}"
            row = {"prompt": prompt, "response_0": text(42, 0.65), "response_1": text(42, 0.65)}
            safe = rng.random() < 0.9, rng.random() < 0.1
            file.write(json.dumps({**row, "is_response_0_safe": safe[0], "is_response_1_safe": safe[1]}) + "\n")


def real_tokenizer(folder: Path, rows: Path) -> None:
    """Put a tokenizer of the size of a real one into the model's folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=special, show_progress=False)
    with rows.open() as file:
        tokenizer.train_from_iterator((json.loads(line)["response_0"] for line in file), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def timed(command: list[str], env: dict[str, str], work: Path, expected: int = 0) -> float:
    begun = time.perf_counter()
    done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True)
    if done.returncode != expected:
        raise SystemExit(done.stdout + done.stderr)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=330_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--clone", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        clone = prepare(work, given.clone)
        model, rows = work / "model", work / "rows"
        rows.mkdir()
        rng = random.Random(0)  # noqa: S311
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        words = ["".join(rng.choices(letters, k=rng.randrange(2, 9))) for _ in range(30_000)]
        write_rows(rows / "train.jsonl", given.rows, words, 1)
        write_rows(rows / "test.jsonl", given.rows // 10, words, 2)
        real_tokenizer(model, rows / "test.jsonl")
        env = {**os.environ, "HF_HOME": str(work / "cache"), "SAFERLHF_DATASET": str(rows)}
        check = [*AMBERSAFE, "check", "sft", "--recipe", "tiny", "--dir", str(clone), "--model", str(model)]
        check += ["--data", str(rows)]
        code = "import runpy; m = runpy.run_path({!r}); [m['load_saferlhf'](s, True) for s in ('train', 'test')]"
        read = [sys.executable, "-c", code.format(saferlhf.__file__)]
        print(f"cold cache {timed(check, env, work):6.1f} s: {given.rows:,} + {given.rows // 10:,} rows are converted")
        pairs = [(timed(read, env, work), timed(check, env, work)) for _ in range(given.repeat)]
        warm = [check for _, check in pairs]
        beyond = [check - read for read, check in pairs]
        print(f"check      {statistics.median(warm):6.1f} s (median), {min(warm):.1f} to {max(warm):.1f}")
        print(f"beyond reading the rows {statistics.median(beyond):4.1f} s (median)")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Time get_saferlhf's dict against the row-by-row way, on made-up rows, in turn; they must be equal.

    python scripts/bench_saferlhf.py [--rows 300000] [--repeat 5]

Row by row is what one writes first: a lambda as filter, then a loop. Both read the same Arrow file, which the system
has in its cache. Prints the medians and the median of the ratios, and ends with 1 if the dicts differ.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from typing import Any

import datasets

from ambersafe_cli.saferlhf import group_saferlhf_pairs, select_saferlhf_columns


def make_rows(n: int) -> datasets.Dataset:
    """Rows of which a prompt has five on average and some have many, as in revision v0 of PKU-SafeRLHF."""
    rng = random.Random(0)  # noqa: S311
    words = [f"word{i}" for i in range(5000)]

    def text(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    prompts = [text(12) for _ in range(max(1, n // 5))]
    weights = [1 / (1 + i % 50) for i in range(len(prompts))]
    return datasets.Dataset.from_dict(
        {
            "prompt": rng.choices(prompts, weights, k=n),
            "response_0": [text(40) for _ in range(n)],
            "response_1": [text(40) for _ in range(n)],
            "is_response_0_safe": [rng.random() < 0.5 for _ in range(n)],
            "is_response_1_safe": [rng.random() < 0.5 for _ in range(n)],
        }
    )


def row_by_row(dataset: datasets.Dataset) -> dict[str, dict[str, Any]]:
    kept = dataset.filter(lambda r: r["is_response_0_safe"] != r["is_response_1_safe"], load_from_cache_file=False)
    data: dict[str, dict[str, Any]] = defaultdict(lambda: {"responses": [], "pairs": []})
    for row in kept:
        safe, other = (0, 1) if row["is_response_0_safe"] else (1, 0)
        entry = data[row["prompt"]]
        n = len(entry["responses"])
        entry["responses"] += [row[f"response_{safe}"], row[f"response_{other}"]]
        entry["pairs"].append((n, n + 1))
        entry["sft_target"] = row[f"response_{safe}"]
    return data


def by_column(dataset: datasets.Dataset) -> dict[str, dict[str, Any]]:
    return group_saferlhf_pairs(select_saferlhf_columns(dataset, "made up"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        make_rows(arguments.rows).save_to_disk(folder)
        dataset = datasets.load_from_disk(folder)
        if by_column(dataset) != row_by_row(dataset):
            print("the dicts differ")
            return 1
        seconds: dict[str, list[float]] = {"row by row": [], "by column": []}
        for _ in range(arguments.repeat):
            for name, build in (("row by row", row_by_row), ("by column", by_column)):
                start = time.perf_counter()
                build(dataset)
                seconds[name].append(time.perf_counter() - start)
    ratios = [slow / fast for slow, fast in zip(*seconds.values(), strict=True)]
    for name, figures in seconds.items():
        print(f"{name}: median {statistics.median(figures):.2f} s")
    print(f"ratio: median {statistics.median(ratios):.1f}, from {min(ratios):.1f} to {max(ratios):.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

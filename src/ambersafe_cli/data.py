"""What preference data holds: the figures of `ambersafe data`, counted by the code that trains on it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ambersafe_cli import odd_rows
from ambersafe_cli.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

PERCENTILES = {"p50": 50, "p95": 95, "longest": 100}


@dataclass(frozen=True)
class SplitSummary:
    """Counts of one split. `lengths` maps prompt, chosen and rejected to their 50th, 95th and 100th percentile in
    characters, over the kept rows."""

    rows: int
    kept: int
    both_safe: int
    both_unsafe: int
    prompts: int
    sft_examples: int
    pairs: int
    lengths: Mapping[str, Mapping[str, int]]


def summarize(source: str, revision: str | None) -> dict[str, SplitSummary]:
    """Load both splits as get_saferlhf does and count them.

    Raises DataError, naming the file, column or split, for what training could not read or would find empty.
    """
    import datasets

    from ambersafe_cli.saferlhf import group_saferlhf_pairs, load_saferlhf

    datasets.disable_progress_bars()
    os.environ.update(SAFERLHF_DATASET=source, SAFERLHF_REVISION=revision or "")
    summaries = {}
    for split in ("train", "test"):
        try:
            table = load_saferlhf(split, silent=True)
        except Exception as error:  # `datasets` raises many kinds: of the hub, of pyarrow, of pandas, its own
            said = _innermost(error)
            said = said if source in said else f"Cannot read {source}: {said}"
            raise DataError(odd_rows.explain(source, said), _hint(error)) from error
        summaries[split] = _summarize(table, group_saferlhf_pairs(table))
        if not summaries[split].pairs:
            rows = f"of {table.num_rows} rows none has exactly one safe response" if table.num_rows else "no rows"
            raise DataError(
                f"{source} ({split} split): {rows}.",
                "A row counts if one of is_response_0_safe and is_response_1_safe is true; whole prompts are held out.",
            )
    return summaries


def first_example() -> tuple[str, str]:
    """The prompt and the chosen response of the first pair to train on, of the data that was summarized last."""
    from ambersafe_cli.saferlhf import get_saferlhf

    prompt, entry = next(iter(get_saferlhf("train", silent=True).items()))
    return prompt, entry["responses"][0]


def _summarize(table: "pa.Table", data: Mapping[str, Mapping[str, list[str]]]) -> SplitSummary:
    import numpy as np
    import pyarrow.compute as pc

    pairs = sum(len(entry["pairs"]) for entry in data.values())
    both_safe = pc.sum(pc.and_(table["is_response_0_safe"], table["is_response_1_safe"])).as_py() or 0
    texts = {
        "prompt": [prompt for prompt, entry in data.items() for _ in entry["pairs"]],
        "chosen": [response for entry in data.values() for response in entry["responses"][0::2]],
        "rejected": [response for entry in data.values() for response in entry["responses"][1::2]],
    }
    lengths = {
        name: {
            label: int(np.percentile([len(text) for text in column], percentile, method="higher"))
            for label, percentile in PERCENTILES.items()
        }
        for name, column in texts.items()
        if column
    }
    return SplitSummary(
        rows=table.num_rows,
        kept=pairs,
        both_safe=both_safe,
        both_unsafe=table.num_rows - pairs - both_safe,
        prompts=len(data),
        sft_examples=len(data),
        pairs=pairs,
        lengths=lengths,
    )


def _innermost(error: BaseException) -> str:
    """What went wrong first: `datasets` wraps the error of a reader into one that says little."""
    while cause := error.__cause__:
        error = cause
    return f"{error}".strip() or ("it has no rows" if isinstance(error, StopIteration) else type(error).__name__)


def _hint(error: Exception) -> str:
    if isinstance(error, ValueError) and "column" in str(error):
        return "Needed: prompt, response_0, response_1 (texts), is_response_0_safe, is_response_1_safe (true or false)."
    if isinstance(error, ConnectionError | FileNotFoundError):
        return "No network, or no such dataset? --data takes the path of a local copy."
    return ""

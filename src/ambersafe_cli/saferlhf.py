"""PKU-SafeRLHF as upstream's `preference_datasets.py` wants it: the one source of patch 0001.

`scripts/export-patches` copies all of this but this docstring into upstream, so the code uses only what upstream's
environment has, keeps to functions whose names say saferlhf, and explains itself to a reader there.
"""

import glob
import hashlib
import os
import re
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SAFERLHF = "PKU-Alignment/PKU-SafeRLHF"
SAFERLHF_COLUMNS = {
    "prompt": "string",
    "response_0": "string",
    "response_1": "string",
    "is_response_0_safe": "bool",
    "is_response_1_safe": "bool",
}
SAFERLHF_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
SAFERLHF_TEST_PERCENT = 5


def open_saferlhf(source: str, revision: str | None, cache_dir: str | None) -> dict[str, datasets.Dataset]:
    """Open preference rows and return their splits by name.

    `source` is a file (.jsonl, .json, .parquet, .csv), a folder of such files, a folder written by `save_to_disk`,
    or the name of a dataset on the Hugging Face hub, of which `revision` is a branch, tag or commit.
    Raises ValueError for a file of another kind, and whatever `datasets` raises for what it cannot find or read.
    """
    if not os.path.exists(source):
        return open_saferlhf_on_hub(source, revision, cache_dir)
    if os.path.isfile(source):
        ending = os.path.splitext(source)[1].lower()
        if ending not in SAFERLHF_FILES:
            raise ValueError(f"{source}: a data file ends in {', '.join(SAFERLHF_FILES)}, not in '{ending}'")
        # Or pandas takes a response of "None" or "N/A" for one that is missing.
        options = {"keep_default_na": False} if ending == ".csv" else {}
        files = glob.escape(source)
        return dict(datasets.load_dataset(SAFERLHF_FILES[ending], data_files=files, cache_dir=cache_dir, **options))
    if {"dataset_dict.json", "state.json"} & set(os.listdir(source)):
        saved = datasets.load_from_disk(source)
        return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if "[" in source:
        raise ValueError(f"{source}: `datasets` takes the [ for a pattern; rename the folder")
    return dict(datasets.load_dataset(source, cache_dir=cache_dir))


def open_saferlhf_on_hub(name: str, revision: str | None, cache_dir: str | None) -> dict[str, datasets.Dataset]:
    """Open a dataset on the Hugging Face hub at a branch, tag or commit, or what the cache holds of just that commit.

    Without a network `datasets` takes the newest version in its cache, whatever revision was asked for: what the name
    stands for is asked of the hub's cache, which keeps it from the last time that there was a network.
    Raises ValueError if the rows are not those of the revision, or that cannot be known.
    """
    try:
        card = huggingface_hub.hf_hub_download(name, "README.md", repo_type="dataset", revision=revision)
        wanted: str | None = os.path.basename(os.path.dirname(card))
    except (huggingface_hub.errors.EntryNotFoundError, huggingface_hub.errors.LocalEntryNotFoundError):
        wanted = revision if re.fullmatch("[0-9a-f]{40}", revision or "") else None
    splits = dict(datasets.load_dataset(name, revision=wanted or revision, cache_dir=cache_dir))
    found = saferlhf_commit(next(iter(splits.values())))
    if wanted and found and found != wanted:
        raise ValueError(f"{name}: the cache holds commit {found}, and {revision or 'main'} is {wanted}")
    if revision and not wanted and huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError(f"{name}: which commit {revision} is cannot be known offline; load it once with a network")
    return splits


def saferlhf_commit(dataset: datasets.Dataset) -> str | None:
    """The commit that rows from the hub are of: `datasets` names the folder of its cache after it."""
    folders = [os.path.basename(os.path.dirname(file["filename"])) for file in dataset.cache_files]
    return next((folder for folder in folders if re.fullmatch("[0-9a-f]{40}", folder)), None)


def select_saferlhf_columns(dataset: datasets.Dataset, where: str) -> pa.Table:
    """Return the five columns that are used, as one Arrow table of every row.

    Raises ValueError that names the column when one is missing, of another type, or empty in some row.
    """
    missing = [column for column in SAFERLHF_COLUMNS if column not in dataset.column_names]
    if missing:
        raise ValueError(f"{where}: no column {', '.join(missing)}; it has {', '.join(dataset.column_names)}")
    table = dataset.select_columns(list(SAFERLHF_COLUMNS)).with_format("arrow")[:]
    for column, wanted in SAFERLHF_COLUMNS.items():
        found = str(table.schema.field(column).type).removeprefix("large_")
        if found != wanted:
            raise ValueError(f"{where}: column {column} holds {found}, it must hold {wanted}")
        if table[column].null_count:
            raise ValueError(f"{where}: column {column} is empty in {table[column].null_count} rows")
    # Arrow's plain strings end at 2 GiB a column once the chunks are joined.
    return table.cast(pa.schema([(c, pa.large_string() if t == "string" else t) for c, t in SAFERLHF_COLUMNS.items()]))


def split_saferlhf_prompts(table: pa.Table, split: str) -> pa.Table:
    """Return the train or the test rows of a table that came without a test split.

    The test split is 5 % of the prompts: those whose SHA-256 is in the lowest 5 % of all values, or else the lowest.
    So whether a prompt is held out depends on nothing but itself: not on machine, order, or rows that are added.
    """
    hashes = {prompt: hashlib.sha256(prompt.encode()).digest() for prompt in table["prompt"].unique().to_pylist()}
    limit = bytes([256 * SAFERLHF_TEST_PERCENT // 100, (65536 * SAFERLHF_TEST_PERCENT // 100) % 256])
    test_prompts = [prompt for prompt, value in hashes.items() if value < limit] or sorted(
        hashes, key=lambda p: hashes[p]
    )[:1]
    in_test = pc.is_in(table["prompt"], value_set=pa.array(test_prompts, type=table.schema.field("prompt").type))
    return table.filter(in_test if split == "test" else pc.invert(in_test))


def load_saferlhf(split: str, silent: bool = False, cache_dir: str | None = None) -> pa.Table:
    """Load every row of one split, 'train' or 'test', as an Arrow table of the five columns that are used.

    Where the rows come from is said by two environment variables, as upstream's config has no key for it:
    SAFERLHF_DATASET (a path or a name, see open_saferlhf; default PKU-Alignment/PKU-SafeRLHF) and SAFERLHF_REVISION.
    Data with a train split alone is divided by split_saferlhf_prompts.
    Raises ValueError for a split or a column that is not there.
    """
    source = os.environ.get("SAFERLHF_DATASET") or SAFERLHF
    splits = open_saferlhf(source, os.environ.get("SAFERLHF_REVISION") or None, cache_dir)
    where = f"{source} ({split} split)"
    is_whole = set(splits) == {"train"}
    if not is_whole and split not in splits:
        raise ValueError(f"{where}: no such split; it has {', '.join(splits)}")
    dataset = splits["train" if is_whole else split]

    commit = saferlhf_commit(dataset)
    if commit and not os.path.exists(source) and not silent:
        print(f"resolved dataset {source} to revision {commit}")

    table = select_saferlhf_columns(dataset, where)
    return split_saferlhf_prompts(table, split) if is_whole else table


def group_saferlhf_pairs(table: pa.Table) -> dict[str, dict[str, Any]]:
    """Turn rows into upstream's dict of prompts; see get_saferlhf for its meaning.

    Works on whole columns: a loop over rows takes some seven times as long, and every rank of a run waits for it.
    """
    table = table.filter(pc.xor(table["is_response_0_safe"], table["is_response_1_safe"]))
    if table.num_rows == 0:
        return {}
    first_is_safe = table["is_response_0_safe"]
    prompts = table["prompt"].combine_chunks().dictionary_encode()  # numbered in order of first appearance
    prompt_of_row = prompts.indices.to_numpy()
    by_prompt = np.argsort(prompt_of_row, kind="stable")
    chosen = pc.if_else(first_is_safe, table["response_0"], table["response_1"]).take(by_prompt).to_pylist()
    rejected = pc.if_else(first_is_safe, table["response_1"], table["response_0"]).take(by_prompt).to_pylist()
    responses = [response for pair in zip(chosen, rejected) for response in pair]
    n_rows = np.bincount(prompt_of_row).tolist()
    pairs = [(2 * i, 2 * i + 1) for i in range(max(n_rows))]

    data = {}
    start = 0
    for prompt, n in zip(prompts.dictionary.to_pylist(), n_rows):
        end = start + n
        data[prompt] = {"responses": responses[2 * start : 2 * end], "pairs": pairs[:n], "sft_target": chosen[end - 1]}
        start = end
    return data


def get_saferlhf(split: str, silent: bool = False, cache_dir: str | None = None) -> dict[str, dict[str, Any]]:
    """Load PKU-SafeRLHF and return a dict of prompts, responses and preference pairs. See get_hh for the format.

    A row is kept if exactly one of its two responses is safe: that one is chosen, the other rejected. Prompts and
    responses are taken as they stand. Prompts come in order of first appearance, the pairs of a prompt in the order of
    their rows, and the sft_target is the chosen response of the prompt's last kept row.
    The environment variables SAFERLHF_DATASET (a path, or a name on the hub) and SAFERLHF_REVISION say which rows:
    see load_saferlhf. Raises ValueError if a column or a split is missing or no row is kept.
    Dataset card: https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF
    """
    if not silent:
        print(f"Loading SafeRLHF dataset ({split} split)...")
    table = load_saferlhf(split, silent, cache_dir)
    data = group_saferlhf_pairs(table)
    if not data:
        rows = f"{table.num_rows} rows, none with exactly one safe response" if table.num_rows else "no rows"
        raise ValueError(f"the {split} split has {rows}")
    if not silent:
        print("done")
    return data

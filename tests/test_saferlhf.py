"""get_saferlhf against its definition, on rows made at random, and where it finds its rows."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambersafe_cli import saferlhf

Row = dict[str, Any]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
a_row = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(["", "p", "q ", "p ", "é"]) | texts,
        "response_0": texts,
        "response_1": texts,
        "is_response_0_safe": st.booleans(),
        "is_response_1_safe": st.booleans(),
    }
)


def row(prompt: str, first: str = "a", second: str = "b", first_safe: bool = True, second_safe: bool = False) -> Row:
    return {
        "prompt": prompt,
        "response_0": first,
        "response_1": second,
        "is_response_0_safe": first_safe,
        "is_response_1_safe": second_safe,
    }


def row_by_row(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """The definition, as upstream would write it."""
    data: dict[str, dict[str, Any]] = defaultdict(lambda: {"responses": [], "pairs": []})
    for each in rows:
        if each["is_response_0_safe"] == each["is_response_1_safe"]:
            continue
        safe, other = (0, 1) if each["is_response_0_safe"] else (1, 0)
        entry = data[each["prompt"]]
        n = len(entry["responses"])
        entry["responses"] += [each[f"response_{safe}"], each[f"response_{other}"]]
        entry["pairs"].append((n, n + 1))
        entry["sft_target"] = each[f"response_{safe}"]
    return data


def write_rows(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


@given(st.lists(a_row, max_size=30), st.integers(1, 30))
def test_dict_equals_the_definition(rows: list[Row], rows_a_chunk: int) -> None:
    schema = pa.schema(
        [(name, pa.string() if kind == "string" else pa.bool_()) for name, kind in saferlhf.SAFERLHF_COLUMNS.items()]
    )
    chunks = [pa.Table.from_pylist(rows[i : i + rows_a_chunk], schema) for i in range(0, len(rows), rows_a_chunk)]
    table = pa.concat_tables([schema.empty_table(), *chunks])
    built, defined = saferlhf.group_saferlhf_pairs(table), row_by_row(rows)
    assert built == defined
    assert list(built) == list(defined), "prompts come in order of first appearance"


def test_a_shuffled_and_selected_dataset_is_read_in_its_own_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [row(f"p{i % 7}", f"safe {i}", f"other {i}") for i in range(40)]
    shuffled = datasets.Dataset.from_list(rows).shuffle(seed=1).select(range(5, 30))
    table = saferlhf.select_saferlhf_columns(shuffled, "here")
    assert saferlhf.group_saferlhf_pairs(table) == row_by_row(shuffled.to_list())


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], dict[str, Any]]:
    def from_path(path: Path, split: str) -> dict[str, Any]:
        monkeypatch.setenv("SAFERLHF_DATASET", str(path))
        return saferlhf.get_saferlhf(split, silent=True)

    return from_path


TRAIN = [row(f"prompt {i}", f"safe {i}", f"unsafe {i}") for i in range(8)]
TEST = [row("other prompt", "bad", "good", False, True), row("both", first_safe=True, second_safe=True)]


def saved_to_disk(folder: Path) -> Path:
    splits = {"train": datasets.Dataset.from_list(TRAIN), "test": datasets.Dataset.from_list(TEST)}
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


def folder_of_jsonl(folder: Path) -> Path:
    write_rows(folder / "train.jsonl", TRAIN)
    return write_rows(folder / "test.jsonl", TEST).parent


def folder_of_parquet(folder: Path) -> Path:
    folder.mkdir()
    datasets.Dataset.from_list(TRAIN).to_parquet(folder / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list(TEST).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def test_a_folder_whose_name_datasets_would_take_for_a_pattern_is_an_error(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rename the folder"):
        load(folder_of_jsonl(tmp_path / "rows [1]"), "train")


@pytest.mark.parametrize("make", [saved_to_disk, folder_of_jsonl, folder_of_parquet])
def test_a_folder_with_both_splits_is_taken_as_it_is(make: Callable[[Path], Path], load: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "my data, 'é'")
    assert load(folder, "train") == row_by_row(TRAIN)
    assert load(folder, "test") == row_by_row(TEST)


def as_jsonl(path: Path) -> Path:
    return write_rows(path.with_suffix(".jsonl"), TRAIN)


def as_json(path: Path) -> Path:
    path.with_suffix(".json").write_text(json.dumps(TRAIN))
    return path.with_suffix(".json")


def as_csv(path: Path) -> Path:
    datasets.Dataset.from_list(TRAIN).to_csv(path.with_suffix(".csv"))
    return path.with_suffix(".csv")


def as_parquet(path: Path) -> Path:
    datasets.Dataset.from_list(TRAIN).to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def as_saved_dataset(path: Path) -> Path:
    datasets.Dataset.from_list(TRAIN).save_to_disk(path)
    return path


@pytest.mark.parametrize("make", [as_jsonl, as_json, as_csv, as_parquet, as_saved_dataset])
def test_data_without_a_test_split_is_divided_the_same_way_whatever_its_format(
    make: Callable[[Path], Path], load: Any, tmp_path: Path
) -> None:
    path = make(tmp_path / "rows [1] {2} *, 'é' = ?")
    train, test = load(path, "train"), load(path, "test")
    assert {**train, **test} == row_by_row(TRAIN)
    assert list(test) == ["prompt 6"], "which prompts are held out may never change: runs would no longer compare"
    assert saferlhf.split_saferlhf_prompts(pa.table({"prompt": [f"prompt {i}" for i in range(100)]}), "test")[
        "prompt"
    ].to_pylist() == ["prompt 19", "prompt 60", "prompt 70"]


@given(st.lists(st.sampled_from([f"p{i}" for i in range(60)]), min_size=1, max_size=200), st.randoms())
def test_split_holds_out_whole_prompts_and_does_not_depend_on_order(prompts: list[str], random: Any) -> None:
    def split(prompts: list[str], name: str) -> list[str]:
        return list(saferlhf.split_saferlhf_prompts(pa.table({"prompt": prompts}), name)["prompt"].to_pylist())

    test, train = split(prompts, "test"), split(prompts, "train")
    assert sorted(test + train) == sorted(prompts)
    assert not set(test) & set(train)
    assert test
    more = split([*prompts, *(f"new {i}" for i in range(50))], "test")
    if len(set(test)) > 1:
        assert set(test) <= set(more), "rows that are added move none of the old prompts"
    shuffled = prompts[:]
    random.shuffle(shuffled)
    assert set(split(shuffled, "test")) == set(test)


def test_a_missing_column_is_named(load: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{k: v for k, v in each.items() if k != "response_1"} for each in TRAIN])
    with pytest.raises(ValueError, match=r"rows\.jsonl.*no column response_1; it has prompt, response_0"):
        load(path, "train")


def test_a_column_of_another_type_is_named(load: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{**each, "is_response_0_safe": 1} for each in TRAIN])
    with pytest.raises(ValueError, match="column is_response_0_safe holds int64, it must hold bool"):
        load(path, "train")


def test_an_empty_value_is_counted_and_its_column_named(load: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*TRAIN, {**TRAIN[0], "is_response_1_safe": None}])
    with pytest.raises(ValueError, match="column is_response_1_safe is empty in 1 rows"):
        load(path, "train")


def test_rows_of_which_none_is_kept_are_an_error(load: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows" / "train.jsonl", TRAIN)
    write_rows(tmp_path / "rows" / "test.jsonl", TEST[1:])
    with pytest.raises(ValueError, match="the test split has 1 rows, none with exactly one safe response"):
        load(tmp_path / "rows", "test")


def test_a_split_that_is_not_there_is_an_error_that_names_those_that_are(load: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows" / "train.jsonl", TRAIN)
    write_rows(tmp_path / "rows" / "validation.jsonl", TEST)
    with pytest.raises(ValueError, match="no such split; it has train, validation"):
        load(tmp_path / "rows", "test")


def test_a_file_of_another_kind_is_an_error_that_says_which_are_read(load: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"ends in \.jsonl, \.json, \.parquet, \.csv, not in '\.txt'"):
        load(tmp_path / "rows.txt", "train")


def test_five_percent_of_many_prompts_are_held_out() -> None:
    table = pa.table({"prompt": [f"p{i}" for i in range(20_000)]})
    assert 900 < saferlhf.split_saferlhf_prompts(table, "test").num_rows < 1100


def test_texts_that_pandas_takes_for_missing_are_texts(load: Any, tmp_path: Path) -> None:
    rows = [
        row(f"p{i}", text, "other") for i, text in enumerate(["None", "N/A", "null", "nan", "NA", "x", "y", "z"] * 3)
    ]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "rows.csv")
    assert {**load(tmp_path / "rows.csv", "train"), **load(tmp_path / "rows.csv", "test")} == row_by_row(rows)


OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as a machine with a network leaves it, where `v0` was loaded and then `main`; no network now."""
    hub = tmp_path / "hub" / "datasets--org--name"
    (hub / "refs").mkdir(parents=True)
    for revision, commit in (("v0", OLD), ("main", NEW)):
        (hub / "refs" / revision).write_text(commit)
        (hub / "snapshots" / commit).mkdir(parents=True)
        (hub / "snapshots" / commit / "README.md").touch()
        rows = [{**each, "prompt": f"{revision}: {each['prompt']}"} for each in TRAIN]
        for split in ("train", "test"):
            arrow = tmp_path / "datasets" / commit / split
            datasets.Dataset.from_list(rows).save_to_disk(arrow)
            (arrow / "data-00000-of-00001.arrow").rename(arrow.parent / f"name-{split}.arrow")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("SAFERLHF_DATASET", "org/name")

    def newest_in_cache(name: str, revision: str | None, cache_dir: str | None) -> dict[str, datasets.Dataset]:
        """As `datasets` does without a network: whatever revision is asked for."""
        folder = tmp_path / "datasets" / NEW
        return {s: datasets.Dataset.from_file(str(folder / f"name-{s}.arrow")) for s in ("train", "test")}

    monkeypatch.setattr(datasets, "load_dataset", newest_in_cache)
    return tmp_path


def test_the_commit_that_a_hub_name_stood_for_is_printed(hub_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saferlhf.get_saferlhf("train")
    assert f"resolved dataset org/name to revision {NEW}" in capsys.readouterr().out


def test_rows_of_another_revision_than_was_asked_for_are_refused(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for revision in ("v0", OLD):
        monkeypatch.setenv("SAFERLHF_REVISION", revision)
        with pytest.raises(ValueError, match=f"holds commit {NEW}, and {revision} is {OLD}"):
            saferlhf.get_saferlhf("train", silent=True)
    for revision in ("main", NEW):
        monkeypatch.setenv("SAFERLHF_REVISION", revision)
        assert next(iter(saferlhf.get_saferlhf("train", silent=True))).startswith("main: ")


def test_a_revision_that_the_cache_does_not_know_is_refused_offline(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFERLHF_REVISION", "nonsense")
    with pytest.raises(ValueError, match="which commit nonsense is cannot be known offline"):
        saferlhf.get_saferlhf("train", silent=True)

"""Input that is wrong in ways nobody thinks of: names that mean something to others, rows of another type."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ambersafe

from ambersafe_cli import data, recipe
from ambersafe_cli.errors import DataError

Row = dict[str, Any]


def rows(number: int, name: str = "p") -> list[Row]:
    row = {"response_0": "a", "response_1": "b", "is_response_0_safe": True, "is_response_1_safe": False}
    return [{"prompt": f"{name}{i}", **row, "safer_response_id": 0} for i in range(number)]


def as_jsonl(path: Path, found: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def as_json(path: Path, found: list[Row]) -> Path:
    path.write_text(json.dumps(found))
    return path


def as_csv(path: Path, found: list[Row]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    return path


def as_parquet(path: Path, found: list[Row]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(found), path)
    return path


# --- names ---


@pytest.mark.parametrize("name", ["data*", "data?x", "data[s]", "a::b", "two\nlines"])
def test_a_folder_is_refused_whose_name_datasets_takes_for_more_than_that(tmp_path: Path, name: str) -> None:
    for each in (name, "data_other", "datasx"):
        (tmp_path / each).mkdir()
        as_jsonl(tmp_path / each / "rows.jsonl", rows(30, each))
    for place in (tmp_path / name, tmp_path / name / "inner"):
        place.mkdir(exist_ok=True)
        as_jsonl(place / "rows.jsonl", rows(30, name))
        with pytest.raises(DataError, match="by which `datasets` means other files") as caught:
            recipe.resolve_data(recipe.load("tiny"), recipe.Flags({}, str(place)))
        assert repr(str(place)) in caught.value.message
        assert caught.value.hint


@pytest.mark.parametrize("name", ["data*.jsonl", "data[s].jsonl", "data?.jsonl"])
def test_a_file_of_such_a_name_is_read_by_itself(tmp_path: Path, name: str) -> None:
    as_jsonl(tmp_path / "datas.jsonl", rows(30, "other"))
    as_jsonl(tmp_path / name, rows(40))
    place, _ = recipe.resolve_data(recipe.load("tiny"), recipe.Flags({}, str(tmp_path / name)))
    assert sum(split.rows for split in data.summarize(place, None).values()) == 40


def test_a_file_that_datasets_would_leave_away_is_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b::c.jsonl"):
        as_jsonl(tmp_path / name, rows(30))
    for place, named in ((tmp_path, "b::c.jsonl"), (tmp_path / "b::c.jsonl", "b::c.jsonl")):
        with pytest.raises(DataError, match=named):
            recipe.resolve_data(recipe.load("tiny"), recipe.Flags({}, str(place)))


@pytest.mark.parametrize("command", ["sft", "dpo", "check sft", "data", "plan --gpu 24GB", "pipeline", "evaluate o/m"])
def test_every_command_that_takes_data_refuses_a_pattern(ambersafe: Ambersafe, tmp_path: Path, command: str) -> None:
    for name in ("data*", "data_other"):
        (tmp_path / "work" / name).mkdir()
        as_jsonl(tmp_path / "work" / name / "rows.jsonl", rows(30))
    done = ambersafe(*command.split(), "--data", "./data*")
    assert done.returncode == 65, done.stderr
    assert "data*' has '*' in it" in done.stderr


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "x" * 300])
@pytest.mark.parametrize(
    "given",
    [
        ("sft", "--recipe"), ("sft", "--model"), ("sft", "--data"), ("sft", "--dir"), ("dpo", "--archive"),
        ("status", "--dir"), ("status", "--python"), ("data", "--data"), ("evaluate", "o/m", "--pairs"),
        ("evaluate", "o/m", "--dir"), ("sample", "o/m", "--prompts"), ("plot", "r", "--out"), ("report", "--out"),
        ("export", "r", "--out"), ("prefetch", "--recipe"), ("recipes",), ("sft", "local_run_dir"),
    ],
)  # fmt: skip
def test_a_path_that_the_system_cannot_look_at_is_a_wrong_one_and_no_defect(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path, given: tuple[str, ...], path: str
) -> None:
    *words, last = given
    more = [f"{last}={path}", "--model", tmp_path] if last == "local_run_dir" else [last, path]
    done = ambersafe(*words, *more, env={"HF_HUB_OFFLINE": "0" if "prefetch" in given else "1"})
    assert done.returncode == 64, done.stderr
    assert path in done.stderr
    assert "defect" not in done.stderr


# --- rows ---

ODD: list[tuple[Row, str]] = [
    ({"prompt": 5}, "column prompt holds a number (5), it must hold a text"),
    ({"response_0": ["x"]}, "column response_0 holds a list (['x']), it must hold a text"),
    ({"response_1": None}, "column response_1 holds nothing, it must hold a text"),
    ({"is_response_0_safe": "yes"}, "column is_response_0_safe holds a text ('yes'), it must hold true or false"),
    ({"is_response_1_safe": 1}, "column is_response_1_safe holds a number (1), it must hold true or false"),
]


@pytest.mark.parametrize("make", [as_jsonl, as_json])
@pytest.mark.parametrize(("change", "said"), ODD)
def test_a_row_of_another_type_is_named_with_its_file_number_and_column(
    make: Callable[[Path, list[Row]], Path], change: Row, said: str, tmp_path: Path
) -> None:
    found = rows(40)
    found[16].update(change)
    path = make(tmp_path / f"rows.{make.__name__[3:]}", found)
    with pytest.raises(DataError) as caught:
        data.summarize(str(path), None)
    assert f"{path}, row 17: {said}" in caught.value.message
    assert "arrow.json" not in caught.value.message


@pytest.mark.parametrize("value", ["yes", "1", ""])
def test_the_same_in_csv_where_all_is_text(tmp_path: Path, value: str) -> None:
    found = rows(40)
    found[16]["is_response_0_safe"] = value
    path = as_csv(tmp_path / "rows.csv", found)
    with pytest.raises(DataError) as caught:
        data.summarize(str(path), None)
    assert f"{path}, row 17: column is_response_0_safe holds " in caught.value.message
    assert "it must hold true or false" in caught.value.message


def test_the_same_in_parquet_where_a_column_has_one_type(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "rows.parquet", [{**row, "is_response_0_safe": "yes"} for row in rows(40)])
    with pytest.raises(DataError) as caught:
        data.summarize(str(path), None)
    assert f"{path}, row 1: column is_response_0_safe holds a text ('yes')" in caught.value.message


@pytest.mark.parametrize("make", [as_jsonl, as_json, as_csv, as_parquet])
@pytest.mark.parametrize(("column", "values"), [("is_response_0_safe", (True, "yes")), ("safer_response_id", (0, [1]))])
def test_of_several_files_the_one_is_named_that_holds_another_type(
    make: Callable[[Path, list[Row]], Path], column: str, values: tuple[Any, Any], tmp_path: Path
) -> None:
    ending = make.__name__[3:]
    make(tmp_path / f"a.{ending}", [{**row, column: values[0]} for row in rows(30, "x")])
    path = make(tmp_path / f"b.{ending}", [{**row, column: values[1]} for row in rows(40)])
    with pytest.raises(DataError) as caught:
        data.summarize(str(tmp_path), None)
    assert f"{path}, row 1: column {column} holds " in caught.value.message
    assert "it must hold true or false" in caught.value.message or "in the files before it" in caught.value.message


def test_a_row_that_is_no_json_or_no_object_is_named(tmp_path: Path) -> None:
    for line, said in (("{", "cannot be read"), ("[1]", "is no object")):
        path = as_jsonl(tmp_path / "rows.jsonl", rows(40))
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(DataError, match=rf"rows\.jsonl, row 41 {said}"):
            data.summarize(str(path), None)

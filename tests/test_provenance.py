"""What run.json says of how a run came about: fingerprints, versions, git, settings, and no secret."""

import hashlib
import itertools
import json
import runpy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambersafe_cli import checkpoints, demo, saferlhf

LOOK = runpy.run_path(str(Path(demo.__file__).parent / "children" / "look_at_data.py"))
SCHEMA = pa.schema(
    [(name, pa.large_string() if kind == "string" else pa.bool_()) for name, kind in saferlhf.SAFERLHF_COLUMNS.items()]
)
Row = dict[str, Any]
rows_of_any_text = st.lists(
    st.fixed_dictionaries(
        {
            name: st.text(st.characters(codec="utf-8"), max_size=8) if kind == "string" else st.booleans()
            for name, kind in saferlhf.SAFERLHF_COLUMNS.items()
        }
    ),
    max_size=12,
)


def fingerprint(table: pa.Table) -> str:
    found = LOOK["fingerprint"](table)
    assert isinstance(found, str)
    return found


def as_documented(rows: list[Row]) -> str:
    """The fingerprint by its definition, row by row."""
    parts = []
    for name, kind in saferlhf.SAFERLHF_COLUMNS.items():
        parts.append(f"{name}\0{len(rows)}\0".encode())
        if kind == "bool":
            parts += [bytes([row[name]]) for row in rows]
        else:
            parts += [len(row[name].encode()).to_bytes(8, "little") for row in rows]
            parts += [row[name].encode() for row in rows]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@given(rows_of_any_text, st.lists(st.integers(0, 12), max_size=4), st.data())
def test_a_fingerprint_is_that_of_the_rows_however_they_are_cut(rows: list[Row], cuts: list[int], data: Any) -> None:
    table = pa.Table.from_pylist(rows, SCHEMA)
    assert fingerprint(table) == as_documented(rows)
    edges = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    pieces = [table.slice(a, b - a) for a, b in itertools.pairwise(edges)]
    assert fingerprint(pa.concat_tables([*pieces, table.slice(0, 0)])) == as_documented(rows)
    first = data.draw(st.integers(0, len(rows)))
    assert fingerprint(table.slice(first)) == as_documented(rows[first:])


@given(rows_of_any_text, rows_of_any_text)
def test_other_rows_have_another_fingerprint(some: list[Row], others: list[Row]) -> None:
    same = fingerprint(pa.Table.from_pylist(some, SCHEMA)) == fingerprint(pa.Table.from_pylist(others, SCHEMA))
    assert same == (some == others)


def test_equal_rows_of_a_jsonl_and_a_parquet_file_have_equal_fingerprints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in (demo.DATA / "train.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"more": 1, **row}) + "\n" for row in rows))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=7)
    found = []
    for name in ("rows.jsonl", "rows.parquet"):
        monkeypatch.setenv("SAFERLHF_DATASET", str(tmp_path / name))
        found.append([fingerprint(saferlhf.load_saferlhf(split, silent=True)) for split in ("train", "test")])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_a_checkpoint_is_known_again_by_what_it_holds_and_not_by_its_name(tmp_path: Path) -> None:
    import torch

    def save(name: str, value: float) -> Path:
        path = tmp_path / name
        torch.save({"step_idx": 1, "state": {"a": torch.full((1000,), value)}, "metrics": {}}, path)
        return path

    one = checkpoints.fingerprint(save("policy.pt", 1.0))
    assert one
    assert len(one) == 64
    assert checkpoints.fingerprint(save("of another name.pt.new", 1.0)) == one
    assert checkpoints.fingerprint(save("other.pt", 1.0000001)) != one
    cut_off = tmp_path / "cut_off.pt"
    cut_off.write_bytes((tmp_path / "policy.pt").read_bytes()[:-100])
    assert checkpoints.fingerprint(cut_off) is None
    assert checkpoints.fingerprint(tmp_path) is None
    assert checkpoints.fingerprint(tmp_path / "no.pt") is None

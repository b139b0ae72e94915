"""Which row of local data cannot be read: of a value of another type, `datasets` names neither its file nor its row."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ambersafe_cli.display import printable
from ambersafe_cli.recipe import MADE_BY_SAVE_TO_DISK

_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
_WANTED = {"string": "a text", "bool": "true or false"}
_SHOWN = 60


def explain(source: str, said: str) -> str:
    """What `datasets` said of data that cannot be loaded, and which row is to blame, if one is."""
    said = printable(said.replace("extension<arrow.json>", "values of several types"))
    row = None if "no column" in said else first(source)
    return f"{said}; {row}" if row else said


def first(source: str) -> str | None:
    """The first row that training cannot take: its file, number, column, what it holds and what is wanted, in words.

    None for what is no local file or folder of files, and if no row is to blame.
    """
    from ambersafe_cli.saferlhf import SAFERLHF_COLUMNS, SAFERLHF_FILES

    path = Path(source)
    if any((path / name).exists() for name in MADE_BY_SAVE_TO_DISK):
        return None
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    wanted = {column: _WANTED[kind] for column, kind in SAFERLHF_COLUMNS.items()}
    others: dict[str, str] = {}
    odd_other = None
    for file in (each for each in files if each.suffix.lower() in SAFERLHF_FILES):
        kinds: dict[str, str] = {}
        for number, row in _rows(file):
            where = f"{printable(str(file))}, row {number}"
            if not isinstance(row, dict):
                return f"{where} {printable(row) if isinstance(row, str) else 'is no object'}"
            for column, kind in wanted.items():
                if (found := _kind(file, row.get(column), kind)) != kind:
                    return f"{where}: column {column} holds {found}{_shown(row.get(column))}, it must hold {kind}"
            for column, value in row.items():
                found = _kind(file, value, None)
                kinds.setdefault(column, found) if value is not None else None
                if not odd_other and value is not None and found != others.get(column, found) and column not in wanted:
                    in_others = f"in the files before it holds {others[column]}"
                    odd_other = f"{where}: column {printable(column)} holds {found}{_shown(value)}, {in_others}"
        others = {**kinds, **others}
    return odd_other


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a file with their numbers, from 1; in place of one that cannot be read a text that says why."""
    number = 0
    try:
        for number, row in enumerate(_read(file), start=1):
            yield number, row
    except Exception as error:  # of json, csv, pyarrow; what they raise for arbitrary bytes is nowhere written down
        yield number + 1, f"cannot be read: {error}"


def _read(file: Path) -> Iterator[Any]:
    ending = file.suffix.lower()
    if ending == ".csv":
        with file.open(encoding="utf-8", newline="") as lines:
            yield from csv.DictReader(lines)
    elif ending == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
    elif ending == ".json" and file.read_bytes().lstrip()[:1] == b"[":
        yield from json.loads(file.read_bytes())
    else:
        with file.open("rb") as lines:
            yield from (json.loads(line) for line in lines if line.strip())


def _kind(file: Path, value: Any, wanted: str | None) -> str:
    """What a value is, in words. In CSV all is text, and what it is taken for depends on what it looks like."""
    if file.suffix.lower() == ".csv" and isinstance(value, str) and wanted != "a text":
        if value.lower() in ("true", "false"):
            return "true or false"
        return "a number" if value.replace(".", "", 1).lstrip("-").isdecimal() else "a text" if value else "nothing"
    return "nothing" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


def _shown(value: Any) -> str:
    text = "" if value in (None, "") else str(value) if isinstance(value, int | float) else repr(value)
    return printable(f" ({text[:_SHOWN]}{'…' if len(text) > _SHOWN else ''})") if text else ""

"""Prompts from files: what is read, and what is refused with file and line."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambersafe_cli import prompts
from ambersafe_cli.errors import DataError


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\r\n\n  two  \nthree", ["one", "  two  ", "three"]),
        ("a", "\ufeffone\n", ["one"]),
        ("a.txt", "a\x0bb\u2028c\n", ["a\x0bb\u2028c"]),
        ("a.jsonl", '{"prompt": "one\\ntwo", "x": 1}\n\n"three"\n', ["one\ntwo", "three"]),
    ],
)
def test_prompts_are_read(tmp_path: Path, name: str, content: str, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert prompts.read(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\n", "holds no prompt"),
        ("a.txt", b"one\n\xff\n", "not UTF-8, from line 2 on"),
        ("a.jsonl", b'"one"\n{"prompt": 1}\n', "line 2, holds no prompt"),
        ("a.jsonl", b'"one"\n\n{"prompt"\n', "line 3, is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1, is not JSON"),
        ("a.json", b'["one"]', "neither lines of text nor JSON Lines"),
        ("none.txt", None, "No such file"),
    ],
)
def test_what_holds_no_prompts_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as refused:
        prompts.read(tmp_path / name)
    assert name in refused.value.message


def test_a_dash_is_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"one\ntwo\n")))
    assert prompts.read(Path("-")) == ["one", "two"]


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1))
def test_any_text_comes_back_from_json_lines(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("prompts") / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    assert prompts.read(path) == texts

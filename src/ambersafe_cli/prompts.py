"""Prompts from a file: one a line, or JSON Lines."""

import json
import sys
from pathlib import Path

from ambersafe_cli.errors import DataError

_HINT = 'A .txt has one prompt a line; a .jsonl on each line a text, or an object with a text as its "prompt".'


def read(path: Path) -> list[str]:
    """The prompts of a .jsonl or another text file, or, for `-`, of the lines of stdin; empty lines are passed over.

    Raises DataError, naming file and line, for what is missing, empty, not UTF-8 or holds something else.
    """
    name = "stdin" if str(path) == "-" else str(path)
    try:
        data = sys.stdin.buffer.read() if name == "stdin" else path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read the prompts in {name}: {error.strerror}.", _HINT) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name} is not UTF-8, from line {line} on.", "Save it as UTF-8.") from error
    # Not splitlines(), which takes more than line feeds for an end.
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if path.suffix.lower() in (".json", ".csv", ".parquet"):
        raise DataError(f"{name} is neither lines of text nor JSON Lines.", _HINT)
    found = (
        [_of_json(name, *each) for each in lines] if path.suffix.lower() == ".jsonl" else [line for _, line in lines]
    )
    if not found:
        raise DataError(f"{name} holds no prompt.", _HINT)
    return found


def _of_json(name: str, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}, line {number}, is not JSON: {error}.", _HINT) from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{name}, line {number}, holds no prompt.", _HINT)
    return prompt

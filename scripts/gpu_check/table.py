"""What was found, beside what is expected: the rows of the last table, and their verdicts."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gpu_check import expected

Verdict = Literal["ok", "short", "failed", "not run"]


@dataclass(frozen=True)
class Ended:
    """How a part ended: what it said, one entry a line, and why it did not come to its end, or ""."""

    part: str
    entries: tuple[Mapping[str, Any], ...]
    problem: str
    seconds: float


@dataclass(frozen=True)
class Row:
    """A figure of a part: what was found, in words, what is expected with its source, and the verdict with a reason."""

    part: str
    figure: str
    found: str
    expected: str
    verdict: Verdict
    reason: str = ""


def read(path: Path) -> tuple[Mapping[str, Any], ...]:
    """What a part has said, as far as it came."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return tuple(json.loads(line) for line in lines)


def rows_of(ended: Ended, on_gpu: bool) -> list[Row]:
    """A row for each figure that is expected of a part; one for the part where none could be had."""
    figures = {entry["figure"]: entry for entry in ended.entries if "figure" in entry}
    reasons = {entry["not_run"]: entry["reason"] for entry in ended.entries if "not_run" in entry}
    if "" in reasons:
        return [Row(ended.part, "", "", "", "not run", reasons[""])]
    return [_row(each, figures.get(each.figure), reasons, ended.problem) for each in expected.of(ended.part, on_gpu)]


def _row(wanted: expected.Expected, found: Mapping[str, Any] | None, reasons: Mapping[str, str], problem: str) -> Row:
    bounds = f"{wanted.bounds} ({wanted.source})"
    if found is None and wanted.figure in reasons:
        return Row(wanted.part, wanted.figure, "", bounds, "not run", reasons[wanted.figure])
    if found is None:
        return Row(wanted.part, wanted.figure, "", bounds, "failed", problem or "it was not found")
    if found["value"] is None:
        return Row(wanted.part, wanted.figure, found["note"], bounds, "short", "not a finite number")
    value = float(found["value"])
    shown = f"{value:.4g}{' (' + found['note'] + ')' if found['note'] else ''}"
    is_enough = wanted.least is None or value >= wanted.least
    is_within = is_enough and (wanted.most is None or value <= wanted.most)
    return Row(wanted.part, wanted.figure, shown, bounds, "ok" if is_within else "short")


def show(rows: Iterable[Row]) -> str:
    """As a table in Markdown."""
    lines = ["| part | figure | found | expected | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        verdict = f"{row.verdict}{': ' + row.reason if row.reason else ''}"
        cells = (row.part, row.figure, row.found, row.expected, verdict)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def document(ended: Sequence[Ended], rows: Sequence[Row], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, for JSON."""
    parts = [
        {"part": each.part, "seconds": each.seconds, "problem": each.problem, "said": each.entries} for each in ended
    ]
    return {**about, "parts": parts, "rows": [asdict(row) for row in rows]}

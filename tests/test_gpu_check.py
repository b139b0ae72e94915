"""`scripts/gpu-check`: its table and its limits; and all of its parts at toy size, without a card."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from gpu_check import expected, main, table

from ambersafe_cli import cards

SCRIPT = ROOT / "scripts/gpu-check"
COPY = Path("scripts/gpu_check")


def verdicts(entries: list[dict[str, Any]], problem: str = "") -> dict[str, str]:
    """The verdict of each figure that is expected of the part `rewards` on a card."""
    rows = table.rows_of(table.Ended("rewards", tuple(entries), problem, 1.0), on_gpu=True)
    return {row.figure: row.verdict for row in rows}


def figure(name: str, value: float) -> dict[str, Any]:
    return {"figure": name, "value": value, "note": ""}


def test_a_figure_is_ok_within_its_bounds_short_outside_of_them_and_failed_if_it_is_missing() -> None:
    same, largest, mean = "same shapes, largest", "other shapes, largest", "other shapes, mean's distance from 0"
    found = verdicts([figure(same, 0), figure(largest, 0.3)], "its 25 s are over")
    assert found == {same: "ok", largest: "short", mean: "failed"}
    assert verdicts([figure(same, math.nan)])[same] == "short", "what is no number lies within no bounds"
    assert verdicts([figure(same, 1e-9)])[same] == "short"
    assert verdicts([{"not_run": mean, "reason": "no card"}])[mean] == "not run"
    assert verdicts([{"not_run": "", "reason": "TRL is missing"}]) == {"": "not run"}
    assert set(verdicts([], "ended with 1: no memory").values()) == {"failed"}


def test_the_table_says_what_was_found_what_is_expected_and_from_where() -> None:
    ended = table.Ended("rewards", (figure("other shapes, largest", 0.3),), "its 25 s are over", 25.0)
    shown = table.show(table.rows_of(ended, on_gpu=True))
    assert "| rewards | other shapes, largest | 0.3 | <= 0.1 (rounding of bfloat16, times beta) | short |" in shown
    assert "| failed: its 25 s are over |" in shown


def test_the_limits_are_ten_minutes_at_most_and_every_part_has_something_to_prove_on_a_card_and_without() -> None:
    assert sum(main.LIMITS.values()) <= 570
    assert {each.part for each in expected.EXPECTED} == set(main.LIMITS)
    assert all((ROOT / COPY / "parts" / f"{name}.py").is_file() for name in main.LIMITS)
    for name in main.LIMITS:
        assert expected.of(name, on_gpu=True)
        assert expected.of(name, on_gpu=False)
    for on_gpu in (True, False):
        figures = [(each.part, each.figure) for name in main.LIMITS for each in expected.of(name, on_gpu)]
        assert len(set(figures)) == len(figures), "one expectation for a figure in one place"
    assert set(expected.BANDWIDTHS) <= {card.name for card in cards.CARDS}


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **options)


def test_a_part_that_there_is_not_and_half_of_collect_are_refused() -> None:
    for words in (("--only", "speed"), ("--skip", "step,rows"), ("--collect", "folder"), ("--have", "freeze")):
        done = run(SCRIPT, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert "error: " in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def pretended(tmp_path: Path) -> Path:
    """The command with parts of its own: one fails, one hangs with a child, one finds what is expected."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    parts = {
        "ceilings": "raise RuntimeError('no card here')",
        "attention": "import subprocess\n    report.figure('error against math, relative', 0.001)\n    "
        "subprocess.run(['sleep', '987'])",
        "rewards": "report.figure('same shapes, largest', 0)\n    report.figure('other shapes, largest', 0)\n    "
        'report.figure("other shapes, mean\'s distance from 0", 0)',
    }
    for name, body in parts.items():
        (tmp_path / COPY / "parts" / f"{name}.py").write_text(f"def run(setup, report):\n    {body}\n")
    limits = tmp_path / COPY / "main.py"
    limits.write_text(limits.read_text().replace("ON_CPU = 4\n", "ON_CPU = 0.3\n"))
    return tmp_path


def sleepers() -> list[str]:
    found = subprocess.run(["pgrep", "-f", "sleep 987"], capture_output=True, text=True, check=False)
    return found.stdout.split()


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_does_not_stop_the_next_and_leaves_nothing_behind(
    pretended: Path, patched: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("--cpu", "--only", "attention,ceilings,rewards", "--out", out, "--clone", patched)
    done = run(pretended / "scripts/gpu-check", *words, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    rows = {(row["part"], row["figure"]): row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert rows["ceilings", "product, TFLOP/s"]["verdict"] == "failed"
    assert "no card here" in rows["ceilings", "product, TFLOP/s"]["reason"]
    assert rows["attention", "error against math, relative"]["verdict"] == "ok", "what it found before stays"
    late = rows["attention", "lengths of 20 that cuDNN computes, put last"]
    assert (late["verdict"], late["reason"]) == ("failed", f"its {0.3 * main.LIMITS['attention']:.0f} s are over")
    assert {row["verdict"] for (part, _), row in rows.items() if part == "rewards"} == {"ok"}
    assert "no card here" in (out / "ceilings.log").read_text()
    deadline = time.monotonic() + 10
    while sleepers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not sleepers()


@pytest.mark.slow
def test_every_part_comes_to_a_verdict_without_a_card(patched: Path, tmp_path: Path) -> None:
    done = run(
        SCRIPT, "--cpu", "--out", tmp_path / "out", "--clone", patched, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert {row["part"] for row in rows} == set(main.LIMITS)
    assert {row["part"] for row in rows if row["verdict"] != "ok"} <= {"trl"}
    last = done.stdout.rstrip().splitlines()[-len(rows) :]
    assert all(line.startswith("| ") for line in last), "the last lines are the table"

"""The live view: what a person sees while a run trains, in a real terminal, and on every size of one."""

import json
import math
import os
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Ambersafe, only_run
from hypothesis import given
from hypothesis import strategies as st
from terminal import Terminal

from ambersafe_cli import curves, following, health, journal, metrics, view

HERE = Path(__file__).parent
Start = Callable[..., Terminal]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Run the command in a terminal of its own."""
    started: list[Terminal] = []

    def start(*arguments: object, size: tuple[int, int] = (80, 24), **env: str) -> Terminal:
        command = [sys.executable, "-m", "ambersafe_cli", *map(str, arguments)]
        started.append(Terminal(command, tmp_path / "work", *size, env=env))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()


@pytest.fixture
def dpo(fake_clone: Path, tmp_path: Path) -> list[str]:
    """A DPO command whose training is a stand-in."""
    (tmp_path / "model").mkdir()
    (tmp_path / "policy.pt").write_text("weights")
    (tmp_path / "rows.jsonl").write_text("{}")
    given = {"model": tmp_path / "model", "data": tmp_path / "rows.jsonl", "archive": tmp_path / "policy.pt"}
    words = [word for flag, path in given.items() for word in (f"--{flag}", str(path))]
    return ["dpo", *words, "--exp-name", "run", "--no-preflight"]


def test_the_view_shows_the_run_as_it_goes_and_ends_in_a_summary(start: Start, dpo: list[str], tmp_path: Path) -> None:
    terminal = start(*dpo, FAKE="steps", FAKE_PAUSE="0.1")
    shown = terminal.wait_for(lambda text: "reward margin" in text and "after 0" in text)
    assert "dpo of model" in shown
    assert "running" in shown
    assert "held out    loss 0.693, accuracy 0, margin 0 (after 0)" in shown
    assert "train stats" not in shown
    assert terminal.wait() == 0
    ended = terminal.text()
    assert "held out    loss 0.25, accuracy 0.9, margin 0.8 (after 640)" in ended
    assert "1 lines of metrics could not be read" in ended
    assert f"checkpoint: {only_run(tmp_path / 'work', 'run')}" in ended.replace("\n", "")
    log = (only_run(tmp_path / "work", "run") / "train.log").read_text()
    assert log.count("train stats after") == 41
    assert "careful" in log


def test_the_view_follows_the_size_of_the_terminal(start: Start, dpo: list[str]) -> None:
    terminal = start(*dpo, FAKE="steps", FAKE_PAUSE="0.3")
    terminal.wait_for(lambda text: "reward margin" in text)
    for columns, lines in ((120, 40), (40, 10), (100, 30)):
        terminal.resize(columns, lines)
        terminal.wait_for(lambda text: True)
        begin = len(terminal.received)
        while b"dpo of model" not in terminal.received[begin:]:
            terminal.read(0.2)
        terminal.wait_for(lambda text: "Ctrl-C" in text)  # it is the last line of what is drawn
        rows = [line for line in terminal.screen.display if line.strip()]
        assert rows[0].startswith("dpo of model"), terminal.text()
        assert sum(line.startswith("loss ") for line in rows) == 1, terminal.text()
        footer = [line for line in rows if "Ctrl-C" in line]
        assert len(footer) == 1, terminal.text()


def test_a_run_that_fails_leaves_its_last_lines_on_the_terminal(start: Start, dpo: list[str]) -> None:
    terminal = start(*dpo, FAKE="steps and crash")
    assert terminal.wait() == 1
    assert "RuntimeError: the reason of the crash" in terminal.text()
    assert "failed with exit status 1" in terminal.text()


def test_ctrl_c_is_answered_in_the_view(start: Start, dpo: list[str]) -> None:
    terminal = start(*dpo, FAKE="finish")
    terminal.wait_for(lambda text: "now         waiting" in text)
    terminal.type("\x03")
    assert terminal.wait() in (0, 130)


def test_a_terminal_that_goes_away_ends_the_run_as_a_signal_does(start: Start, dpo: list[str], tmp_path: Path) -> None:
    terminal = start(*dpo, FAKE="finish")
    terminal.wait_for(lambda text: "now         waiting" in text)
    terminal.hang_up()
    assert terminal.child.wait(timeout=30) in (0, 128 + signal.SIGHUP)
    record = json.loads((only_run(tmp_path / "work", "run") / "run.json").read_text())
    assert record["ended"]


def test_a_terminal_that_takes_nothing_does_not_hold_the_training(start: Start, dpo: list[str], tmp_path: Path) -> None:
    terminal = start(*dpo, FAKE="steps", FAKE_PAUSE="0.2", size=(200, 60))
    terminal.wait_for(lambda text: "reward margin" in text)
    run = only_run(tmp_path / "work", "run")
    deadline = time.monotonic() + 60
    while not (run / "LATEST").exists():  # and nobody reads what the terminal is sent
        assert time.monotonic() < deadline, "the training waits for the terminal"
        time.sleep(0.1)
    assert terminal.wait() == 0


@pytest.mark.parametrize("how", ["--plain", "TERM"])
def test_upstreams_lines_are_shown_as_they_are_where_that_is_asked_for(start: Start, dpo: list[str], how: str) -> None:
    terminal = (
        start(*dpo, "--plain", FAKE="steps", size=(250, 60))
        if how == "--plain"
        else start(*dpo, FAKE="steps", TERM="dumb", size=(250, 60))
    )
    assert terminal.wait() == 0
    assert terminal.text().count("train stats after ") >= 20
    assert b"\x1b[?1049h" not in terminal.received


def test_watch_shows_a_run_of_another_terminal_until_its_end(
    start: Start, dpo: list[str], ambersafe: Ambersafe
) -> None:
    first = start(*dpo, FAKE="steps", FAKE_PAUSE="0.2")
    first.wait_for(lambda text: "reward margin" in text and "after 0" in text)
    second = start("watch", size=(120, 40))
    shown = second.wait_for(lambda text: "reward margin" in text and "Ctrl-C leaves; the run goes on" in text)
    assert "running" in shown
    assert second.wait(beside=first) == 0
    assert "finished" in second.text()
    assert "accuracy 0.9, margin 0.8 (after 640)" in second.text()
    assert first.wait() == 0
    again = start("watch")
    assert again.wait() == 0
    assert "finished" in again.text()
    assert "640 examples" in again.text()
    copied = ambersafe("watch")
    assert copied.returncode == 0
    assert copied.stdout.count("train stats after") == 41


def test_leaving_watch_leaves_the_run(start: Start, dpo: list[str]) -> None:
    first = start(*dpo, FAKE="wait")
    first.wait_for(lambda text: "now         waiting" in text)
    second = start("watch")
    second.wait_for(lambda text: "the run goes on" in text)
    second.type("\x03")
    assert second.wait() == 0
    assert "the run goes on" in second.text()
    assert first.child.poll() is None


def test_watch_says_what_it_cannot_find(ambersafe: Ambersafe) -> None:
    done = ambersafe("watch", "nothing")
    assert done.returncode == 64
    assert "There is no run nothing" in done.stderr


# --- the picture itself


def recorded(name: str) -> following.Following:
    """A recorded run in the middle of its way, as it was seen at that time."""
    run = following.Following(
        folder=Path("/work/.cache/someone") / name,
        stage="dpo",
        model="tiny_model",
        status="running",
        planned_examples=None,
        curves=curves.Curves(),
        began=1_764_000_000.0,
    )
    for line in (HERE / "recordings" / f"{name}.jsonl").read_text().splitlines():
        run.take_entry(journal.from_line(line))
    return run


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 40)])
def test_the_view_looks_as_it_did(columns: int, lines: int, tmp_path: Path) -> None:
    """What a terminal shows of a recorded run. AMBERSAFE_WRITE_SNAPSHOTS=1 writes what it shows now."""
    terminal = Terminal([sys.executable, str(HERE / "show_recording.py")], tmp_path, columns, lines)
    try:
        shown = terminal.wait_for(lambda text: "Ctrl-C" in text)
    finally:
        terminal.close()
    snapshot = HERE / "recordings" / f"live_{columns}x{lines}.txt"
    if os.environ.get("AMBERSAFE_WRITE_SNAPSHOTS") == "1":
        snapshot.write_text(shown + "\n")
    assert shown + "\n" == snapshot.read_text()


_NUMBERS = st.floats() | st.integers(-(10**6), 10**6).map(float)
_KEYS = st.sampled_from([key for _, key in (*view.METRICS["dpo"], *view.HELD_OUT)])
_RECORDS = st.builds(
    metrics.Record, st.sampled_from(["train", "eval"]), st.integers(0, 10**9), st.dictionaries(_KEYS, _NUMBERS)
)
_ADVICE = st.builds(health.Advice, st.sampled_from(["warning", "note"]), st.text(), st.text(), st.text())


@given(
    st.lists(_RECORDS, max_size=30),
    st.lists(st.text()),
    st.lists(_ADVICE, max_size=4),
    st.integers(1, 200),
    st.integers(1, 80),
    st.sampled_from(["sft", "dpo"]),
    st.integers(1, 10**9) | st.none(),
    st.booleans(),
    st.lists(st.text() | st.just("a\u202e\u061cb"), min_size=4, max_size=4),
)
def test_at_every_size_the_lines_fit(
    records: list[metrics.Record],
    lines: list[str],
    advice: list[health.Advice],
    columns: int,
    rows: int,
    stage: str,
    planned: int | None,
    is_ascii: bool,
    texts: list[str],
) -> None:
    model, status, checkpoint, doing = texts
    run = following.Following(Path("/a/run"), stage, model, status, planned, curves.Curves(), 0.0)
    for record in records:
        run.take_entry(record)
    for line in lines:
        run.take_line(line)
    run.advice = tuple(advice)
    run.checkpoint = (checkpoint, 5.0)
    run.doing = doing
    drawn = view.View(run, "Ctrl-C stops", is_ascii).lines(columns, rows, now=100.0)
    assert len(drawn) == rows
    assert all(line.cell_len <= max(columns, 20) for line in drawn)
    for shown in drawn:  # nothing that moves a cursor, turns a direction or has no width
        assert not [c for c in shown.plain if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\u200c\u200d"]
    if is_ascii and not lines and not advice and "".join(texts).isascii():
        assert all(line.plain.replace("…", "").isascii() for line in drawn)


@given(st.lists(_NUMBERS), st.integers(0, 100))
def test_a_curve_has_a_character_for_each_part_of_its_values(values: list[float], width: int) -> None:
    drawn = view.sparkline(values, width)
    assert len(drawn) == min(width, len(values))
    assert set(drawn) <= set(" ▁▂▃▄▅▆▇█")


def test_a_curve_goes_from_its_lowest_to_its_highest_value() -> None:
    assert view.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert view.sparkline([3, math.nan, 1], 3) == "█ ▁"
    assert view.sparkline([5] * 4, 4) == "▄▄▄▄"


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0] * 9, None), ([1.0] * 20, 0), (list(range(100)), 1), (list(range(100, 0, -1)), -1), ([0, 1] * 50, 0)],
)
def test_a_trend_is_told_from_noise(values: list[float], expected: int | None) -> None:
    assert view.trend(values) == expected


def test_the_length_that_train_py_tells_is_that_of_the_view() -> None:
    run = recorded("dpo")
    run.take_entry(metrics.Total(5000))
    assert "of 5,000 examples" in view.View(run).lines(80, 24, 1.7e9)[2].plain


def test_the_time_left_is_by_the_pace_of_this_attempt() -> None:
    run = recorded("dpo")
    run.curves = curves.Curves()
    run.planned_examples = 1000
    for examples, moment, attempt in ((100, 10.0, 1), (200, 1000.0, 2), (300, 1010.0, 2)):
        run.take_entry(metrics.Record("train", examples, {}, attempt, moment))
    assert run.seconds_left() == pytest.approx(70)


def test_what_a_terminal_would_obey_is_left_away() -> None:
    assert following.clean("\x1b[31mred\x1b[0m \x1b]0;title\x07a\tb\x00\r") == "red a    b"

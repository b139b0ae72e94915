"""metrics.jsonl, and the curves that are made of it."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambersafe_cli import curves, journal, metrics

LINE = "train stats after 16 examples: {'loss/train': '2.5', 'counters/examples': 16}"


def step(examples: int, loss: float = 1.0, attempt: int = 1) -> metrics.Record:
    return metrics.Record("train", examples, {"loss/train": loss}, attempt)


def test_what_is_printed_is_in_the_file_at_once(tmp_path: Path) -> None:
    writer = journal.Journal(tmp_path, 1)
    assert writer.take("Loading …") is None
    writer.take(LINE)
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert written.pop("time") > 1.7e9
    assert written == {"kind": "train", "attempt": 1, "examples": 16, "loss/train": 2.5, "counters/examples": 16.0}


def test_a_line_that_cannot_be_read_is_kept_and_counted(tmp_path: Path) -> None:
    writer = journal.Journal(tmp_path, 1)
    writer.take(LINE)
    writer.take(LINE[:50])
    assert [type(entry) for entry in journal.read(tmp_path)] == [metrics.Record, metrics.Unreadable]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["line"] == LINE[:50]
    assert curves.read(tmp_path).unreadable == 1


def test_a_later_attempt_begins_a_line_of_its_own_behind_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal.Journal(tmp_path, 1).take(LINE)
    path.write_text(path.read_text() + '{"kind": "tra')
    journal.Journal(tmp_path, 2).take(LINE)
    found = list(journal.read(tmp_path))
    assert [type(entry) for entry in found] == [metrics.Record, metrics.Unreadable, metrics.Record]
    assert [entry.attempt for entry in found if isinstance(entry, metrics.Record)] == [1, 2]


def test_the_length_of_the_run_is_in_the_file(tmp_path: Path) -> None:
    journal.Journal(tmp_path, 2).take("training on 1440 examples in all")
    (found,) = journal.read(tmp_path)
    assert isinstance(found, metrics.Total)
    assert (found.examples, found.attempt) == (1440, 2)


def test_a_disk_that_is_full_does_not_stop_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    entry = journal.Journal(tmp_path, 1).take(LINE)
    assert isinstance(entry, metrics.Record)


def test_a_follower_gives_each_line_once_and_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = journal.Follower(path)
    assert list(follower.new()) == []
    whole = journal.to_line(step(16))
    path.write_text(whole + whole[:20])
    assert list(follower.new()) == [step(16)]
    assert list(follower.new()) == []
    path.write_text(whole + whole)
    assert list(follower.new()) == [step(16)]


def test_a_run_without_the_file_is_read_from_its_log(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text(f"resolved model m to revision {'a' * 40}\n{LINE}\n")
    assert [entry.examples for entry in journal.read(tmp_path) if isinstance(entry, metrics.Record)] == [16]


_VALUES = st.dictionaries(st.text().filter(lambda key: key not in journal._OWN), st.floats())


_TIMES = st.none() | st.floats(0, 1e11)


@given(
    st.builds(
        metrics.Record,
        st.sampled_from(["train", "eval"]),
        st.integers(0, 10**12),
        _VALUES,
        st.integers(1, 99),
        _TIMES,
    )
)
def test_a_record_is_read_back_as_it_was_but_for_the_kind_of_what_is_no_number(record: metrics.Record) -> None:
    found = journal.from_line(journal.to_line(record))
    assert isinstance(found, metrics.Record)
    assert (found.kind, found.examples, found.attempt) == (record.kind, record.examples, record.attempt)
    expected = {k: v if math.isfinite(v) else None for k, v in record.values.items()}
    assert {k: None if math.isnan(v) else v for k, v in found.values.items()} == expected


@pytest.mark.parametrize("attempt", [1, 2])
def test_what_is_done_again_in_a_later_attempt_or_after_torchruns_own_restart_is_counted_once(attempt: int) -> None:
    lines = curves.Curves()
    for examples in (16, 32, 48, 64):
        lines.add(step(examples, loss=1))
    lines.add(metrics.Record("eval", 64, {"loss/eval": 1}))
    for examples in (48, 64, 80):
        lines.add(step(examples, loss=2, attempt=attempt))
    assert [(each.examples, each.values["loss/train"]) for each in lines.steps] == [
        (16, 1), (32, 1), (48, 2), (64, 2), (80, 2),
    ]  # fmt: skip
    assert lines.evaluations == []


@given(st.integers(0, 5 * curves.LIMIT))
def test_a_curve_of_any_length_has_a_bounded_number_of_points_and_the_same_mean(count: int) -> None:
    lines = curves.Curves()
    for number in range(count):
        lines.add(step(number + 1, loss=float(number)))
    assert len(lines.steps) <= 2 * curves.LIMIT + 1
    if count:
        assert lines.last == step(count, loss=float(count - 1))
        assert lines.steps[-1].examples == count
        assert lines.steps[0].values["loss/train"] <= count / curves.LIMIT
    if count < curves.LIMIT:
        assert len(lines.steps) == count

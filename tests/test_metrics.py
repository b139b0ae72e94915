"""Reading the lines that train.py prints."""

import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambersafe_cli import metrics

TRAIN_LINE = (
    "train stats after 32 examples: {'rewards_train/accuracies': '0.5', 'loss/train': '0.69315', "
    "'grad_norm': '23.1', 'counters/examples': 32, 'counters/updates': 1}"
)


def test_train_stats_become_numbers() -> None:
    record = metrics.parse_line(TRAIN_LINE)
    assert isinstance(record, metrics.Record)
    assert (record.kind, record.examples) == ("train", 32)
    assert record.values == {
        "rewards_train/accuracies": 0.5,
        "loss/train": 0.69315,
        "grad_norm": 23.1,
        "counters/examples": 32,
        "counters/updates": 1,
    }


def test_an_evaluation_is_told_from_a_training_step() -> None:
    record = metrics.parse_line("eval after 0: {'loss/eval': 'nan', 'logps_eval/chosen': '-1e+03'}")
    assert isinstance(record, metrics.Record)
    assert (record.kind, record.examples) == ("eval", 0)
    assert str(record.values["loss/eval"]) == "nan"
    assert record.values["logps_eval/chosen"] == -1000


@given(
    st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=5),
    st.integers(0, 10**9),
    st.text(st.characters(exclude_characters="\n")),
)
def test_whatever_upstream_formats_is_read_back_to_its_five_digits(
    values: dict[str, float], examples: int, before: str
) -> None:
    printed = {key: f"{value:.5g}" for key, value in values.items()}
    record = metrics.parse_line(f"{before}train stats after {examples} examples: {printed}")
    if "train stats after" not in before and "eval after" not in before:
        assert isinstance(record, metrics.Record)
        assert record.values == {key: float(text) for key, text in printed.items()}
        assert record.examples == examples


def test_the_length_of_the_run_is_read() -> None:
    assert metrics.parse_line("training on 1440 examples in all") == metrics.Total(1440)


def test_other_lines_are_no_records() -> None:
    for line in ("skipping logging after 32 examples to avoid logging too frequently", "", "seen after all"):
        assert metrics.parse_line(line) is None


@pytest.mark.parametrize(
    "line", [TRAIN_LINE[:60], "eval after 3: {'loss/eval': ?}", "eval after 3: {'loss/eval': [1]}", "eval after 3: {1}"]
)
def test_a_line_of_metrics_that_cannot_be_read_is_kept(line: str) -> None:
    assert metrics.parse_line(line) == metrics.Unreadable(line)


@given(st.dictionaries(st.text(st.sampled_from("a'\"\\/{}, \n\x00é")), st.floats(allow_nan=False), max_size=3))
def test_keys_are_those_that_python_would_read(values: dict[str, float]) -> None:
    record = metrics.parse_line(f"eval after 3: { {key: str(value) for key, value in values.items()}!r}")
    assert isinstance(record, metrics.Record)
    assert record.values == values


def test_a_log_gives_records_in_order_and_resolved_commits(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    lines = [
        b"\xff not UTF-8",
        b"resolved model a b to revision " + b"1" * 40,
        b"resolved dataset d to revision " + b"2" * 40,
        b"eval after 0: {'loss/eval': '2'}",
        b"Computing:  50%|     |\rComputing: 100%| eval after 16: {'loss/eval': '1'}",
        TRAIN_LINE.encode(),
    ]
    log.write_bytes(b"\n".join(lines))
    read = metrics.read_log(log)
    assert [record.values["loss/eval"] for record in read.evaluations] == [2, 1]
    assert read.last_step == metrics.parse_line(TRAIN_LINE)
    assert read.unreadable == 0
    assert (read.model_commit, read.data_commit) == ("1" * 40, "2" * 40)


STEP = (
    "train stats after 32 examples: {'loss/train': '0.69315', 'rewards_train/margins': '-1e-05', 'counters/updates': 2}"
)
LINES = st.one_of(
    st.sampled_from([
        STEP, STEP.replace("32", "64"), STEP.replace("'-1e-05'", "'nan'"), STEP.replace("'-1e-05'", "'-1e-05"),
        STEP.replace("'-1e-05'", "-1e-05"), STEP.replace("'-1e-05'", "'1..5'"), STEP.replace("'-1e-05'", "True"),
        STEP.replace("train stats", "eval").replace(" examples", ""), "a bar 3%|" + STEP, STEP + " and more",
        "skipping logging after 48 examples to avoid logging too frequently", "=== ambersafe: attempt 2",
        "training on 96 examples in all", f"resolved model m to revision {'a' * 40}", "anything", "",
    ]),
    st.integers(0, len(STEP)).map(lambda n: STEP[:n]),
    st.integers(0, len(STEP)).map(lambda n: STEP[:n] + STEP),
)  # fmt: skip


@given(lines=st.lists(LINES, max_size=12), ends=st.booleans())
def test_what_is_said_of_a_whole_log_is_what_its_lines_say_one_by_one(lines: list[str], ends: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "train.log"
        log.write_text("\n".join(lines) + "\n" * ends)
        every = list(metrics.read(log))
        records = [each for each in every if isinstance(each, metrics.Record)]
        found = metrics.read_log(log)
    steps = [each for each in records if each.kind == "train"]
    # as texts: nan is not equal to itself
    assert str(found.last_step) == str(steps[-1] if steps else None)
    assert str(list(found.evaluations)) == str([each for each in records if each.kind == "eval"])
    assert found.unreadable == sum(isinstance(each, metrics.Unreadable) for each in every)
    assert found.model_commit == next((each.commit for each in every if isinstance(each, metrics.Commit)), None)


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert list(metrics.read(tmp_path / "train.log")) == []
    assert metrics.read_log(tmp_path / "train.log").evaluations == ()


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    peaks = []
    for lines in (2_000, 40_000):
        log = tmp_path / f"{lines}.log"
        log.write_text((TRAIN_LINE + "\n") * lines + "eval after 64: {'loss/eval': '1'}\n")
        tracemalloc.start()
        assert len(metrics.read_log(log).evaluations) == 1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]

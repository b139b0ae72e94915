"""--tensorboard: what TensorBoard itself reads back from the event files, and that they never stop a training."""

import errno
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import made_runs
import pytest
from conftest import Ambersafe, only_run

# TensorBoard says on import that there is no TensorFlow; that is known.
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ambersafe_cli import journal, metrics, requests, runs, tensorboard_files
from ambersafe_cli.errors import UsageError


def read(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Of every tag, the points (step, value, seconds since 1970) that TensorBoard shows."""
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {tag: [(e.step, e.value, e.wall_time) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def loss(examples: int, value: float, attempt: int = 1) -> metrics.Record:
    return metrics.Record("train", examples, {"loss/train": value}, attempt, 1.7e9 + attempt * 1000 + examples)


def write(folder: Path, entries: list[metrics.Record], attempt: int) -> None:
    record: dict[str, Any] = {"tensorboard": True, "attempts": [{}] * attempt}
    with tensorboard_files.of_attempt(folder, record) as take:
        for entry in entries:
            take(entry)


def test_a_stage_writes_what_it_logs_at_the_times_of_its_journal(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path
) -> None:
    done = ambersafe(
        "sft", "--model", tmp_path, "--no-preflight", "--exp-name", "run", "--tensorboard", env={"FAKE": "train"}
    )
    assert done.returncode == 0, done.stderr
    run = only_run(fake_clone.parent, "run")
    times = {
        each.examples: each.time
        for each in journal.read(run)
        if isinstance(each, metrics.Record) and each.kind == "train"
    }
    found = read(run)
    assert found["loss/train"] == [(16, 2.0, times[16])]
    assert [(step, value) for step, value, _ in found["loss/eval"]] == [(0, 2.5), (16, 1.25)]
    assert json.loads((run / "run.json").read_text())["tensorboard"] is True
    assert "--tensorboard" in json.loads((run / "run.json").read_text())["next_command"]


def test_a_later_attempt_goes_on_in_the_same_axis_and_takes_the_place_of_what_it_does_again(tmp_path: Path) -> None:
    write(tmp_path, [loss(16, 1.0), loss(32, 2.0), loss(48, 3.0)], attempt=1)
    write(tmp_path, [loss(32, 20.0, 2), loss(48, 30.0, 2), loss(64, 40.0, 2)], attempt=2)
    assert [(step, value) for step, value, _ in read(tmp_path)["loss/train"]] == [
        (16, 1.0), (32, 20.0), (48, 30.0), (64, 40.0),
    ]  # fmt: skip


def test_a_resumed_run_goes_on_writing_them(ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path) -> None:
    ambersafe("sft", "--model", tmp_path, "--no-preflight", "--exp-name", "run", "--tensorboard", env={"FAKE": "crash"})
    run = only_run(fake_clone.parent, "run")
    done = ambersafe("resume", "--allow-modified", env={"FAKE": "train"})
    assert done.returncode == 0, done.stderr
    assert [value for _, value, _ in read(run)["loss/train"]] == [2.0]


def test_without_the_flag_there_are_none(tmp_path: Path) -> None:
    with tensorboard_files.of_attempt(tmp_path, {"attempts": [{}]}) as take:
        take(loss(16, 1.0))
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_seen_at_once_also_behind_a_torn_end(tmp_path: Path) -> None:
    record = {"tensorboard": True, "attempts": [{}]}
    with tensorboard_files.of_attempt(tmp_path, record) as take:
        take(loss(16, 1.0))
        assert len(read(tmp_path)["loss/train"]) == 1
        take(loss(32, 2.0))
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    write(tmp_path, [loss(32, 3.0, 2)], attempt=2)
    assert [value for _, value, _ in read(tmp_path)["loss/train"]] == [1.0, 3.0]


def test_numbers_that_are_none_and_lines_that_cannot_be_read_stop_nothing(tmp_path: Path) -> None:
    record = {"tensorboard": True, "attempts": [{}]}
    with tensorboard_files.of_attempt(tmp_path, record) as take:
        for entry in (metrics.Unreadable("train stats after"), loss(16, math.nan), loss(32, 1e300)):
            take(entry)
    (first, second) = read(tmp_path)["loss/train"]
    assert math.isnan(first[1])
    assert second[1] == math.inf


@pytest.mark.parametrize("place", ["tensorboard", "tensorboard/events.out.tfevents.ambersafe-attempt-0001"])
def test_a_place_that_cannot_be_written_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    if place == "tensorboard":
        (tmp_path / place).write_text("in the way")
    else:
        (tmp_path / place).mkdir(parents=True)
    write(tmp_path, [loss(16, 1.0), loss(32, 1.0)], attempt=1)
    assert capsys.readouterr().err.count("are not whole") == 1


def test_a_disk_that_gets_full_stops_the_files_not_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"tensorboard": True, "attempts": [{}]}
    with tensorboard_files.of_attempt(tmp_path, record) as take:
        take(loss(16, 1.0))

        def fail(self: object, data: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", fail)
            take(loss(32, 2.0))
        take(loss(48, 3.0))
    assert capsys.readouterr().err.count("No space left") == 1
    assert len(read(tmp_path)["loss/train"]) == 1


def test_they_are_made_of_a_run_that_has_ended_in_place_of_those_it_wrote(ambersafe: Ambersafe, tmp_path: Path) -> None:
    entries = made_runs.records("dpo", 20)
    run = made_runs.by_hand(tmp_path / "work" / "run", "dpo", entries)
    write(run, [loss(16, 9.0)], attempt=1)
    for _ in range(2):
        done = ambersafe("plot", "--tensorboard", "run")
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{run / 'tensorboard'}\n"
        found = read(run)
        assert [step for step, _, _ in found["loss/train"]] == [16 * n for n in range(1, 21)]
        step, value, at = found["rewards_eval/margins"][0]
        assert (step, at) == (0, 1.7e9 + 1)
        assert value == pytest.approx(2 / 21)
    (run / "metrics.jsonl").unlink()
    (run / "train.log").write_text(made_runs.as_log(entries))
    os.utime(run / "train.log", (1.6e9, 1.6e9))
    assert ambersafe("plot", "--tensorboard", "run").returncode == 0
    step, value, at = read(run)["loss/train"][0]
    assert (step, at) == (16, 1.6e9)
    assert value == pytest.approx(2 - 1 / 21, abs=1e-4)


@pytest.mark.parametrize("attempt", [1, 2])
def test_what_is_done_again_in_the_journal_takes_the_place_of_the_first(attempt: int, tmp_path: Path) -> None:
    steps = [loss(16, 1.0), loss(32, 2.0), loss(32, 3.0, attempt), loss(48, 4.0, attempt)]
    made_runs.by_hand(tmp_path / "run", "sft", steps)
    tensorboard_files.make(tmp_path / "run")
    assert [value for _, value, _ in read(tmp_path / "run")["loss/train"]] == [1.0, 3.0, 4.0]


def test_without_the_package_it_names_the_extra_before_anything_starts(
    fake_clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ambersafe_cli import recipe as recipes
    from ambersafe_cli import stages

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.chdir(fake_clone.parent)
    flags = recipes.Flags({"model.name_or_path": str(tmp_path)}, None, None)
    asked = requests.Request("sft", "tiny", flags, (), fake_clone, sys.executable, None, tensorboard=True)
    with pytest.raises(UsageError) as raised:
        stages.run(asked)
    assert raised.value.hint == "pip install 'ambersafe-cli[tensorboard]'"
    assert not runs.folder_of_runs().exists()
    # A run that had it and is resumed without goes on.
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    write(tmp_path, [loss(16, 1.0)], attempt=1)
    assert "are not whole" in capsys.readouterr().err

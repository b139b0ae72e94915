"""--wandb: upstream's own logging, end to end, without a login and without a network."""

import os
from pathlib import Path

import pytest
from conftest import only_run, records_of, run_ambersafe
from test_real_upstream import TINY, model, rows  # noqa: F401, fixtures
from test_tensorboard import read


@pytest.mark.slow
def test_offline_it_logs_every_record_into_the_run_folder_and_tensorboard_has_the_same(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    given = ("--dir", patched, "--model", model, "--data", rows, "--trainer", "BasicTrainer", "--exp-name", "run")
    environment = {
        **{name: "" for name in os.environ if name.startswith("WANDB_")},
        "WANDB_MODE": "offline",
        "HOME": str(home),
    }
    settings = (*TINY, "wandb.project=mine", "n_epochs=1")
    done = run_ambersafe(
        "sft", *given, "--no-preflight", "--wandb", "--tensorboard", *settings, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path, "run")
    (kept,) = (run / "wandb").glob("offline-run-*/*.wandb")
    logged = kept.read_bytes()
    records = records_of(run)
    train = [each for each in records if each.kind == "train"]
    assert len(train) > 3
    for key in ("loss/train", "grad_norm", "logps_eval/chosen"):
        wanted = sum(key in each.values for each in records)
        assert logged.count(key.encode()) >= wanted, key
    assert logged.count(f"{train[-1].examples}".encode()) >= 1
    assert [path.name for path in tmp_path.iterdir() if "wandb" in path.name] == []
    for key, points in read(run).items():
        expected = [(each.examples, each.values[key]) for each in records if key in each.values]
        assert [step for step, _, _ in points] == [step for step, _ in expected], key
        assert [value for _, value, _ in points] == pytest.approx([value for _, value in expected], rel=1e-6), key

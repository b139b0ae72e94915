"""Which weights a name, a path or a checkpoint stands for, and runs that upstream made without us."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ambersafe

from ambersafe_cli import models, runs
from ambersafe_cli.errors import ArchiveError, UsageError

CONFIG = """
exp_name: mine
loss: {name: %s, beta: 0.1}
model: {name_or_path: some/model, archive: %s, tokenizer_name_or_path: null}
batch_size: 4
"""

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make the folder of a run that upstream made by hand, with checkpoints at these places."""
    (tmp_path / "work").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "work")

    def make(
        name: str, loss: str = "sft", archive: object = "null", checkpoints: tuple[str, ...] = ("LATEST",)
    ) -> Path:
        folder = runs.folder_of_runs() / name
        for place in checkpoints:
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / "policy.pt").write_text("weights")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(CONFIG % (loss, archive))
        return folder

    return make


def test_a_run_that_was_made_by_hand_is_shown_with_what_is_known(make: Make, ambersafe: Ambersafe) -> None:
    make("mine_1")
    done = ambersafe("show", "mine_1")
    assert done.returncode == 0, done.stderr
    assert "mine_1: sft, made by hand" in done.stdout
    assert "some/model" in done.stdout
    assert "next: ambersafe export" in done.stdout
    assert "clone       not known" in done.stdout
    assert json.loads(ambersafe("show", "--json", "mine_1").stdout)["data"]["name"] is None


@pytest.mark.parametrize("place", ["LATEST", ".", "step-20"])
def test_the_checkpoint_of_a_run_is_found_wherever_upstream_put_it(make: Make, place: str) -> None:
    folder = make("mine_1", checkpoints=(place,))
    for text in ("mine_1", str(folder), str(folder / place / "policy.pt")):
        weights = models.find(text)
        assert weights.checkpoint == folder / place / "policy.pt"
        assert (weights.model, weights.label) == ("some/model", "sft")


def test_one_checkpoint_of_a_run_can_be_meant(make: Make) -> None:
    folder = make("mine_1", checkpoints=("LATEST", "step-20"))
    assert models.find(str(folder / "step-20")).checkpoint == folder / "step-20" / "policy.pt"
    assert models.find("mine_1").checkpoint == folder / "LATEST" / "policy.pt"


def test_a_run_without_a_checkpoint_is_said(make: Make) -> None:
    make("mine_1", checkpoints=())
    with pytest.raises(ArchiveError, match="no checkpoint"):
        models.find("mine_1")


def test_a_policy_pt_of_no_run_needs_the_model_it_is_of(tmp_path: Path) -> None:
    (tmp_path / "policy.pt").write_text("weights")
    with pytest.raises(UsageError, match="no run's folder"):
        models.find(str(tmp_path / "policy.pt"))
    assert models.find(str(tmp_path / "policy.pt"), "some/model").model == "some/model"


def test_models_are_named_by_a_folder_or_on_the_hub(tmp_path: Path, make: Make) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert models.find(str(tmp_path / "m")).checkpoint is None
    assert models.find("org/name").model == "org/name"
    for text in ("nothing", "/no/such", "a b/c", "", "."):
        with pytest.raises(UsageError):
            models.find(text)


def test_a_dpo_run_comes_from_the_base_and_the_sft_run(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    sft = make("sft_1")
    make("dpo_1", "dpo", sft / "LATEST" / "policy.pt")
    found = models.lineage(runs.open_run("dpo_1"))
    assert [each.label for each in found] == ["base", "sft", "dpo"]
    assert [each.checkpoint is None for each in found] == [True, False, False]
    (sft / "LATEST" / "policy.pt").unlink()
    assert [each.label for each in models.lineage(runs.open_run("dpo_1"))] == ["base", "dpo"]
    assert "is gone" in capsys.readouterr().err


def test_rewards_are_against_what_the_training_had_as_its_reference(make: Make) -> None:
    sft = make("sft_1")
    archive = sft / "LATEST" / "policy.pt"
    dpo = runs.open_run(str(make("dpo_1", loss="dpo", archive=archive)))
    assert models.reference_of(dpo).checkpoint == archive
    assert models.reference_of(dpo).label == "sft"
    more_sft = make("sft_2", archive=archive)
    for folder in (sft, more_sft):
        assert models.reference_of(runs.open_run(str(folder))).checkpoint is None, "the base model"
    (sft / "config.yaml").unlink()
    assert models.reference_of(dpo).label == "archive"
    archive.unlink()
    with pytest.raises(ArchiveError, match="is gone"):
        models.reference_of(dpo)


def test_a_name_that_no_disk_could_have_is_no_defect(make: Make) -> None:
    for name in ("x" * 300, "~nobody-of-that-name", f"org/{'x' * 300}"):
        with pytest.raises(UsageError):
            models.find(name if "/" not in name else name + "/x")

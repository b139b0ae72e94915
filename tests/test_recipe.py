"""Recipes, and how flags and KEY=VALUE win over them."""

from pathlib import Path
from typing import Any

import pytest

from ambersafe_cli import recipe
from ambersafe_cli.errors import DataError, RecipeError, UsageError
from ambersafe_cli.overrides import Value

BOTH = {
    "model": "blank_model",
    "model.name_or_path": "LLM360/AmberChat",
    "model.block_name": "LlamaDecoderLayer",
    "datasets": ["saferlhf"],
    "max_length": 512,
    "max_prompt_length": 256,
    "eval_batch_size": 32,
    "n_epochs": 3,
    "trainer": "FSDPTrainer",
    "sample_during_eval": False,
}
SFT = {
    "loss": "sft",
    "exp_name": "saferlhf_sft_ambersafe",
    "batch_size": 64,
    "gradient_accumulation_steps": 2,
    "lr": 2e-7,
}
DPO = {
    "loss": "dpo",
    "loss.beta": 0.1,
    "exp_name": "saferlhf_dpo_ambersafe",
    "batch_size": 32,
    "gradient_accumulation_steps": 4,
    "lr": 5e-7,
}
CHANGES_NO_NUMBER = {
    "do_final_eval": True,
    "wandb.enabled": False,
    "minimum_log_interval_secs": 0,
    "stop_on_nan": True,
    "save_on_signal": True,
    "keep_checkpoints": 2,
    "sort_by_length": True,
    "response_logits_only": True,
    "prefetch_batches": 2,
}


def resolve(
    stage: recipe.StageName = "sft", overrides: tuple[str, ...] = (), data: str | None = None, **flags: Value
) -> recipe.Stage:
    values = {name.replace("__", "."): value for name, value in flags.items()}
    return recipe.resolve(stage, recipe.load("ambersafe"), recipe.Flags(values, data), overrides)


@pytest.mark.parametrize(("stage", "own"), [("sft", SFT), ("dpo", DPO)])
def test_default_recipe_holds_ambersafes_values_and_nothing_else_that_changes_a_number(
    stage: recipe.StageName, own: dict[str, Value]
) -> None:
    cache = {"cache_reference": True} if stage == "dpo" else {}
    assert recipe.load(recipe.DEFAULT).values[stage] == BOTH | own | CHANGES_NO_NUMBER | cache


def test_default_recipe_takes_the_rows_that_ambersafe_was_trained_on() -> None:
    stage = resolve()
    assert (stage.data, stage.data_revision) == ("PKU-Alignment/PKU-SafeRLHF", "v0")


def test_flags_win_over_the_recipe_and_overrides_over_flags() -> None:
    stage = resolve(lr=1e-3, batch_size=8, overrides=("batch_size=4", "warmup_steps=7"))
    assert stage.get("lr") == 1e-3
    assert stage.get("batch_size") == 4
    assert stage.get("n_epochs") == 3
    assert "batch_size" not in stage.values, "Hydra is told once"


def test_another_model_group_takes_the_recipes_values_for_the_old_one_away() -> None:
    stage = resolve(overrides=("model=pythia28",))
    assert not [key for key in stage.values if key.startswith("model.")]
    assert stage.model == "pythia28"


def test_a_run_without_saferlhf_asks_for_no_rows() -> None:
    stage = resolve(data="./not/there", overrides=("datasets=[hh,shp]",))
    assert (stage.data, stage.data_revision) == ("", None)
    assert stage.get("datasets") == ["hh", "shp"]


def test_a_value_set_later_wins_over_an_override() -> None:
    stage = resolve(overrides=("trainer=FSDPTrainer",)).with_values({"trainer": "BasicTrainer"})
    assert stage.trainer == "BasicTrainer"
    assert not stage.overrides


def test_the_revision_of_the_recipe_does_not_stick_to_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(data="org/other").data_revision is None
    assert resolve(data=str(tmp_path)).data_revision is None
    monkeypatch.setenv("SAFERLHF_DATASET", "org/other")
    stage = resolve()
    assert (stage.data, stage.data_revision) == ("org/other", None)


def test_the_environment_says_where_rows_are_if_no_flag_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFERLHF_DATASET", str(tmp_path))
    assert resolve().data == str(tmp_path)
    assert resolve(data="org/name").data == "org/name"


def test_a_local_model_and_local_data_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a model").mkdir()
    Path("rows.jsonl").touch()
    stage = resolve(model__name_or_path="a model", data="rows.jsonl")
    assert stage.model == str(tmp_path / "a model")
    assert stage.data == str(tmp_path / "rows.jsonl")
    assert resolve(overrides=("model.name_or_path='a model'",)).model == str(tmp_path / "a model")


@pytest.mark.parametrize("data", ["./nothing", "rows.jsonl", "a/b/c", "/no/such/folder", "x.parquet", "~/rows"])
def test_data_that_is_not_there_is_an_error_that_names_it(data: str) -> None:
    with pytest.raises(DataError, match=data):
        resolve(data=data)


def test_a_revision_of_a_local_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="local path"):
        recipe.resolve("sft", recipe.load("ambersafe"), recipe.Flags({}, str(tmp_path), "v0"), ())


@pytest.mark.parametrize(
    ("flags", "overrides", "message"),
    [
        ({}, ("loss=sft",), "trains with loss=dpo, not loss=sft"),
        ({"exp_name": "a/b"}, (), "exp_name names a folder"),
        ({"exp_name": ".."}, (), "exp_name names a folder"),
        ({}, ("exp_name=7",), "exp_name names a folder"),
        ({"max_length": 256}, (), "nothing is left for a response"),
        ({"model__name_or_path": "./no_model"}, (), "no model folder ./no_model"),
    ],
)
def test_what_contradicts_itself_is_refused(flags: dict[str, Any], overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve("dpo", overrides=overrides, **flags)


def test_a_recipe_without_a_model_asks_for_one() -> None:
    with pytest.raises(UsageError, match="The recipe tiny names no model") as raised:
        recipe.resolve("sft", recipe.load("tiny"), recipe.Flags({}), ())
    assert "--model" in raised.value.hint


def test_a_recipe_by_its_path_with_its_own_data(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data: org/rows\ndata_revision: abc\nboth: {model.name_or_path: m, exp_name: e, datasets: [saferlhf]}\n"
        "sft: {lr: 5e-7}\n"
    )
    stage = recipe.resolve("sft", recipe.load(str(path)), recipe.Flags({}), ())
    assert (stage.model, stage.get("lr"), stage.data, stage.data_revision) == ("m", 5e-7, "org/rows", "abc")
    assert stage.recipe == str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "a recipe is a mapping"),
        ("both: {a: [}", "Cannot read the recipe"),
        ("bth: {}\n", "unknown key bth"),
        ("both: 3\n", "both must be a mapping"),
        ("sft: {loss: {name: sft}}\n", "write loss.name"),
        ("sft: {day: [[1]]}\n", "day must be a plain value"),
        ("sft: {day: [{a: 1}]}\n", "day must be a plain value"),
        ("sft: {day: !!set {a}}\n", "Cannot read the recipe"),
        ("sft: {day: !!int ''}\n", "IndexError"),
        (f"sft: {{lr: 1{'0' * 5000}}}\n", "Cannot read the recipe"),
        (f"sft: {{lr: {2**63}}}\n", "a number of more than 64 bits"),
        (f"sft: {'[' * 10_000}", "RecursionError"),
        ("sft: &all {a: *all}\n", "an alias of a list or mapping"),
        ("data: 3\n", "data must be a text"),
        ("\0", "Cannot read the recipe"),
    ],
)
def test_a_malformed_recipe_is_an_error_that_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as raised:
        recipe.load(str(path))
    assert str(path) in raised.value.message


def test_a_recipe_that_is_not_there_is_an_error_that_lists_those_that_are() -> None:
    with pytest.raises(RecipeError, match="no recipe best-ever") as raised:
        recipe.load("best-ever")
    assert "ambersafe, ambersafe-lora, ambersafe-qlora, best, tiny" in raised.value.hint

"""Input that is wrong in ways nobody thinks of: names that mean something to others, rows of another type."""

import contextlib
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_runs
import pytest
import yaml
from conftest import Ambersafe

from ambersafe_cli import cli, clone_config, data, origins, recipe, runs, value_findings
from ambersafe_cli.errors import AmberSafeError, CloneError, DataError, RunFolderError

Row = dict[str, Any]


def rows(number: int, name: str = "p") -> list[Row]:
    row = {"response_0": "a", "response_1": "b", "is_response_0_safe": True, "is_response_1_safe": False}
    return [{"prompt": f"{name}{i}", **row, "safer_response_id": 0} for i in range(number)]


def as_jsonl(path: Path, found: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def as_json(path: Path, found: list[Row]) -> Path:
    path.write_text(json.dumps(found))
    return path


def as_csv(path: Path, found: list[Row]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    return path


def as_parquet(path: Path, found: list[Row]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(found), path)
    return path


# --- names ---


@pytest.mark.parametrize("name", ["data*", "data?x", "data[s]", "a::b", "two\nlines"])
def test_a_folder_is_refused_whose_name_datasets_takes_for_more_than_that(tmp_path: Path, name: str) -> None:
    for each in (name, "data_other", "datasx"):
        (tmp_path / each).mkdir()
        as_jsonl(tmp_path / each / "rows.jsonl", rows(30, each))
    for place in (tmp_path / name, tmp_path / name / "inner"):
        place.mkdir(exist_ok=True)
        as_jsonl(place / "rows.jsonl", rows(30, name))
        with pytest.raises(DataError, match="by which `datasets` means other files") as caught:
            recipe.resolve_data(recipe.load("tiny"), recipe.Flags({}, str(place)))
        assert repr(str(place)) in caught.value.message
        assert caught.value.hint


@pytest.mark.parametrize("name", ["data*.jsonl", "data[s].jsonl", "data?.jsonl"])
def test_a_file_of_such_a_name_is_read_by_itself(tmp_path: Path, name: str) -> None:
    as_jsonl(tmp_path / "datas.jsonl", rows(30, "other"))
    as_jsonl(tmp_path / name, rows(40))
    place, _ = recipe.resolve_data(recipe.load("tiny"), recipe.Flags({}, str(tmp_path / name)))
    assert sum(split.rows for split in data.summarize(place, None).values()) == 40


def test_a_file_that_datasets_would_leave_away_is_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b::c.jsonl"):
        as_jsonl(tmp_path / name, rows(30))
    for place, named in ((tmp_path, "b::c.jsonl"), (tmp_path / "b::c.jsonl", "b::c.jsonl")):
        with pytest.raises(DataError, match=named):
            recipe.resolve_data(recipe.load("tiny"), recipe.Flags({}, str(place)))


@pytest.mark.parametrize("command", ["sft", "dpo", "check sft", "data", "plan --gpu 24GB", "pipeline", "evaluate o/m"])
def test_every_command_that_takes_data_refuses_a_pattern(ambersafe: Ambersafe, tmp_path: Path, command: str) -> None:
    for name in ("data*", "data_other"):
        (tmp_path / "work" / name).mkdir()
        as_jsonl(tmp_path / "work" / name / "rows.jsonl", rows(30))
    done = ambersafe(*command.split(), "--data", "./data*")
    assert done.returncode == 65, done.stderr
    assert "data*' has '*' in it" in done.stderr


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "x" * 300])
@pytest.mark.parametrize(
    "given",
    [
        ("sft", "--recipe"), ("sft", "--model"), ("sft", "--data"), ("sft", "--dir"), ("dpo", "--archive"),
        ("status", "--dir"), ("status", "--python"), ("data", "--data"), ("evaluate", "o/m", "--pairs"),
        ("evaluate", "o/m", "--dir"), ("sample", "o/m", "--prompts"), ("plot", "r", "--out"), ("report", "--out"),
        ("export", "r", "--out"), ("prefetch", "--recipe"), ("recipes",), ("sft", "local_run_dir"),
    ],
)  # fmt: skip
def test_a_path_that_the_system_cannot_look_at_is_a_wrong_one_and_no_defect(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path, given: tuple[str, ...], path: str
) -> None:
    *words, last = given
    more = [f"{last}={path}", "--model", tmp_path] if last == "local_run_dir" else [last, path]
    done = ambersafe(*words, *more, env={"HF_HUB_OFFLINE": "0" if "prefetch" in given else "1"})
    assert done.returncode == 64, done.stderr
    assert path in done.stderr
    assert "defect" not in done.stderr


# --- rows ---

ODD: list[tuple[Row, str]] = [
    ({"prompt": 5}, "column prompt holds a number (5), it must hold a text"),
    ({"response_0": ["x"]}, "column response_0 holds a list (['x']), it must hold a text"),
    ({"response_1": None}, "column response_1 holds nothing, it must hold a text"),
    ({"is_response_0_safe": "yes"}, "column is_response_0_safe holds a text ('yes'), it must hold true or false"),
    ({"is_response_1_safe": 1}, "column is_response_1_safe holds a number (1), it must hold true or false"),
]


@pytest.mark.parametrize("make", [as_jsonl, as_json])
@pytest.mark.parametrize(("change", "said"), ODD)
def test_a_row_of_another_type_is_named_with_its_file_number_and_column(
    make: Callable[[Path, list[Row]], Path], change: Row, said: str, tmp_path: Path
) -> None:
    found = rows(40)
    found[16].update(change)
    path = make(tmp_path / f"rows.{make.__name__[3:]}", found)
    with pytest.raises(DataError) as caught:
        data.summarize(str(path), None)
    assert f"{path}, row 17: {said}" in caught.value.message
    assert "arrow.json" not in caught.value.message


@pytest.mark.parametrize("value", ["yes", "1", ""])
def test_the_same_in_csv_where_all_is_text(tmp_path: Path, value: str) -> None:
    found = rows(40)
    found[16]["is_response_0_safe"] = value
    path = as_csv(tmp_path / "rows.csv", found)
    with pytest.raises(DataError) as caught:
        data.summarize(str(path), None)
    assert f"{path}, row 17: column is_response_0_safe holds " in caught.value.message
    assert "it must hold true or false" in caught.value.message


def test_the_same_in_parquet_where_a_column_has_one_type(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "rows.parquet", [{**row, "is_response_0_safe": "yes"} for row in rows(40)])
    with pytest.raises(DataError) as caught:
        data.summarize(str(path), None)
    assert f"{path}, row 1: column is_response_0_safe holds a text ('yes')" in caught.value.message


@pytest.mark.parametrize("make", [as_jsonl, as_json, as_csv, as_parquet])
@pytest.mark.parametrize(("column", "values"), [("is_response_0_safe", (True, "yes")), ("safer_response_id", (0, [1]))])
def test_of_several_files_the_one_is_named_that_holds_another_type(
    make: Callable[[Path, list[Row]], Path], column: str, values: tuple[Any, Any], tmp_path: Path
) -> None:
    ending = make.__name__[3:]
    make(tmp_path / f"a.{ending}", [{**row, column: values[0]} for row in rows(30, "x")])
    path = make(tmp_path / f"b.{ending}", [{**row, column: values[1]} for row in rows(40)])
    with pytest.raises(DataError) as caught:
        data.summarize(str(tmp_path), None)
    assert f"{path}, row 1: column {column} holds " in caught.value.message
    assert "it must hold true or false" in caught.value.message or "in the files before it" in caught.value.message


def test_a_row_that_is_no_json_or_no_object_is_named(tmp_path: Path) -> None:
    for line, said in (("{", "cannot be read"), ("[1]", "is no object")):
        path = as_jsonl(tmp_path / "rows.jsonl", rows(40))
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(DataError, match=rf"rows\.jsonl, row 41 {said}"):
            data.summarize(str(path), None)


# --- files of a run ---

COMMANDS = (
    "show run", "show run --json", "watch run --plain", "watch run", "plot run", "report run", "resume run", "stop run",
    "reproduce run", "evaluate run", "sample run", "export run",
)  # fmt: skip


def error_of(*words: object) -> AmberSafeError | None:
    """What a command ends with that is wrong, run in this process; no other exception may come out of it."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.app([str(word) for word in words], prog_name="ambersafe", standalone_mode=False)
        except AmberSafeError as error:
            assert type(error) is not AmberSafeError, error
            return error
    return None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DPO run with metrics in a working folder, which is that of this process."""
    monkeypatch.chdir(tmp_path)
    return made_runs.recorded(runs.folder_of_runs() / "run", "dpo", made_runs.records("dpo", 8))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"stage": "kto"}, "stage"), ({"stage": "../sft"}, "stage"), ({"stage": ["sft"]}, "stage"),
        ({"slurm": [1]}, "slurm"), ({"slurm": 3}, "slurm"), ({"slurm": {"job_id": "7"}}, "slurm"),
        ({"slurm": {"job_id": ["7"], "nodes": 1, "processes": 1}}, "slurm.job_id"),
        ({"machines": {"more": 1}}, "machines"), ({"machines": {"count": "2"}}, "machines"),
        ({"machines": [1]}, "machines"), ({"processes": "two"}, "processes"), ({"processes": 0}, "processes"),
        ({"archive": {"a": 1}}, "archive"), ({"archive": "\0"}, "archive"), ({"values": {"lr": {"a": 1}}}, "values"),
        ({"overrides": [{"a": 1}]}, "overrides"), ({"attempts": [{"host": {}}]}, "attempts"),
        ({"last_metrics": {"loss/eval": "low"}}, "last_metrics"), ({"planned_examples": -1}, "planned_examples"),
        ({"data": {"name": {"a": 1}}}, "data.name"), ({"data": {"counts": {"train": None}}}, "data.counts"),
    ],
)  # fmt: skip
def test_a_record_of_another_shape_is_an_error_that_names_file_and_key(
    run: Path, change: dict[str, Any], key: str
) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, **change}))
    for command in COMMANDS:
        error = error_of(*command.split())
        assert isinstance(error, RunFolderError), command
        assert f"{run / 'run.json'} has a {key!r} that is " in error.message
        assert error.hint
    assert error_of("runs") is None, "the others are still listed"


def test_a_number_without_end_in_a_record_is_said(run: Path) -> None:
    record = (run / "run.json").read_text()
    (run / "run.json").write_text(record.replace("{", f'{{"planned_examples": 1{"0" * 400}, ', 1))
    for command in COMMANDS:
        error = error_of(*command.split())
        assert isinstance(error, RunFolderError)
        assert "a number of 401 digits" in error.message


@pytest.mark.parametrize("command", ["show run", "plot run", "plot run --tensorboard", "report run"])
@pytest.mark.parametrize("line", [
    '{"kind": "train", "time": 1e300, "attempt": 1, "examples": 16, "loss/train": 1}',
    '{"kind": "train", "time": 1.7e9, "attempt": 1, "examples": 1%s, "loss/train": 1}' % ("0" * 400),
    '{"kind": "train", "time": 1.7e9, "attempt": 1, "examples": 16, "\\ud800": 1}',
])  # fmt: skip
def test_metrics_of_no_run_are_left_away(run: Path, command: str, line: str) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    assert error_of(*command.split()) is None


@pytest.mark.parametrize("command", ["evaluate run", "sample run --prompts prompts.txt"])
@pytest.mark.parametrize(
    ("config", "key"),
    [("max_length: [1]", "max_length"), ("max_prompt_length: 0", "max_prompt_length"), ("datasets: 3", "datasets")]
    + [("trainer: [a]", "trainer"), ("template: alpaca", "template"), ("keep_eos: 3", "keep_eos")],
)
def test_a_setting_that_no_run_can_have_is_named(run: Path, command: str, config: str, key: str) -> None:
    Path("prompts.txt").write_text("Hello\n")
    (run / "config.yaml").write_text(config)
    (run / "LATEST").mkdir()
    (run / "LATEST" / "policy.pt").touch()
    error = error_of(*command.split())
    assert isinstance(error, RunFolderError)
    assert f"{run}: its {key} is " in error.message


def test_a_date_in_a_config_is_a_text_as_it_is_for_hydra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = made_runs.by_hand(runs.folder_of_runs() / "run", "sft")
    (folder / "config.yaml").write_text("exp_name: 2026-01-01\nloss: {name: sft}\nmodel: {name_or_path: some/model}")
    assert error_of("show", folder, "--json") is None


GOOD = {
    **dict.fromkeys(("batch_size", "gradient_accumulation_steps", "eval_batch_size", "eval_every", "max_length"), 8),
    "max_prompt_length": 4,
    "n_eval_examples": 8,
    "n_epochs": 1,
    "n_examples": 8,
    "save_every_examples": 8,
    "keep_checkpoints": 1,
    "warmup_steps": 0,
    "lr": 1e-6,
    "max_grad_norm": 1.0,
    "save_every_minutes": 5.0,
    "wandb": {"enabled": False},
    "keep_best": None,
    "seed": 0,
    "trainer": "BasicTrainer",
    "optimizer": "RMSprop",
}


@pytest.mark.parametrize(
    "key", [key for key, value in GOOD.items() if type(value) is int and key not in ("warmup_steps", "seed")]
)
@pytest.mark.parametrize("value", [0, -1, True, 1.5, "8", 2**63])
def test_what_has_to_be_a_count_is_said_if_it_is_none(key: str, value: object) -> None:
    of = {each.what for each in value_findings.of_values("sft", {**GOOD, key: value})}
    assert any(what.startswith(f"{key} must be a whole number from 1 on") for what in of), of
    least = {each.what for each in value_findings.of_values("sft", {**GOOD, key: 1})}
    assert not any(what.startswith(f"{key} must be") for what in least), least


@pytest.mark.parametrize("key", ["lr", "max_grad_norm", "save_every_minutes", "warmup_steps"])
def test_what_has_to_be_a_number_is_said_if_it_is_none(key: str) -> None:
    for value in (-1, -1e-9, float("inf"), float("nan"), True, "1", *([] if key == "warmup_steps" else [0])):
        of = {each.what for each in value_findings.of_values("sft", {**GOOD, key: value})}
        assert any(what.startswith(f"{key} must be a number") for what in of), (value, of)
    assert not any(f"{key} must" in each.what for each in value_findings.of_values("sft", GOOD))


def test_a_name_that_is_too_long_for_a_file_is_none_of_a_local_path() -> None:
    assert origins.is_on_hub(300 * "m")


# --- upstream's config in the clone ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "is no mapping of keys"), ("1: 2\n", "is no mapping of keys"), ("lr: 1\n", "lacks batch_size"),
        ("a: [", "Cannot read upstream's config"),
        (b"\xff\xfe", "Cannot read upstream's config"), ("[" * 10_000, "Cannot read upstream's config"),
        ("batch_size: {a: 1}\n", "batch_size must be a plain value"), ("lr: [[1]]\n", "lr must be a plain value"),
        ("wandb: true\n", "wandb must be a mapping"), ("seed: &a {b: *a}\n", "an alias of a list or mapping"),
    ],
)  # fmt: skip
def test_a_config_of_the_clone_that_is_not_upstreams_is_an_error(tmp_path: Path, text: str | bytes, said: str) -> None:
    good = {**dict.fromkeys(clone_config.NEEDED, 1), "wandb": {"enabled": False}}
    flags: dict[str, Any] = {"model.name_or_path": "m", "datasets": ["hh"]}
    stage = recipe.resolve("sft", recipe.load("tiny"), recipe.Flags(flags), ())
    for group in ("model", "loss"):
        (tmp_path / "config" / group).mkdir(parents=True)
        (tmp_path / "config" / group / f"{stage.get(group)}.yaml").write_text("name: sft\n")
    path = tmp_path / "config" / "config.yaml"
    path.write_text(yaml.safe_dump(good))
    assert clone_config.of_clone(tmp_path, stage)["model.name"] == "sft"
    key = text.partition(":")[0] if isinstance(text, str) else ""
    rest = yaml.safe_dump({name: value for name, value in good.items() if name != key}) if key in good else ""
    path.write_bytes(text if isinstance(text, bytes) else ("" if "lacks" in said else rest).encode() + text.encode())
    with pytest.raises(CloneError) as caught:
        clone_config.of_clone(tmp_path, stage)
    assert str(path) in caught.value.message
    assert said in caught.value.message
    assert "ambersafe setup" in caught.value.hint

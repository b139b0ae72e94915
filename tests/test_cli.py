"""What every command does at its edges: help, versions, wrong input, and how much it imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Ambersafe, make_repository

from ambersafe_cli import __version__

pytestmark = pytest.mark.cold

COMMANDS = (
    "setup", "sft", "dpo", "resume", "watch", "stop", "runs", "show", "plot", "report", "reproduce", "evaluate",
    "sample", "export", "data", "prefetch", "status", "recipes", "demo",
)  # fmt: skip
HEAVY = {
    "torch", "transformers", "datasets", "git", "numpy", "pyarrow", "pandas", "hydra", "omegaconf", "wandb",
    "matplotlib", "jinja2", "tensorboard",
}  # fmt: skip


def imported_by(*arguments: str, cwd: Path) -> set[str]:
    """The top-level modules that a command has imported when it ends."""
    code = (
        "import sys, atexit; "
        "atexit.register(lambda: print('IMPORTED', *{m.partition('.')[0] for m in sys.modules}, file=sys.stderr)); "
        "from ambersafe_cli.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True)
    return set(done.stderr.partition("IMPORTED ")[2].split())


@pytest.mark.parametrize("arguments", [("--help",), *((command, "--help") for command in COMMANDS)])
def test_help_imports_nothing_heavy_and_no_rich(arguments: tuple[str, ...], tmp_path: Path) -> None:
    imported = imported_by(*arguments, cwd=tmp_path)
    assert "typer" in imported
    assert not imported & (HEAVY | {"rich"})


def test_dry_run_imports_git_alone_of_what_is_heavy(fake_clone: Path, tmp_path: Path) -> None:
    imported = imported_by("sft", "--model", str(tmp_path), "--dry-run", cwd=fake_clone.parent)
    assert imported & HEAVY == {"git"}


def test_without_a_command_it_shows_its_help(ambersafe: Ambersafe) -> None:
    assert ambersafe().stdout == ambersafe("--help").stdout


def test_version_and_module_entry_point(ambersafe: Ambersafe) -> None:
    assert ambersafe("--version").stdout == f"ambersafe-cli {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("train",), 64, "No such command 'train'"),
        (("sft", "--bta", "1"), 64, "No such option: --bta"),
        (("dpo", "--beta", "high"), 64, "Invalid value for '--beta'"),
        (("dpo", "--beta", "-1"), 64, "Invalid value for '--beta'"),
        (("dpo", "--loss", "kto"), 64, "Invalid value for '--loss'"),
        (("sft", "--epochs", "0"), 64, "Invalid value for '--epochs'"),
        (("sft", "oops"), 64, "'oops' is neither a flag nor KEY=VALUE"),
        (("sft", "--recipe", "nope"), 67, "There is no recipe nope"),
        (("recipes", "nope"), 67, "There is no recipe nope"),
        (("sft", "--data", "no.jsonl"), 65, "There is no file or folder no.jsonl"),
        (("data", "--data", "no.jsonl"), 65, "There is no file or folder no.jsonl"),
        (("sft", "--data", ""), 64, "--data is empty"),
        (("sft", "--lr", "inf"), 64, "lr must be a number"),
        (("dpo", "--beta", "inf"), 64, "loss.beta must be a number above 0"),
        (("dpo", "--beta", "0"), 64, "loss.beta must be a number above 0"),
        (("sft", "--trainer", "Foo"), 64, "There is no trainer Foo"),
        (("sft", "--template", "alpaca"), 64, "Invalid value for '--template'"),
        (("dpo", "template=alpaca"), 64, "There is no template alpaca"),
        (("sft", "--keep", "0"), 64, "Invalid value for '--keep'"),
        (("sft", "--save-every", "5h"), 64, "Invalid value for '--save-every'"),
        (("sft", "--model", ".", "--model-revision", "v1"), 64, "is a local folder"),
        (("resume",), 64, "There is no unfinished run"),
        (("resume", "nothing"), 64, "There is no run nothing"),
        (("resume", "."), 64, "is not the folder of a run"),
        (("show",), 64, "There is no run under"),
        (("show", "nothing"), 64, "There is no run nothing"),
        (("show", ""), 64, "is not the folder of a run"),
        (("show", "x" * 300), 64, "There is no run xxx"),
        (("show", "~nobody-of-that-name"), 64, "There is no run ~nobody"),
        (("evaluate", "x", "--beta", "0"), 64, "--beta must be a number above 0"),
        (("evaluate", "x", "--limit", "0"), 64, "Invalid value for '--limit'"),
        (("evaluate", "nothing"), 64, "There is no run nothing"),
        (("evaluate", "x" * 300), 64, "There is no run xxx"),
        (("evaluate", "~nobody-of-that-name"), 64, "There is no run ~nobody"),
        (("sample", "x", "--temperature", "inf"), 64, "--temperature must be a number"),
        (("sample", "x", "--temperature", "-1"), 64, "Invalid value for '--temperature'"),
        (("sample", "x", "--prompts", "none.txt"), 65, "Cannot read the prompts in none.txt"),
        (("sft", "--model", "./no"), 64, "There is no model folder ./no"),
        (("sft",), 71, "There is no clone of upstream"),
        (("sft", "loss.x=${y}", "--exp-name", "${x}"), 71, "There is no clone of upstream"),
        (("status", "--python", "no-such-python"), 73, "There is no interpreter no-such-python"),
        (("status", "--python", "/bin/false"), 73, "does not work as a Python interpreter"),
        (("setup", "--repo", "/no/such/repository"), 69, "Cannot clone /no/such/repository"),
    ],
)
def test_wrong_input_gives_one_clear_message_and_changes_nothing(
    ambersafe: Ambersafe, tmp_path: Path, arguments: tuple[str, ...], status: int, message: str
) -> None:
    done = ambersafe(*arguments)
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
    assert not list((tmp_path / "work").iterdir())


def test_debug_shows_a_traceback_wherever_it_stands(ambersafe: Ambersafe) -> None:
    for arguments in (("--debug", "sft"), ("sft", "--debug")):
        done = ambersafe(*arguments)
        assert done.returncode == 71
        assert "Traceback" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error_to_tell(tmp_path: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m ambersafe_cli recipes --json | true; echo $?"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout in ("1\n", "0\n"), "0 if it was quicker than the reader"


def test_a_defect_of_our_own_is_told_apart(ambersafe: Ambersafe, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import ambersafe_cli.recipe as r\ndef broken(): raise RuntimeError('surprise')\nr.names = broken\n"
    )
    done = ambersafe("recipes", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 70
    assert "RuntimeError: surprise" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interpreter_without_the_packages_is_refused_before_anything_is_made(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    python = tmp_path / "bare" / "bin" / "python"
    done = ambersafe("sft", "--model", tmp_path, "--python", python, "--no-preflight")
    assert done.returncode == 73
    assert "lacks torch, transformers" in done.stderr
    assert "pip install" in done.stderr
    assert not (fake_clone.parent / ".cache").exists()
    assert ambersafe("sft", "--model", tmp_path, "--python", python, "--dry-run").returncode == 0


def test_a_folder_named_like_a_package_does_not_pass_for_it(ambersafe: Ambersafe, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    (tmp_path / "work" / "wandb").mkdir()
    done = ambersafe("status", "--json", "--python", tmp_path / "bare" / "bin" / "python")
    assert "wandb" in json.loads(done.stdout)["training"]["missing"]


def test_a_run_folder_that_cannot_be_made_is_an_error(ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path) -> None:
    (fake_clone.parent / ".cache").write_text("a file in the way")
    done = ambersafe("sft", "--model", tmp_path, "--no-preflight")
    assert done.returncode == 74
    assert "Cannot make the run folder" in done.stderr


def test_recipes_are_listed_printed_and_given_as_json(ambersafe: Ambersafe) -> None:
    listed = ambersafe("recipes").stdout
    assert "ambersafe" in listed
    assert "tiny" in listed
    printed = ambersafe("recipes", "ambersafe").stdout
    assert "# AmberSafe: LLM360's AmberChat made safer" in printed
    assert "loss.beta: 0.1" in printed
    assert [each["source"] for each in json.loads(ambersafe("recipes", "--json").stdout)] == [
        "ambersafe",
        "ambersafe-lora",
        "ambersafe-qlora",
        "best",
        "tiny",
    ]


def test_data_counts_rows_and_says_it_in_both_ways(ambersafe: Ambersafe, tmp_path: Path) -> None:
    kinds = [(True, False)] * 20 + [(False, True)] * 20 + [(True, True)] * 3 + [(False, False)] * 2
    rows = [
        {
            "prompt": f"p{i // 2}",
            "response_0": "a" * i,
            "response_1": "b",
            "is_response_0_safe": first,
            "is_response_1_safe": second,
        }
        for i, (first, second) in enumerate(kinds)
    ]
    for split, part in (("train", rows), ("test", rows[:4])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    done = ambersafe("data", "--data", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    train = json.loads(done.stdout)["train"]
    assert train == {
        "rows": 45,
        "kept": 40,
        "both_safe": 3,
        "both_unsafe": 2,
        "prompts": 20,
        "sft_examples": 20,
        "pairs": 40,
        "lengths": {
            "prompt": {"p50": 3, "p95": 3, "longest": 3},
            "chosen": {"p50": 1, "p95": 18, "longest": 19},
            "rejected": {"p50": 20, "p95": 38, "longest": 39},
        },
    }
    shown = ambersafe("data", "--data", tmp_path)
    assert "dropped: both are unsafe" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", '{"prompt": "p", "response_0": "a"}\n', "no column response_1"),
        ("rows.jsonl", '{"prompt": \n', "rows.jsonl"),
        ("rows.jsonl", "", "rows.jsonl"),  # what is said differs between versions of `datasets`
        ("rows.csv", "prompt,response_0,response_1,is_response_0_safe,is_response_1_safe\na,b,c,0,1\n", "holds int64"),
        ("rows.parquet", "this is no parquet", "rows.parquet"),
        ("rows.txt", "hello", "ends in .jsonl, .json, .parquet, .csv"),
    ],
)
def test_data_that_cannot_be_trained_on_is_an_error_that_names_it(
    ambersafe: Ambersafe, tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    done = ambersafe("data", "--data", tmp_path / name)
    assert done.returncode == 65, done.stderr
    assert message in done.stderr
    assert name in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dataset_on_the_hub_that_cannot_be_reached_is_an_error_with_a_way_out(ambersafe: Ambersafe) -> None:
    done = ambersafe("data")
    assert done.returncode == 65
    assert "PKU-Alignment/PKU-SafeRLHF" in done.stderr
    assert "--data takes the path of a local copy" in done.stderr


def test_status_without_a_clone_still_shows_the_environment(ambersafe: Ambersafe) -> None:
    done = ambersafe("status")
    assert done.returncode == 0
    assert "There is no clone of upstream" in done.stdout
    assert "transformers" in done.stdout
    answer = json.loads(ambersafe("status", "--json").stdout)
    assert answer["clone"] is None
    assert answer["training"]["versions"]["torch"]


def test_status_of_a_foreign_repository_names_it(ambersafe: Ambersafe, tmp_path: Path) -> None:
    make_repository(tmp_path / "work" / "direct-preference-optimization", {"readme": "something else"})
    assert "is not a clone of upstream" in ambersafe("status").stdout

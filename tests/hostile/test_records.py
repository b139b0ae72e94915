"""A run's folder that somebody else made: what its run.json, and the clone that it names, may decide, and what not."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import git, only_run, run_ambersafe
from hypothesis import given
from hypothesis import strategies as st
from test_real_upstream import model, ours, rows  # noqa: F401, fixtures

from ambersafe_cli import patches, recorded
from ambersafe_cli.errors import CloneError, RunFolderError
from ambersafe_cli.untouched import require_untouched

THE_FIVE = ("export", "reproduce", "resume", "evaluate", "sample")


class Foreign:
    """Copies of a finished SFT run and of its clone, and a program that leaves a proof when it is started."""

    def __init__(self, folder: Path, run: Path, clone: Path) -> None:
        self.work, self.clone = folder / "work", folder / "clone"
        self.run = self.work / ".cache" / run.parent.name / run.name
        shutil.copytree(run, self.run)
        shutil.copytree(clone, self.clone, symlinks=True)
        self.proof = folder / "proof"
        self.program = folder / "python"
        self.program.write_text(f'#!/bin/sh\ntouch {self.proof}\nexec {sys.executable} "$@"\n')
        self.program.chmod(0o755)
        self.plant = f"open({str(self.proof)!r}, 'w')\n"
        self.change(lambda record: record["upstream"].update(folder=str(self.clone)))

    def change(self, what: Callable[[dict[str, Any]], object]) -> None:
        record = json.loads((self.run / "run.json").read_text())
        what(record)
        (self.run / "run.json").write_text(json.dumps(record))

    def ask(self, command: str, *flags: object, **environment: str) -> Any:
        more: dict[str, tuple[object, ...]] = {
            "evaluate": ("--limit", "4"),
            "sample": ("--max-new-tokens", "2", "--prompts", self.prompts()),
            "export": ("--out", self.work / "exported"),
        }
        if command == "resume":
            self.change(lambda record: record.update(status="interrupted"))
        return run_ambersafe(command, self.run, *more.get(command, ()), *flags, cwd=self.work, env=environment)

    def prompts(self) -> Path:
        path = self.work / "prompts.txt"
        path.write_text("Hello\n")
        return path


@pytest.fixture
def foreign(ours: Path, patched: Path, tmp_path: Path) -> Foreign:  # noqa: F811
    return Foreign(tmp_path, only_run(ours, "sft"), patched)


@pytest.mark.slow
@pytest.mark.cold  # or AMBERSAFE_PYTHON has said which
@pytest.mark.parametrize("command", THE_FIVE)
def test_an_interpreter_that_a_record_names_is_not_started(command: str, foreign: Foreign) -> None:
    def name_it(record: dict[str, Any]) -> None:
        record["command"][0] = record["python"]["path"] = str(foreign.program)

    foreign.change(name_it)
    done = foreign.ask(command)
    assert not foreign.proof.exists()
    if command in ("resume", "reproduce"):
        assert (done.returncode, f"--python {foreign.program}" in done.stderr) == (64, True), done.stderr
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", THE_FIVE)
def test_the_environment_that_a_record_names_is_not_set(command: str, foreign: Foreign) -> None:
    site = foreign.work / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(foreign.plant)
    foreign.change(lambda record: record["environment"].update(PYTHONPATH=str(site), LD_PRELOAD=str(site / "x.so")))
    done = foreign.ask(command, *(("--python", sys.executable) if command in ("resume", "reproduce") else ()))
    assert done.returncode == 0, done.stderr
    assert not foreign.proof.exists()
    assert "LD_PRELOAD" not in done.stderr


@pytest.mark.parametrize(
    "word",
    [
        "hydra.job_logging.handlers.console.()=os.system",
        "hydra/launcher=other",
        "+hydra.callbacks.x._target_=os.system",
        "model=../../../tmp/other",
        "loss={_target_: os.system}",
        "defaults=[other]",
        "++model._target_=os.system",
        "loss@model=dpo",
        "exp_name=${oc.env:HF_TOKEN}",
        "exp_name=${oc.decode:${x}}",
        "--config-dir=/tmp/other",
        "--multirun",
        "-m",
        "--resume=x",
        "~hydra",
    ],
)
def test_a_word_that_would_start_or_read_something_else_is_refused(word: str) -> None:
    record = {"command": [sys.executable, "/clone/train.py", "lr=1e-5", word]}
    with pytest.raises(RunFolderError):
        recorded.words(record, Path("/run"))


@pytest.mark.parametrize("word", ["lr=1e-5", "loss=dpo", "+new=1", "exp_name=${loss.name}_x", "datasets=[saferlhf]"])
def test_what_a_user_may_have_said_is_taken(word: str) -> None:
    record = {"command": [sys.executable, "/clone/train.py", word, "local_run_dir=/a", "hydra.run.dir=/a/hydra"]}
    assert recorded.words(record, Path("/run")) == [word, "local_run_dir='/run'", "hydra.run.dir='/run/hydra'"]


@given(st.lists(st.text()))
def test_whatever_a_record_has_for_train_py_it_is_key_value_or_refused(words: list[str]) -> None:
    try:
        found = recorded.words({"command": ["python", "/clone/train.py", *words]}, Path("/run"))
    except RunFolderError:
        return
    assert all(word[0] not in "-" and not word.startswith("hydra.job") for word in found)


def edit(foreign: Foreign) -> None:
    (foreign.clone / "train.py").write_text(foreign.plant + (foreign.clone / "train.py").read_text())


def edit_unseen(foreign: Foreign) -> None:
    git(foreign.clone, "update-index", "--assume-unchanged", "train.py", "preference_datasets.py")
    edit(foreign)
    path = foreign.clone / "preference_datasets.py"
    path.write_text(foreign.plant + path.read_text())


def commit_on_top(foreign: Foreign) -> None:
    edit(foreign)
    git(foreign.clone, "commit", "--all", "--quiet", "--message", "More")
    head = git(foreign.clone, "rev-parse", "HEAD")
    foreign.change(lambda record: record["upstream"].update(head=head))


def replace_the_commit(foreign: Foreign) -> None:
    """HEAD keeps its name, and git shows another commit in its place."""
    head = git(foreign.clone, "rev-parse", "HEAD")
    edit(foreign)
    git(foreign.clone, "commit", "--all", "--quiet", "--message", "More")
    git(foreign.clone, "replace", head, "HEAD")
    git(foreign.clone, "update-ref", "refs/heads/ambersafe", head)


def put_a_module_beside(foreign: Foreign) -> None:
    (foreign.clone / "torch.py").write_text(foreign.plant)


def put_a_package_beside(foreign: Foreign) -> None:
    (foreign.clone / "transformers").mkdir()
    (foreign.clone / "transformers" / "__init__.py").write_text(foreign.plant)


def link_it(foreign: Foreign) -> None:
    (foreign.work / "utils.py").write_text(foreign.plant)
    (foreign.clone / "utils.py").unlink()
    (foreign.clone / "utils.py").symlink_to(foreign.work / "utils.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [edit, edit_unseen, commit_on_top, replace_the_commit, put_a_module_beside, put_a_package_beside, link_it],
)
def test_a_clone_that_is_not_what_the_series_makes_is_not_run(how: Callable[[Foreign], None], foreign: Foreign) -> None:
    how(foreign)
    for command in ("reproduce", "resume", "evaluate"):
        done = foreign.ask(command)
        assert done.returncode not in (0, 70), done.stderr
        assert ("--dir" if command == "evaluate" else "--allow-modified") in done.stderr
        assert not foreign.proof.exists()


@pytest.mark.slow
def test_what_is_compiled_beside_a_file_is_not_run_in_its_place(foreign: Foreign) -> None:
    """A .pyc with the time and the size of the source passes for what Python has made of it."""
    import importlib.util
    import py_compile

    source = foreign.clone / "preference_datasets.py"
    info, text = source.stat(), source.read_text()
    planted = (foreign.plant + text)[: len(text.encode())].rpartition("\n")[0]
    source.write_text(foreign.plant.ljust(info.st_size, "#"))
    os.utime(source, ns=(info.st_atime_ns, info.st_mtime_ns))
    compiled = importlib.util.cache_from_source(str(source))
    assert planted
    py_compile.compile(str(source), compiled)
    source.write_text(text)
    os.utime(source, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert source.stat().st_size == info.st_size
    done = foreign.ask("evaluate")
    assert done.returncode == 0, done.stderr
    assert not foreign.proof.exists()


@pytest.mark.slow
def test_every_commit_of_the_series_is_known_and_another_object_of_its_name_is_not(
    patched: Path, tmp_path: Path
) -> None:
    series = patches.read_series()
    clone = tmp_path / "clone"
    shutil.copytree(patched, clone)
    for patch in (series[0], series[-1]):
        git(clone, "checkout", "--quiet", "--force", "--detach", patch.commit)
        require_untouched(clone, patch.commit, series)
    with pytest.raises(CloneError, match="which no patch"):
        require_untouched(clone, git(clone, "rev-parse", f"{series[0].commit}^"), series)


@pytest.mark.slow
@pytest.mark.parametrize("command", THE_FIVE)
def test_what_is_run_is_said_before_it_runs(command: str, foreign: Foreign) -> None:
    done = foreign.ask(command, "--python", foreign.program)
    assert done.returncode == 0, done.stderr
    assert foreign.proof.exists(), "the interpreter that was asked for"
    said = done.stderr.splitlines()
    assert any(str(foreign.program) in line for line in said[:3]), done.stderr
    if command != "export":
        assert any(str(foreign.clone) in line for line in said[:3]), done.stderr

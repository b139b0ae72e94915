"""A run's folder that somebody else made: what its run.json, and the clone that it names, may decide, and what not."""

import functools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_runs
import pytest
from conftest import commit, git, make_repository, only_run, run_ambersafe
from hypothesis import given
from hypothesis import strategies as st
from test_real_upstream import TINY, model, ours, rows  # noqa: F401, fixtures

from ambersafe_cli import checkpoints, files, patches, recorded, runs, untouched
from ambersafe_cli.errors import ArchiveError, CloneError, RunFolderError
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
def test_the_environment_that_a_record_names_is_not_set_and_what_runs_is_said_before(
    command: str, foreign: Foreign
) -> None:
    site = foreign.work / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"open({str(site / 'proof')!r}, 'w')\n")
    foreign.change(lambda record: record["environment"].update(PYTHONPATH=str(site), LD_PRELOAD=str(site / "x.so")))
    done = foreign.ask(command, "--python", foreign.program)
    assert done.returncode == 0, done.stderr
    assert not (site / "proof").exists()
    assert "LD_PRELOAD" not in done.stderr
    assert foreign.proof.exists(), "the interpreter that was asked for"
    said = done.stderr.splitlines()
    assert any(str(foreign.program) in line for line in said[:3]), done.stderr
    if command != "export":
        assert any(str(foreign.clone) in line for line in said[:3]), done.stderr


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
        "~lr",
        "++lr=1",
        "local_dirs=[/tmp/other]",
        "exp_name=$\\{oc.env:HF_TOKEN\\}",
        "exp_name='$\\\\{oc.env:HF_TOKEN}'",
        "model.attn_implementation=org/kernels",
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


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_record_does_not_say_where_train_py_writes(prefix: str) -> None:
    own = ["local_run_dir='/run'", "hydra.run.dir='/run/hydra'"]
    for key in ("local_run_dir", "hydra.run.dir"):
        record = {"command": [sys.executable, "/clone/train.py", f"{prefix}{key}=/home"]}
        assert recorded.words(record, Path("/run")) == own
    assert recorded.words({"command": [sys.executable, "/clone/train.py"]}, Path("/run")) == own


def test_what_a_user_has_given_goes_on_where_it_is_allowed() -> None:
    words = ["hydra.verbose=true", "exp_name=${oc.env:USER}", "++new=1", "hydra/job_logging=none"]
    record = {"command": [sys.executable, "/clone/train.py", *words]}
    assert recorded.words(record, Path("/run"), allow_modified=True)[:4] == words
    with pytest.raises(RunFolderError, match="may start or read something else"):
        recorded.words(
            {"command": [sys.executable, "train.py", "--config-dir=/tmp"]}, Path("/run"), allow_modified=True
        )


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


def put_an_installed_package_beside(foreign: Foreign) -> None:
    """Whose entry point torch would call when it is imported."""
    folder = foreign.clone / "evil-1.DIST-INFO"
    folder.mkdir()
    (folder / "entry_points.txt").write_text("[torch.backends]\nx = timeit:main\n")


def link_a_plugin_of_hydra(foreign: Foreign) -> None:
    (foreign.work / "evil").mkdir()
    (foreign.work / "evil" / "__init__.py").write_text(foreign.plant)
    (foreign.clone / "hydra_plugins").mkdir()
    (foreign.clone / "hydra_plugins" / "evil").symlink_to(foreign.work / "evil")


def put_a_config_beside(foreign: Foreign) -> None:
    (foreign.clone / "config" / "model" / "evil.yaml").write_text("# @package hydra.callbacks.x\n_target_: os.getcwd\n")


def link_it(foreign: Foreign) -> None:
    (foreign.work / "utils.py").write_text(foreign.plant)
    (foreign.clone / "utils.py").unlink()
    (foreign.clone / "utils.py").symlink_to(foreign.work / "utils.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        edit,
        edit_unseen,
        commit_on_top,
        replace_the_commit,
        put_a_module_beside,
        put_a_package_beside,
        link_it,
        put_an_installed_package_beside,
        link_a_plugin_of_hydra,
        put_a_config_beside,
    ],
)
def test_a_clone_that_is_not_what_the_series_makes_is_not_run(how: Callable[[Foreign], None], foreign: Foreign) -> None:
    how(foreign)
    for command in ("reproduce", "resume", "evaluate") if how is edit else ("resume",):  # by one door, recorded.clone
        done = foreign.ask(command)
        assert not foreign.proof.exists()
        assert done.returncode in (0, 71), done.stderr
        if done.returncode:
            assert ("--dir" if command == "evaluate" else "--allow-modified") in done.stderr
        else:  # with the commit of the series itself, beside it
            assert f"{foreign.clone}.worktrees/" in done.stderr


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


@pytest.mark.parametrize("head", ["main", "@^{/////bin/|.}", "HEAD", "a" * 39, "A" * 40, ""])
def test_a_record_names_a_commit_by_its_whole_id(head: str, tmp_path: Path) -> None:
    run = made_runs.recorded(tmp_path / "run", "dpo", [])
    record = json.loads((run / "run.json").read_text())
    record["upstream"]["head"] = head
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunFolderError, match=r"upstream\.head"):
        runs.read(run)


def test_what_a_record_says_to_type_next_is_a_command_of_ours(tmp_path: Path) -> None:
    run = made_runs.recorded(tmp_path / "run", "dpo", [])
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "next_command": ["curl", "evil.example.org"]}))
    with pytest.raises(RunFolderError, match="next_command"):
        runs.read(run)


@pytest.mark.slow
@pytest.mark.parametrize("linked", ["clone.worktrees", "clone.worktrees/{}"])
def test_no_worktree_is_made_behind_a_link(linked: str, patched: Path, tmp_path: Path) -> None:
    clone, home = tmp_path / "clone", tmp_path / "home"
    shutil.copytree(patched, clone, symlinks=True)
    home.mkdir()
    old = git(clone, "rev-parse", "HEAD~1")
    link = tmp_path / linked.format(old[:12])
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(home)
    with pytest.raises(CloneError, match="is a link"):
        recorded.clone({"folder": str(clone), "head": old, "edited": []}, False)
    assert not list(home.iterdir())
    link.unlink()
    assert recorded.clone({"folder": str(clone), "head": old, "edited": []}, False).name == old[:12]


def test_a_commit_that_is_not_known_gets_no_worktree(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    make_repository(clone, {"train.py": "print()\n"})
    old = git(clone, "rev-parse", "HEAD")
    commit(clone, {"train.py": "print(1)\n"}, "More")
    with pytest.raises(CloneError, match="no patch of this ambersafe makes"):
        recorded.clone({"folder": str(clone), "head": old, "edited": []}, False)
    assert [path.name for path in tmp_path.iterdir()] == ["clone"]


def test_a_run_that_was_started_with_an_earlier_series_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "clone"
    make_repository(clone, {"train.py": "print()\n"})
    old = git(clone, "rev-parse", "HEAD")
    monkeypatch.setattr(untouched, "known", functools.partial(patches.known, folder=tmp_path))
    (tmp_path / "earlier").write_text(f"# of 1.0\n{old}\n")
    assert recorded.clone({"folder": str(clone), "head": old, "edited": [], "edits": None}, False) == clone


# --- models, checkpoints, the folder that one works in ---


@pytest.mark.slow
@pytest.mark.parametrize("where", ["config", "kernels", "tokenizer"])
@pytest.mark.parametrize("command", ["check", "sft", "sample", "export"])
def test_no_code_of_a_models_is_run_nor_is_anybody_asked(where: str, command: str, foreign: Foreign) -> None:
    """Not even with a terminal for an answer: standard input says yes to all."""
    record = json.loads((foreign.run / "run.json").read_text())
    theirs = foreign.work / "model"
    shutil.copytree(record["model"]["name"], theirs)
    (theirs / "evil.py").write_text(foreign.plant)
    name = "tokenizer_config.json" if where == "tokenizer" else "config.json"
    config = json.loads((theirs / name).read_text())
    if where == "kernels":
        config["attn_implementation"] = "someone/kernels"
    elif where == "tokenizer":
        config |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Evil"}
    else:
        config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (theirs / name).write_text(json.dumps(config))
    foreign.change(lambda record: record["model"].update(name=str(theirs)))
    of_stage = [
        "--dir",
        foreign.clone,
        "--model",
        theirs,
        "--data",
        record["data"]["name"],
        "--trainer",
        "BasicTrainer",
    ]
    words = {"check": ["check", "sft", *of_stage], "sft": ["sft", *of_stage, *TINY]}.get(command)
    prompts = ["--prompts", foreign.prompts()] if command == "sample" else []
    words = words or [command, foreign.run, "--model", theirs, *prompts]
    done = subprocess.run(
        [sys.executable, "-m", "ambersafe_cli", *map(str, words)],
        cwd=foreign.work,
        input="y\n" * 100,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not foreign.proof.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    assert "defect" not in done.stderr
    assert done.returncode in (76, 77), done.stderr
    assert ("names code to be fetched" if where == "kernels" else "has code of its own") in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generation_config.json", "vocab-notes.txt", "chat_template.jinja", "config.json"])
def test_no_file_that_a_models_folder_links_to_is_exported(name: str, foreign: Foreign) -> None:
    record = json.loads((foreign.run / "run.json").read_text())
    theirs, secret = foreign.work / "model", foreign.work / "id_rsa"
    shutil.copytree(record["model"]["name"], theirs)
    secret.write_text('{"a": "mysecret"}')
    (theirs / name).unlink(missing_ok=True)
    (theirs / name).symlink_to(secret)
    done = foreign.ask("export", "--model", theirs)
    assert done.returncode not in (0, 70), done.stderr
    assert f"is a link to {secret}" in done.stderr
    assert not (foreign.work / "exported").exists()


@pytest.mark.slow
def test_a_models_folder_may_link_to_the_files_of_another(foreign: Foreign) -> None:
    record = json.loads((foreign.run / "run.json").read_text())
    theirs = foreign.work / "model"
    theirs.mkdir()
    for path in Path(record["model"]["name"]).iterdir():
        (theirs / path.name).symlink_to(path)
    done = foreign.ask("export", "--model", theirs)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_export_does_not_go_where_a_link_in_the_run_leads(foreign: Foreign) -> None:
    thesis = foreign.work / "thesis"
    thesis.mkdir()
    (thesis / "chapter").write_text("mine\n")
    (foreign.run / "hugging_face").symlink_to(thesis)
    done = run_ambersafe("export", foreign.run, "--force", cwd=foreign.work)
    assert done.returncode == 64, done.stderr
    assert "is a link" in done.stderr
    assert [path.name for path in thesis.iterdir()] == ["chapter"]


@pytest.mark.parametrize("command", [("status",), ("runs",), ("check", "sft")])
def test_a_module_in_the_working_folder_is_not_imported(command: tuple[str, ...], tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for name in ("json", "csv", "re", "importlib", "torch", "yaml", "typer", "sitecustomize"):
        (work / f"{name}.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\n")
    script = shutil.which("ambersafe", path=str(Path(sys.executable).parent))
    assert script
    subprocess.run(
        [script, *command], cwd=work, capture_output=True, timeout=120, env={**os.environ, "AMBERSAFE_COLD": "1"}
    )
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", ["policy.pt", "optimizer.pt", "scheduler.pt"])
def test_a_pipe_in_the_place_of_a_checkpoint_does_not_hang(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    look = "import sys; from pathlib import Path; from ambersafe_cli import checkpoints, integrity; "
    look += "print(*(of(Path(sys.argv[1])) for of in (integrity.damage, checkpoints.fingerprint)))"
    done = subprocess.run([sys.executable, "-c", look, tmp_path / name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_that_says_more_than_it_holds_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "policy.pt", "w") as archive:
        archive.writestr("a/data.pkl", b" " * (files.LARGEST + 1))
    with pytest.raises(ArchiveError, match="more of its tensors than is read"):
        checkpoints.policy_shapes(tmp_path / "policy.pt")


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
    with pytest.raises(CloneError, match="no patch of this"):
        require_untouched(clone, git(clone, "rev-parse", f"{series[0].commit}^"), series)

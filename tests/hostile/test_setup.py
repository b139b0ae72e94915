"""Mirrors and clones that somebody else prepared, and folders that several people have."""

import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import commit, git, make_repository, make_series, run_ambersafe

from ambersafe_cli import cloning, display, provenance, runs, sharing, upstream, worktrees
from ambersafe_cli.errors import CloneError, RunFolderError, SourceError
from ambersafe_cli.patches import Patch

TRAIN = {"train.py": "print('upstream')\n", "notes.txt": "a\n"}


def quiet(step: str, done: float) -> None:
    pass


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    make_repository(folder, TRAIN)
    return folder


@pytest.fixture
def series(source: Path, tmp_path: Path) -> tuple[Patch, ...]:
    base = git(source, "rev-parse", "HEAD")
    commit(source, {"train.py": "print('patched')\n"}, "First")
    commit(source, {"new.txt": "x\n"}, "Second")
    found = make_series(source, base, tmp_path / "series")
    git(source, "reset", "--quiet", "--hard", base)
    return found


@pytest.fixture
def wanted(source: Path, series: tuple[Patch, ...]) -> cloning.Wanted:
    return cloning.Wanted(str(source), git(source, "rev-parse", "HEAD"), series)


def test_a_branch_that_is_called_like_the_pin_is_not_taken_for_it(
    source: Path, wanted: cloning.Wanted, tmp_path: Path
) -> None:
    pin = wanted.commit
    commit(source, {"train.py": "print('evil')\n"}, "Evil")
    git(source, "update-ref", f"refs/heads/{pin}", "HEAD")
    result = cloning.set_up(tmp_path / "clone", wanted, False, quiet)
    assert result.state.base == pin
    absent = cloning.Wanted(str(source), "1" * 40, wanted.series)
    git(source, "update-ref", f"refs/heads/{'1' * 40}", "HEAD")
    with pytest.raises(SourceError, match="has no commit"):
        cloning.set_up(tmp_path / "other", absent, False, quiet)


PROGRAMS = {
    "filter.evil.clean": "{}", "filter.evil.smudge": "{}", "filter.evil.process": "{}", "diff.external": "{}",
    "diff.evil.command": "{}", "diff.evil.textconv": "{}", "core.fsmonitor": "{}", "core.hooksPath": "{}.hooks",
    "core.sshCommand": "{}", "core.askPass": "{}", "credential.helper": "!{}", "core.pager": "{}", "core.editor": "{}",
    "gpg.program": "{}", "merge.evil.driver": "{}", "remote.origin.uploadpack": "{}", "sequence.editor": "{}",
    "core.alternateRefsCommand": "{}", "protocol.ext.allow": "always",
}  # fmt: skip


@pytest.mark.parametrize("where", ["--local", "--worktree"])
def test_a_repository_starts_no_program_of_its_own(where: str, wanted: cloning.Wanted, tmp_path: Path) -> None:
    """Whatever its settings and attributes name, and its hooks are: looked at, set up again, fetched from."""
    clone, proof, program = tmp_path / "clone", tmp_path / "proof", tmp_path / "program"
    cloning.set_up(clone, wanted, False, quiet)
    program.write_text(f'#!/bin/sh\necho "$0 $@" >> {proof}\ncat\n')
    program.chmod(0o755)
    hooks = Path(f"{program}.hooks")
    for place in (hooks, clone / ".git" / "hooks"):
        place.mkdir(exist_ok=True)
        for name in ("post-checkout", "pre-commit", "reference-transaction", "post-index-change", "applypatch-msg"):
            shutil.copy(program, place / name)
    (clone / ".git" / "info" / "attributes").write_text("* filter=evil diff=evil merge=evil\n")
    git(clone, "config", "extensions.worktreeConfig", "true")
    for name, value in PROGRAMS.items():
        git(clone, "config", where, name, value.format(program))
    proof.unlink(missing_ok=True)
    (clone / "notes.txt").write_text("b\n")
    upstream.inspect(clone, wanted.series)
    done = run_ambersafe("status", "--dir", clone, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cloning.set_up(clone, wanted, True, quiet)
    git_calls_fetch = cloning.Wanted(wanted.url, "no-such-branch", wanted.series)
    with pytest.raises(SourceError):
        cloning.set_up(clone, git_calls_fetch, False, quiet)
    minimal = cloning.Wanted(wanted.url, wanted.commit, wanted.series, minimal=True)
    cloning.set_up(clone, minimal, True, quiet)
    assert not proof.exists(), proof.read_text()
    # It would have been started: git itself does.
    subprocess.run(["git", "-C", clone, "status"], capture_output=True, check=False, timeout=60)
    assert proof.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("filter.a=b.clean", "touch {}"),
        ("diff.a=b.textconv", "touch {}"),
        ("includeIf.gitdir:**.path", "evil.inc"),
        ("include.path", "a-pipe"),
        ("hook.evil.command", "touch {}"),
        ("remote.origin.vcs", "evil"),
        ("core.worktree", "{}"),
    ],
)
def test_a_setting_that_cannot_be_set_over_is_refused(
    name: str, value: str, wanted: cloning.Wanted, tmp_path: Path
) -> None:
    clone, proof = tmp_path / "clone", tmp_path / "proof"
    cloning.set_up(clone, wanted, False, quiet)
    (clone / ".git" / "evil.inc").write_text(f'[filter "evil"]\n\tclean = touch {proof}\n')
    (clone / ".git" / "info" / "attributes").write_text("* filter=evil\nnotes.txt filter=a=b diff=a=b\n")
    git(clone, "config", name, value.format(proof))
    (clone / "notes.txt").write_text("b\n")
    done = run_ambersafe("status", "--dir", clone, cwd=tmp_path)
    assert "for itself" in done.stdout + done.stderr
    with pytest.raises(CloneError, match=f"(?i)sets {re.escape(name)} for itself"):
        upstream.inspect(clone, wanted.series)
    assert not proof.exists()
    assert provenance.of_working_folder(clone) is None
    assert not proof.exists()


def nested(folder: Path, proof: Path) -> None:
    """A repository in a clone, which starts a program when git looks whether it has changed."""
    make_repository(folder, {"a.txt": "a\n"})
    git(folder, "config", "filter.evil.clean", f"touch {proof}; cat")
    (folder / ".git" / "info" / "attributes").write_text("* filter=evil\n")
    (folder / "a.txt").write_text("b\n")


def test_a_repository_within_a_clone_starts_no_program(wanted: cloning.Wanted, tmp_path: Path) -> None:
    clone, proof = tmp_path / "clone", tmp_path / "proof"
    cloning.set_up(clone, wanted, False, quiet)
    nested(clone / "sub", proof)
    git(clone, "-c", "advice.addEmbeddedRepo=false", "add", "sub")
    upstream.inspect(clone, wanted.series)
    assert run_ambersafe("status", "--dir", clone, cwd=tmp_path).returncode == 0
    assert not proof.exists()
    subprocess.run(["git", "-C", clone, "status"], capture_output=True, check=False, timeout=60)
    assert proof.exists(), "git itself starts it"


def test_the_repository_that_one_works_in_starts_no_program(tmp_path: Path) -> None:
    work, proof = tmp_path / "work", tmp_path / "proof"
    nested(work, proof)
    found = provenance.of_working_folder(work)
    assert found
    assert found["changed_files"] == ["a.txt"]
    assert not proof.exists()
    subprocess.run(["git", "-C", work, "status"], capture_output=True, check=False, timeout=60)
    assert proof.exists(), "git itself starts it"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:secret@host/a.git", "https://host/a.git"),
        ("https://secret@host/a.git", "https://host/a.git"),
        ("https://host/a.git?private_token=secret", "https://host/a.git"),
        ("https://me:secret@host/a?token=secret#secret", "https://host/a"),
        ("ssh://git@host:22/a.git", "ssh://git@host:22/a.git"),
        ("ssh://git:secret@host/a.git", "ssh://git@host/a.git"),
        ("file:///a b/c", "file:///a b/c"),
        ("fatal: 'https://me:secret@host/a.git' not found", "fatal: 'https://host/a.git' not found"),
    ],
)
def test_an_address_is_shown_without_what_opens_it(address: str, shown: str) -> None:
    assert display.without_secrets(address) == shown


def test_a_repository_that_lies_about_where_its_files_are_is_refused(wanted: cloning.Wanted, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    cloning.set_up(clone, wanted, False, quiet)
    home = tmp_path / "home"
    home.mkdir()
    (home / "train.py").write_text("mine\n")
    git(clone, "config", "core.worktree", str(home))
    for call in (lambda: upstream.inspect(clone, wanted.series), lambda: cloning.set_up(clone, wanted, False, quiet)):
        with pytest.raises(CloneError, match=r"core\.worktree"):
            call()
    assert (home / "train.py").read_text() == "mine\n"


def test_a_password_in_the_address_of_a_mirror_is_not_kept(
    source: Path, wanted: cloning.Wanted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewritten = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{source}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://someone:clonepassword@mirror.example.org/upstream.git",
    }
    for name, value in rewritten.items():
        monkeypatch.setenv(name, value)
    asked = cloning.Wanted(rewritten["GIT_CONFIG_VALUE_0"], wanted.commit, wanted.series)
    clone = tmp_path / "clone"
    result = cloning.set_up(clone, asked, False, quiet)
    assert result.state.url == "https://mirror.example.org/upstream.git"
    kept = [path for path in clone.rglob("*") if path.is_file() and b"clonepassword" in path.read_bytes()]
    assert not kept


# --- several people, one folder ---


def test_no_training_begins_while_setup_changes_the_clone_nor_from_what_it_left(
    wanted: cloning.Wanted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone"
    minimal = cloning.Wanted(wanted.url, wanted.commit, wanted.series, minimal=True)
    before = cloning.set_up(clone, minimal, False, quiet).state
    recorded = {"head": before.head, "edits": before.edits}
    with upstream.in_use(clone, recorded):
        pass
    order: list[str] = []

    def train() -> None:
        with pytest.raises(CloneError, match="was changed"), upstream.in_use(clone, recorded):
            order.append("trains")
        order.append("looked")

    trains = threading.Thread(target=train)

    def slowly(step: str, done: float) -> None:
        if step == "checking out":
            trains.start()
            trains.join(1)
            order.append("checked out")

    cloning.set_up(clone, wanted, False, slowly)
    trains.join(20)
    assert order == ["checked out", "looked"]


def test_a_second_setup_says_that_it_waits(wanted: cloning.Wanted, tmp_path: Path) -> None:
    said: list[str] = []
    with cloning.alone(tmp_path, said.append):
        assert not said
        waits = threading.Thread(
            target=cloning.set_up, args=(tmp_path / "clone", wanted, False, lambda step, done: said.append(step))
        )
        waits.start()
        waits.join(0.5)
        assert said == [f"waiting for another setup in {tmp_path}"]
    waits.join(60)
    assert (tmp_path / "clone" / "train.py").exists()


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="takes two users: only root can be another one")


@needs_root
def test_another_users_worktree_is_not_deleted(wanted: cloning.Wanted, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    minimal = cloning.Wanted(wanted.url, wanted.commit, wanted.series, minimal=True)
    old = cloning.set_up(clone, minimal, False, quiet).state.head
    cloning.set_up(clone, wanted, False, quiet)
    folder = worktrees.folder_at(clone, old)
    for path in (folder, *folder.rglob("*")):
        os.lchown(path, 65534, 65534)
    with pytest.raises(CloneError, match="another user's"):
        worktrees.folder_at(clone, old)
    assert (folder / "train.py").exists()


@needs_root
def test_no_run_is_made_behind_a_link_of_another_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, theirs = tmp_path / "work", tmp_path / "theirs"
    for folder in (work, theirs):
        folder.mkdir()
    monkeypatch.chdir(work)
    (work / ".cache").mkdir()
    link = runs.folder_of_runs()
    link.symlink_to(theirs)
    runs.make(runs.folder_for("mine"))  # one's own link, as to a larger disk
    os.lchown(link, 65534, 65534)
    with pytest.raises(RunFolderError, match="another user's"):
        runs.make(runs.folder_for("again"))
    assert len(list(theirs.iterdir())) == 1


def test_what_is_shared_is_not_what_a_link_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    for folder in (work, home):
        folder.mkdir()
    work.chmod(0o2777)
    home.chmod(0o700)
    monkeypatch.chdir(work)

    def swapped(self: Path, *arguments: object, **more: object) -> None:
        self.symlink_to(home)

    monkeypatch.setattr(Path, "mkdir", swapped)
    with pytest.raises(OSError):
        sharing.share_cache(work / ".cache" / "me" / "run")
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


@needs_root
def test_whoever_may_write_in_a_working_folder_may_have_runs_there(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chown(shared, 0, 65534)
    shared.chmod(0o2775)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and path != Path("/"):
            path.chmod(path.stat().st_mode | stat.S_IXOTH)
    make = "from pathlib import Path; from ambersafe_cli import runs; runs.make(runs.folder_for('x'))"

    def as_another() -> None:
        os.setgroups([65534])
        os.setgid(1)
        os.setuid(65533)

    environment = {**os.environ, "LOGNAME": "first"}
    subprocess.run([sys.executable, "-c", make], cwd=shared, env=environment, check=True)
    readable = {**os.environ, "LOGNAME": "second", "PYTHONPATH": str(Path(runs.__file__).parents[1])}
    done = subprocess.run(
        [
            shutil.which("python3", path="/usr/bin:/bin") or sys.executable,
            "-c",
            "import os; os.makedirs('.cache/second')",
        ],
        cwd=shared,
        env=readable,
        preexec_fn=as_another,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (shared / ".cache").iterdir()} == {"first", "second"}


def test_a_demo_does_not_touch_the_model_that_another_has_just_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ambersafe_cli import demo

    monkeypatch.chdir(tmp_path)
    folder = runs.folder_of_runs() / "tiny_model"

    def build(command: list[str], **how: object) -> subprocess.CompletedProcess[str]:
        folder.mkdir()
        (folder / "config.json").write_text("first")  # the other's is done before ours
        shutil.rmtree(command[2], ignore_errors=True)
        Path(command[2]).mkdir()
        (Path(command[2]) / "config.json").write_text("second")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", build)
    assert demo._build_model(sys.executable) == folder
    assert (folder / "config.json").read_text() == "first"
    assert [path.name for path in folder.parent.iterdir()] == ["tiny_model"]

"""The patched clone, on small repositories in upstream's place: made, mended, refused, and never anything lost."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Ambersafe, commit, git, make_repository, make_series

from ambersafe_cli import cloning, errors, git_calls, patches, upstream

TRAIN = [f"line {number}\n" for number in range(1, 21)]

# Of the commits that ambersafe makes of `series`. They may not depend on the machine, so they can stand here.
MINIMAL_HEAD = "d82eb3d666e8c801b2cfadf2d963f34d81f0a5ce"
FULL_HEAD = "5c6e4e92bbf7d0bbc300225ff01e50e15776b243"

HIDDEN = "s3cr3t"


def train(**changes: str) -> str:
    """Text of a train.py in which some lines are others: train(_3="...")."""
    return "".join(changes.get(f"_{number}", line) for number, line in enumerate(TRAIN, start=1))


def export(repository: Path, base: str, folder: Path) -> tuple[patches.Patch, ...]:
    git(repository, "config", "format.numbered", "false")
    return make_series(repository, base, folder)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in upstream's place: main, the branch `later` one commit on, and `diverged`, which has another
    line 14."""
    folder = tmp_path_factory.mktemp("source") / "upstream"
    with pytest.MonkeyPatch.context() as environment:
        for variable in ("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"):
            environment.setenv(variable, "2024-01-02T03:04:05+0500")
        make_repository(folder, {"train.py": train(), "config/config.yaml": "seed: 0\n", "old.txt": "old\n"})
        git(folder, "checkout", "--quiet", "-b", "later")
        commit(folder, {"later.txt": "later\n"}, "Do something later")
        git(folder, "checkout", "--quiet", "-b", "diverged", "main")
        commit(folder, {"train.py": train(_14="another line 14\n")}, "Diverge")
        git(folder, "checkout", "--quiet", "main")
    return folder


@pytest.fixture(scope="session")
def workshop(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of `source` with the three commits on main that `series` is made of."""
    folder = tmp_path_factory.mktemp("workshop") / "clone"
    git(source, "clone", "--quiet", str(source), str(folder))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GIT_AUTHOR_DATE", "2024-02-03T04:05:06-0700")
        first = {"train.py": train(_3="first\n"), "config/config.yaml": "seed: 0\nfirst: null\n"}
        commit(folder, first, "Add the first thing\n\nBefore the scissors, größer.\n\n-- >8 --\n\nConfig-key: first")
        # apply.whitespace=fix would change these blanks.
        second = {"train.py": train(_3="first\n", _15="second\n"), "extra.py": "blank at the end \n \t\n\n\n"}
        commit(folder, second, "[second] Add a file, under a subject so long that git format-patch folds it into two")
        (folder / "old.txt").unlink()
        commit(folder, {"train.py": train(_3="third\n", _15="second\n")}, "Delete the old file")
    return folder


@pytest.fixture(scope="session")
def series(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[patches.Patch, ...]:
    made = export(workshop, "origin/main", tmp_path_factory.mktemp("series"))
    assert len(made) == 3
    return made


@pytest.fixture
def wanted(source: Path, series: tuple[patches.Patch, ...], monkeypatch: pytest.MonkeyPatch) -> cloning.Wanted:
    """The whole series on main of `source`, which is the pinned commit then."""
    base = git(source, "rev-parse", "main")
    monkeypatch.setattr(upstream, "PINNED_COMMIT", base)
    return cloning.Wanted(url=str(source), commit=base, series=series)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the clone is to be."""
    return tmp_path / "clones" / "clone"


@pytest.fixture(scope="session")
def whole_clone(source: Path, series: tuple[patches.Patch, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "clone"
    set_up(folder, cloning.Wanted(str(source), git(source, "rev-parse", "main"), series))
    return folder


@pytest.fixture
def clone(folder: Path, whole_clone: Path, wanted: cloning.Wanted) -> Path:
    """A clone as ambersafe makes it, with the whole series."""
    return copy(whole_clone, folder)


@pytest.fixture
def users_clone(folder: Path, source: Path, wanted: cloning.Wanted) -> Path:
    """A clone that a user made with git, at the right commit, on main."""
    git(source, "clone", "--quiet", str(source), str(folder))
    return folder


def set_up(folder: Path, wanted: cloning.Wanted, force: bool = False) -> cloning.SetupResult:
    return cloning.set_up(folder, wanted, force=force, progress=lambda step, done: None)


def copy(clone: Path, folder: Path) -> Path:
    shutil.copytree(clone, folder, symlinks=True)
    git(folder, "status")  # writes down the times of the copied files
    return folder


def assert_complete(folder: Path, wanted: cloning.Wanted) -> None:
    state = upstream.inspect(folder, wanted.series)
    assert state.is_exactly(wanted.commit, wanted.patches)
    assert state.head == git(folder, "rev-parse", upstream.BRANCH) == (MINIMAL_HEAD if wanted.minimal else FULL_HEAD)
    assert git(folder, "branch", "--show-current") == upstream.BRANCH
    assert git(folder, "rev-parse", upstream.BASE_REF) == wanted.commit
    assert git(folder, "status", "--porcelain", "--untracked-files=no") == ""
    assert not list((folder / ".git").glob("ambersafe-checkout*"))
    assert not list(folder.parent.glob(".*"))


def snapshot(folder: Path) -> dict[str, object]:
    """All that there is in a folder and its parent: kinds, modes and contents.

    Of git's index only what it says of each file, for any git command may write down the times of files anew.
    """
    found: dict[str, object] = {}
    for path in sorted(folder.parent.rglob("*")):
        name = str(path.relative_to(folder.parent))
        if path.name == "index" and path.parent.name == ".git":
            found[name] = git(path.parent.parent, "ls-files", "--stage")
        else:
            found[name] = (path.lstat().st_mode, path.read_bytes() if path.is_file() else None)
    return found


def refusal(folder: Path, wanted: cloning.Wanted) -> errors.CloneError:
    """Have set_up refuse and see that it touched nothing, that it names the folder and says what to do."""
    before = snapshot(folder)
    with pytest.raises(errors.CloneError) as caught:
        set_up(folder, wanted)
    assert snapshot(folder) == before
    assert str(folder) in caught.value.message
    assert caught.value.hint
    return caught.value


# A new clone


def test_a_fresh_clone_is_the_base_with_one_commit_a_patch(folder: Path, wanted: cloning.Wanted) -> None:
    result = set_up(folder, wanted)
    assert result.changed
    assert result.saved == ()
    assert [patch.state for patch in result.state.patches] == ["applied"] * 3
    subjects = git(folder, "log", "--reverse", "--format=%s", f"{wanted.commit}..").splitlines()
    assert subjects == [patch.subject for patch in wanted.series]
    assert set(git(folder, "log", "--format=%ce", f"{wanted.commit}..").split()) == {git_calls.COMMITTER_EMAIL}
    assert_complete(folder, wanted)


def test_the_clone_holds_what_the_commits_of_the_series_held(clone: Path, workshop: Path) -> None:
    assert git(clone, "rev-parse", "HEAD^{tree}") == git(workshop, "rev-parse", "main^{tree}")
    assert git(clone, "log", "--format=%an %ae %at %B", "-3") == git(workshop, "log", "--format=%an %ae %at %B", "-3")
    assert (clone / "extra.py").read_bytes() == (workshop / "extra.py").read_bytes()


def test_a_minimal_clone_has_the_first_patch_alone(folder: Path, wanted: cloning.Wanted) -> None:
    minimal = replace(wanted, minimal=True)
    state = set_up(folder, minimal).state
    assert [patch.state for patch in state.patches] == ["applied", "missing", "missing"]
    assert state.has(wanted.series[0])
    assert not state.has(wanted.series[1])
    assert_complete(folder, minimal)


@pytest.fixture(params=["hooks for all repositories", "hooks in the template"])
def another_machine(
    request: pytest.FixtureRequest, wanted: cloning.Wanted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user, time zone and clock, whose git is set up to hinder and alter whatever it does."""
    home = tmp_path / "home"
    hooks = home / "template" / "hooks"
    hooks.mkdir(parents=True)
    altering = '#!/bin/sh\necho altered >> "$1"\n'
    failing = "#!/bin/sh\nexit 1\n"
    for name in ("applypatch-msg", "commit-msg", "prepare-commit-msg"):
        (hooks / name).write_text(altering)
    for name in ("pre-applypatch", "pre-commit", "post-checkout", "post-merge"):
        (hooks / name).write_text(failing)
    for hook in hooks.iterdir():
        hook.chmod(0o755)
    by_path = request.param == "hooks for all repositories"
    (home / "config").write_text(
        f"""
        [core]
            autocrlf = true
            {f"hooksPath = {hooks}" if by_path else ""}
        [init]
            templateDir = {home / "template"}
        [user]
            name = Ünderson
            email = other@example.org
        [commit]
            gpgSign = true
        [gpg]
            program = /bin/false
        [apply]
            whitespace = fix
        [mailinfo]
            scissors = true
        [am]
            keepcr = true
            threeWay = true
        [i18n]
            commitEncoding = ISO-8859-1
            logOutputEncoding = ISO-8859-1
        [clone]
            defaultRemoteName = elsewhere
        [diff]
            noprefix = true
            external = /bin/false
        [color]
            ui = always
        [log]
            showSignature = true
        """
    )
    for variable, value in {
        "HOME": str(home),
        "GIT_CONFIG_GLOBAL": str(home / "config"),
        "TZ": "Asia/Kathmandu",
        "LC_ALL": "C",
        "GIT_COMMITTER_DATE": "2001-02-03T04:05:06+0000",
        "GIT_AUTHOR_DATE": "2001-02-03T04:05:06+0000",
        "GIT_COMMITTER_NAME": "Third",
        "GIT_COMMITTER_EMAIL": "third@example.org",
        "GIT_AUTHOR_NAME": "Fourth",
        "GIT_DIR": str(home / "no-repository"),
        "GIT_INDEX_FILE": str(home / "no-index"),
    }.items():
        monkeypatch.setenv(variable, value)


def test_commit_ids_are_the_same_on_another_machine(
    another_machine: None, folder: Path, wanted: cloning.Wanted
) -> None:
    assert set_up(folder, wanted).state.head == FULL_HEAD
    assert git(folder, "remote") == "origin"
    assert (folder / "train.py").read_bytes() == train(_3="third\n", _15="second\n").encode()


def test_updates_work_on_another_machine_too(another_machine: None, folder: Path, wanted: cloning.Wanted) -> None:
    set_up(folder, replace(wanted, minimal=True))
    assert set_up(folder, wanted).state.head == FULL_HEAD
    (folder / "train.py").write_text("edited\n")
    assert set_up(folder, wanted, force=True).state.is_exactly(wanted.commit, wanted.patches)


def test_the_users_settings_do_not_make_a_patch_look_altered(
    another_machine: None, folder: Path, wanted: cloning.Wanted
) -> None:
    # At another commit the ids are others, so that what the patches change has to be looked at.
    state = set_up(folder, replace(wanted, commit="later")).state
    assert [patch.state for patch in state.patches] == ["applied"] * 3
    assert state.head != FULL_HEAD


def test_commit_may_be_a_branch_or_a_tag(source: Path, folder: Path, wanted: cloning.Wanted) -> None:
    later = git(source, "rev-parse", "later")
    assert set_up(folder, replace(wanted, commit="later")).state.base == later
    assert set_up(folder, replace(wanted, commit=later)).changed is False
    assert (folder / "later.txt").exists()


def test_an_empty_folder_is_used(folder: Path, wanted: cloning.Wanted) -> None:
    folder.mkdir(parents=True)
    set_up(folder, wanted)
    assert_complete(folder, wanted)


@pytest.mark.parametrize("name", ["blanks  and 'quotes\"", "größer 안전", "~ `x` %s;&", "-dash", "a:b", "back\\slash"])
def test_any_path_will_do(name: str, tmp_path: Path, source: Path, wanted: cloning.Wanted) -> None:
    folder = tmp_path / name / name
    copied = tmp_path / "source, not 'größer'"
    shutil.copytree(source, copied)
    wanted = replace(wanted, url=str(copied))
    set_up(folder, replace(wanted, minimal=True))
    set_up(folder, wanted)
    (folder / "train.py").write_text("edited\n")
    assert refusal(folder, wanted)
    set_up(folder, wanted, force=True)
    assert_complete(folder, wanted)


def test_a_relative_dir_is_where_the_command_runs(patched: Path, tmp_path: Path, ambersafe: Ambersafe) -> None:
    done = ambersafe("setup", "--repo", patched, "--dir", "sub folder/größer")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work/sub folder/größer/train.py").exists()
    assert str(tmp_path / "work/sub folder/größer") in done.stderr


def test_dir_can_be_set_in_the_environment(patched: Path, tmp_path: Path, ambersafe: Ambersafe) -> None:
    done = ambersafe("setup", "--repo", patched, env={"AMBERSAFE_UPSTREAM_DIR": "elsewhere"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work/elsewhere/train.py").exists()
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["elsewhere"]


# Again, and what was interrupted


def test_second_setup_changes_nothing(clone: Path, wanted: cloning.Wanted) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in clone.rglob("*") if path.name != "index"}

    before, times_before = snapshot(clone), times()
    result = set_up(clone, wanted)
    assert result.changed is False
    assert result.saved == ()
    assert snapshot(clone) == before
    assert times() == times_before


def test_second_setup_says_that_there_is_nothing_to_do(patched: Path, ambersafe: Ambersafe) -> None:
    before = snapshot(patched)
    done = ambersafe("setup", "--dir", patched)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"Nothing to do: {patched} is upstream {upstream.PINNED_COMMIT[:12]} with ")
    assert done.stdout == ""
    assert snapshot(patched) == before


def test_a_minimal_clone_becomes_a_full_one_and_back(folder: Path, wanted: cloning.Wanted) -> None:
    minimal = replace(wanted, minimal=True)
    for each in (minimal, wanted, minimal):
        assert set_up(folder, each).changed
        assert_complete(folder, each)
        assert (folder / "extra.py").exists() is not each.minimal
        assert (folder / "old.txt").exists() is each.minimal


def test_half_a_series_is_finished(clone: Path, wanted: cloning.Wanted) -> None:
    git(clone, "reset", "--quiet", "--hard", "HEAD~2")
    assert set_up(clone, wanted).changed
    assert_complete(clone, wanted)


def test_an_older_series_is_replaced(folder: Path, workshop: Path, wanted: cloning.Wanted, tmp_path: Path) -> None:
    old = tmp_path / "old"
    git(workshop, "clone", "--quiet", "--branch", "main", str(workshop), str(old))
    git(old, "reset", "--quiet", "--hard", "HEAD~1")
    commit(old, {"gone.py": "gone\n"}, "Add what a later series no longer has")
    older = replace(wanted, series=export(old, wanted.commit, tmp_path / "old-series"))
    set_up(folder, older)
    assert (folder / "gone.py").exists()
    result = set_up(folder, wanted)
    assert result.saved == ()
    assert_complete(folder, wanted)
    assert not (folder / "gone.py").exists()


def test_untracked_files_survive_an_update(folder: Path, wanted: cloning.Wanted) -> None:
    set_up(folder, replace(wanted, minimal=True))
    (folder / "notes").mkdir()
    for name in ("mine.txt", "notes/train.py", ".cache"):
        (folder / name).write_text("mine")
    set_up(folder, wanted)
    set_up(folder, wanted, force=True)
    assert_complete(folder, wanted)
    assert git(folder, "ls-files", "--others").split() == [".cache", "mine.txt", "notes/train.py"]


# Killed with SIGKILL

# Stand in git's place: the one kills setup at a certain call, the other while it writes files, and dies with it.
KILLS_AT_A_CALL = """#!/bin/sh
echo "$@" >> "$CALLS"
if [ "$(wc -l < "$CALLS")" -eq "$KILL_AT" ]; then
    [ "$KILL" = after ] && "$REAL_GIT" "$@"
    kill -9 $PPID
    exit 1
fi
exec "$REAL_GIT" "$@"
"""
KILLS_WHILE_IT_WRITES = """#!/bin/sh
case "$*" in *"checkout --quiet --force"*)
    : > .git/index.lock
    rm old.txt
    printf 'blank at' > extra.py
    printf 'line 1\nli' > train.py
    kill -9 $PPID
    exit 1
esac
exec "$REAL_GIT" "$@"
"""

CHILD = multiprocessing.get_context("fork")


def set_up_in_child(
    folder: Path, wanted: cloning.Wanted, force: bool, environment: dict[str, str], scratch: Path
) -> None:
    os.environ.update(environment)
    tempfile.tempdir = str(scratch)  # which a killed process leaves behind
    set_up(folder, wanted, force)


def set_up_with(
    git_script: str, folder: Path, wanted: cloning.Wanted, force: bool, tmp_path: Path, environment: dict[str, str]
) -> int | None:
    """Run a setup in a process of its own, with this script in git's place. Return how it ended."""
    script = tmp_path / "bin" / "git"
    script.parent.mkdir(exist_ok=True)
    script.write_text(git_script)
    script.chmod(0o755)
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"REAL_GIT": str(shutil.which("git")), "PATH": path, **environment}
    child = CHILD.Process(target=set_up_in_child, args=(folder, wanted, force, environment, script.parent))
    child.start()
    child.join()
    return child.exitcode


def kill_at_every_git_call(
    wanted: cloning.Wanted,
    force: bool,
    prepare: Callable[[Path], object],
    check: Callable[[Path], None],
    tmp_path: Path,
) -> int:
    """Kill a setup before its first call of git, another before its second, and so on, and have the next one finish.

    Where a call changed something one more is killed right after it, before Python goes on. What a kill leaves that
    another left before is not finished anew. Return how many different things were left.
    """
    calls = tmp_path / "calls"
    folder = tmp_path / "killed" / "clone"
    finished: list[dict[str, object]] = []

    def kill(call: int, when: str) -> dict[str, object] | None:
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir()
        prepare(folder)
        calls.write_text("")
        # The dates, so that the same call leaves the same.
        dates = dict.fromkeys(("GIT_COMMITTER_DATE", "GIT_AUTHOR_DATE"), "2024-03-04T05:06:07+0000")
        environment = {**dates, "CALLS": str(calls), "KILL": when, "KILL_AT": str(call)}
        ended = set_up_with(KILLS_AT_A_CALL, folder, wanted, force, tmp_path, environment)
        reached = len(calls.read_text().splitlines()) == call
        assert ended == (-signal.SIGKILL if reached else 0), calls.read_text()
        left = {name: what for name, what in snapshot(folder).items() if not name.endswith("/FETCH_HEAD")}
        if left not in finished:
            finished.append(left)
            set_up(folder, wanted, force)
            check(folder)
        return left if reached else None

    last = None
    for call in itertools.count(1):
        left = kill(call, "before")
        if call > 1 and left != last:
            kill(call - 1, "after")
        if left is None:
            break
        last = left
    return len(finished)


@pytest.mark.slow
def test_a_first_setup_killed_at_any_git_call_is_finished_by_the_next(wanted: cloning.Wanted, tmp_path: Path) -> None:
    left = kill_at_every_git_call(
        wanted,
        False,
        prepare=lambda folder: None,
        check=lambda folder: assert_complete(folder, wanted),
        tmp_path=tmp_path,
    )
    assert left > 5


@pytest.mark.slow
def test_an_update_killed_at_any_git_call_is_finished_by_the_next(
    folder: Path, wanted: cloning.Wanted, tmp_path: Path
) -> None:
    set_up(folder, replace(wanted, minimal=True))
    left = kill_at_every_git_call(
        wanted,
        False,
        prepare=lambda each: copy(folder, each),
        check=lambda each: assert_complete(each, wanted),
        tmp_path=tmp_path,
    )
    assert left > 3


@pytest.mark.slow
def test_a_forced_update_killed_at_any_git_call_loses_neither_edit_nor_commit(
    users_clone: Path, wanted: cloning.Wanted, tmp_path: Path
) -> None:
    mine = commit(users_clone, {"mine.txt": "mine\n"}, "Mine")
    (users_clone / "train.py").write_text(train(_10="edited\n"))
    (users_clone / "extra.py").write_text("untracked\n")

    def check(folder: Path) -> None:
        assert_complete(folder, wanted)
        assert git(folder, "rev-parse", f"ambersafe-saved-{mine[:12]}") == mine
        assert git(folder, "show", "stash@{0}:train.py") == train(_10="edited\n").strip()
        assert (folder / "extra.py.saved-1").read_text() == "untracked\n"

    left = kill_at_every_git_call(
        wanted, True, prepare=lambda each: copy(users_clone, each), check=check, tmp_path=tmp_path
    )
    assert left > 5


def test_an_update_killed_while_git_writes_files_is_finished_by_the_next(
    folder: Path, wanted: cloning.Wanted, tmp_path: Path
) -> None:
    set_up(folder, replace(wanted, minimal=True))
    assert set_up_with(KILLS_WHILE_IT_WRITES, folder, wanted, False, tmp_path, {}) == -signal.SIGKILL
    assert (folder / "train.py").read_text() == "line 1\nli"
    assert set_up(folder, wanted).changed
    assert_complete(folder, wanted)


@pytest.fixture
def half_checked_out(folder: Path, wanted: cloning.Wanted, tmp_path: Path) -> Path:
    """A minimal clone as it is when git is killed while it checks out the whole series."""
    set_up(folder, replace(wanted, minimal=True))
    set_up(tmp_path / "full" / "clone", wanted)
    git(folder, "fetch", "--quiet", str(tmp_path / "full" / "clone"), "HEAD")
    (folder / ".git" / "ambersafe-checkout").write_text(f"{FULL_HEAD} {wanted.commit}")
    (folder / ".git" / "index.lock").write_text("not a whole index")
    (folder / "old.txt").unlink()
    (folder / "extra.py").write_text("blank at")
    (folder / "train.py").write_text(train(_3="third\n")[:30])
    return folder


def test_a_checkout_killed_while_it_writes_is_finished(half_checked_out: Path, wanted: cloning.Wanted) -> None:
    assert set_up(half_checked_out, wanted).changed
    assert_complete(half_checked_out, wanted)


def test_a_killed_checkout_does_not_stand_in_the_way_of_another_wish(
    half_checked_out: Path, wanted: cloning.Wanted
) -> None:
    minimal = replace(wanted, minimal=True)
    assert set_up(half_checked_out, minimal).changed
    assert_complete(half_checked_out, minimal)


@pytest.mark.parametrize("name", ["train.py", "config/config.yaml", "extra.py", "old.txt"])
def test_an_edit_after_a_killed_checkout_is_not_overwritten(
    name: str, half_checked_out: Path, wanted: cloning.Wanted
) -> None:
    before = (half_checked_out / name).read_bytes() if (half_checked_out / name).exists() else None
    (half_checked_out / name).write_text("edited\n")
    with pytest.raises(errors.CloneError, match=name) as caught:
        set_up(half_checked_out, wanted)
    assert str(half_checked_out) in caught.value.message
    assert caught.value.hint
    assert (half_checked_out / name).read_text() == "edited\n"

    if before is None:
        (half_checked_out / name).unlink()
    else:
        (half_checked_out / name).write_bytes(before)
    set_up(half_checked_out, wanted)
    assert_complete(half_checked_out, wanted)


def test_a_commit_after_a_killed_checkout_is_kept_on_a_branch(half_checked_out: Path, wanted: cloning.Wanted) -> None:
    (half_checked_out / ".git" / "index.lock").unlink()
    mine = commit(half_checked_out, {}, "Whatever is there now")
    result = set_up(half_checked_out, wanted)
    assert git(half_checked_out, "rev-parse", f"ambersafe-saved-{mine[:12]}") == mine
    assert [mine[:12] in place for place in result.saved] == [True]
    assert_complete(half_checked_out, wanted)


# What is the user's


def edit(clone: Path) -> None:
    (clone / "train.py").write_text(train(_3="edited\n"))


def stage(clone: Path) -> None:
    edit(clone)
    git(clone, "add", "train.py")


def stage_and_undo_on_disk(clone: Path) -> None:
    before = (clone / "train.py").read_text()
    stage(clone)
    (clone / "train.py").write_text(before)


def stage_new(clone: Path) -> None:
    (clone / "new.txt").write_text("edited\n")
    git(clone, "add", "new.txt")


def delete(clone: Path) -> None:
    (clone / "train.py").unlink()


def chmod(clone: Path) -> None:
    (clone / "train.py").chmod(0o755)


@pytest.mark.parametrize("touch", [edit, stage, stage_and_undo_on_disk, stage_new, delete, chmod])
def test_local_edits_are_refused_and_with_force_stashed(
    touch: Callable[[Path], None], clone: Path, wanted: cloning.Wanted
) -> None:
    touch(clone)
    error = refusal(clone, wanted)
    name = "new.txt" if touch is stage_new else "train.py"
    assert f"local edits: {name}" in error.message
    assert "--force" in error.hint

    result = set_up(clone, wanted, force=True)
    assert_complete(clone, wanted)
    assert [f"git -C {clone} stash show" in place for place in result.saved] == [True]
    git(clone, "stash", "pop", "--index")
    refusal(clone, wanted)


def test_a_second_force_leaves_the_first_stash(clone: Path, wanted: cloning.Wanted) -> None:
    for text in ("first\n", "second\n"):
        (clone / "train.py").write_text(text)
        set_up(clone, wanted, force=True)
    assert git(clone, "show", "stash@{1}:train.py") == "first"
    assert git(clone, "show", "stash@{0}:train.py") == "second"


def add_commit(clone: Path) -> None:
    commit(clone, {"mine.txt": "mine\n"}, "Mine")


def amend(clone: Path) -> None:
    (clone / "config/config.yaml").write_text("seed: 1\n")
    git(clone, "commit", "--quiet", "--all", "--amend", "--no-edit")


def commit_on_another_branch(clone: Path) -> None:
    git(clone, "checkout", "--quiet", "-b", "mine", upstream.PINNED_COMMIT)
    commit(clone, {"mine.txt": "mine\n"}, "Mine")


def commit_on_no_branch(clone: Path) -> None:
    git(clone, "checkout", "--quiet", "--detach")
    commit(clone, {"mine.txt": "mine\n"}, "Mine")


def start_another_history(clone: Path) -> None:
    git(clone, "checkout", "--quiet", "--orphan", "mine")
    git(clone, "commit", "--quiet", "--message", "Mine")


def check_out_later(clone: Path) -> None:
    git(clone, "checkout", "--quiet", "--detach", "origin/later")


COMMITS = [add_commit, amend, commit_on_another_branch, commit_on_no_branch, start_another_history, check_out_later]


@pytest.mark.parametrize("touch", COMMITS)
def test_commits_that_are_not_ours_are_refused_and_with_force_kept(
    touch: Callable[[Path], None], clone: Path, wanted: cloning.Wanted
) -> None:
    touch(clone)
    theirs = git(clone, "rev-parse", "HEAD")
    error = refusal(clone, wanted)
    assert theirs[:12] in error.message
    assert "--force" in error.hint

    result = set_up(clone, wanted, force=True)
    assert_complete(clone, wanted)
    assert [theirs[:12] in place for place in result.saved] == [True]
    assert git(clone, "rev-parse", f"ambersafe-saved-{theirs[:12]}") == theirs


def test_a_message_names_the_users_commits(clone: Path, wanted: cloning.Wanted) -> None:
    commit(clone, {"mine.txt": "mine\n"}, "Mine\twith a tab, and lines\u2028in a line")
    assert upstream.inspect(clone, wanted.series).foreign == ("Mine\twith a tab, and lines\u2028in a line",)
    assert "Mine" in refusal(clone, wanted).message


def test_a_signed_commit_is_read_whatever_git_shows_of_signatures(
    clone: Path, wanted: cloning.Wanted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpg = tmp_path / "gpg"
    gpg.write_text(
        "#!/bin/sh\ncat > /dev/null\necho '[GNUPG:] SIG_CREATED ' >&2\necho '-----BEGIN PGP SIGNATURE-----'\n"
    )
    gpg.chmod(0o755)
    config = tmp_path / "gitconfig"
    config.write_text(f"[gpg]\nprogram = {gpg}\n[log]\nshowSignature = true\n[i18n]\nlogOutputEncoding = ISO-8859-1\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    git(clone, "commit", "--quiet", "--allow-empty", "--gpg-sign", "--message", "Größer")
    assert git(clone, "log", "-1", "--format=").startswith("[GNUPG:]")  # so that there is something to be misread
    assert upstream.inspect(clone, wanted.series).foreign == ("Größer",)
    assert "Größer" in refusal(clone, wanted).message


def test_a_second_force_leaves_the_first_saved_branch(clone: Path, wanted: cloning.Wanted) -> None:
    theirs = []
    for text in ("first\n", "second\n"):
        theirs.append(commit(clone, {"mine.txt": text}, "Mine"))
        set_up(clone, wanted, force=True)
    saved = git(clone, "for-each-ref", "--format=%(objectname)", "refs/heads/ambersafe-saved-*").split()
    assert sorted(saved) == sorted(theirs)


def test_force_goes_through_from_a_saved_branch(clone: Path, wanted: cloning.Wanted) -> None:
    mine = commit(clone, {"mine.txt": "mine\n"}, "Mine")
    set_up(clone, wanted, force=True)
    git(clone, "checkout", "--quiet", f"ambersafe-saved-{mine[:12]}")
    refusal(clone, wanted)
    set_up(clone, wanted, force=True)
    assert_complete(clone, wanted)
    assert git(clone, "rev-parse", f"ambersafe-saved-{mine[:12]}") == mine


def test_an_altered_patch_is_named(clone: Path, wanted: cloning.Wanted) -> None:
    amend(clone)
    state = upstream.inspect(clone, wanted.series)
    assert [patch.state for patch in state.patches] == ["applied", "applied", "altered"]
    assert state.has(wanted.series[2])
    assert not state.is_ours


def test_a_users_own_clone_is_taken_over_without_loss(users_clone: Path, wanted: cloning.Wanted) -> None:
    (users_clone / "mine.txt").write_text("mine")
    result = set_up(users_clone, wanted)
    assert result.saved == ()
    assert_complete(users_clone, wanted)
    assert git(users_clone, "rev-parse", "main") == wanted.commit
    assert (users_clone / "mine.txt").read_text() == "mine"


def test_a_users_own_branch_by_our_name_is_kept(users_clone: Path, wanted: cloning.Wanted) -> None:
    git(users_clone, "checkout", "--quiet", "-b", upstream.BRANCH)
    mine = commit(users_clone, {"mine.txt": "mine\n"}, "Mine")
    git(users_clone, "checkout", "--quiet", "main")
    set_up(users_clone, wanted)
    assert_complete(users_clone, wanted)
    assert git(users_clone, "rev-parse", f"ambersafe-saved-{mine[:12]}") == mine


def test_an_untracked_file_in_the_way_is_refused_and_with_force_moved_aside(
    users_clone: Path, wanted: cloning.Wanted
) -> None:
    (users_clone / "extra.py").write_text("mine\n")
    with pytest.raises(errors.CloneError, match=r"extra\.py") as caught:
        set_up(users_clone, wanted)
    assert "--force" in caught.value.hint
    assert (users_clone / "extra.py").read_text() == "mine\n"
    assert git(users_clone, "branch", "--show-current") == "main"

    result = set_up(users_clone, wanted, force=True)
    assert_complete(users_clone, wanted)
    assert (users_clone / "extra.py.saved-1").read_text() == "mine\n"
    assert [str(users_clone / "extra.py.saved-1") in place for place in result.saved] == [True]


def test_a_clone_at_another_commit_is_refused_and_force_takes_it_back(clone: Path, wanted: cloning.Wanted) -> None:
    later = replace(wanted, commit="later")
    error = refusal(clone, later)
    assert f"--commit {wanted.commit}" in error.hint
    assert "--force" in error.hint
    result = set_up(clone, later, force=True)
    assert result.saved == ()  # nothing of the user's was in it
    assert (clone / "later.txt").exists()
    set_up(clone, wanted, force=True)
    assert_complete(clone, wanted)


def stop_am(clone: Path) -> None:
    bad = clone.parent / "bad.patch"
    bad.write_text(git(clone, "format-patch", "--stdout", "-1").replace("-first", "-other"))
    with pytest.raises(Exception, match="exit status"):
        git(clone, "am", str(bad))


def stop_rebase(clone: Path) -> None:
    with pytest.raises(Exception, match="exit status"):
        git(clone, "rebase", "--exec", "false", "HEAD~1")


def stop_merge(clone: Path) -> None:
    git(clone, "merge", "--no-commit", "--quiet", "origin/later")


def stop_cherry_pick(clone: Path) -> None:
    with pytest.raises(Exception, match="exit status"):
        git(clone, "cherry-pick", "origin/diverged")
        git(clone, "cherry-pick", "HEAD~1")


@pytest.mark.parametrize("stop", [stop_am, stop_rebase, stop_merge, stop_cherry_pick])
def test_a_clone_in_the_middle_of_something_is_left_alone(
    stop: Callable[[Path], None], clone: Path, wanted: cloning.Wanted
) -> None:
    stop(clone)
    minimal = replace(wanted, minimal=True)
    assert "in the middle of" in refusal(clone, minimal).message
    before = snapshot(clone)
    with pytest.raises(errors.CloneError, match="in the middle of"):
        set_up(clone, minimal, force=True)
    assert snapshot(clone) == before


def make_file(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("mine")


def make_folder(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "train.py").write_text("mine")


def make_other_repository(folder: Path) -> None:
    make_repository(folder, {"other.py": "mine"})


def make_new_repository(folder: Path) -> None:
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet")


def make_bare_repository(folder: Path) -> None:
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet", "--bare")


def make_folder_in_a_repository(folder: Path) -> None:
    make_repository(folder.parent, {"clone/train.py": "mine"})


IN_THE_WAY = [
    make_file,
    make_folder,
    make_other_repository,
    make_new_repository,
    make_bare_repository,
    make_folder_in_a_repository,
]


@pytest.mark.parametrize("make", IN_THE_WAY)
def test_what_is_no_clone_is_refused_and_with_force_moved_aside(
    make: Callable[[Path], None], folder: Path, wanted: cloning.Wanted
) -> None:
    make(folder)
    inode = folder.stat().st_ino
    assert "--force" in refusal(folder, wanted).hint
    saved = folder.with_name("clone.saved-1")
    assert set_up(folder, wanted, force=True).saved == (f"the folder that was there: {saved}",)
    assert saved.stat().st_ino == inode
    assert upstream.inspect(folder, wanted.series).is_exactly(wanted.commit, wanted.patches)


def test_a_second_force_leaves_what_the_first_moved_aside(folder: Path, wanted: cloning.Wanted) -> None:
    for text in ("first", "second"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        folder.write_text(text)
        set_up(folder, wanted, force=True)
    assert folder.with_name("clone.saved-1").read_text() == "first"
    assert folder.with_name("clone.saved-2").read_text() == "second"


def test_a_forced_setup_that_fails_leaves_what_is_there(folder: Path, wanted: cloning.Wanted) -> None:
    make_folder(folder)
    before = snapshot(folder)
    with pytest.raises(errors.SourceError):
        set_up(folder, replace(wanted, url=str(folder.parent / "nowhere")), force=True)
    with pytest.raises(errors.PatchError):
        set_up(folder, replace(wanted, commit="diverged"), force=True)
    assert snapshot(folder) == before


# What can go wrong


def test_without_git_the_error_says_so(folder: Path, wanted: cloning.Wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder.parent))
    for act in (lambda: set_up(folder, wanted), lambda: upstream.inspect(folder, wanted.series)):
        with pytest.raises(errors.GitError, match="git is not installed") as caught:
            act()
        assert "Install git" in caught.value.hint
    assert not folder.exists()


@pytest.mark.parametrize("command", ["setup", "status"])
def test_without_git_the_command_ends_with_68(command: str, ambersafe: Ambersafe) -> None:
    done = ambersafe(command, env={"PATH": "/nowhere"})
    assert done.returncode == errors.GitError.exit_status == 68
    assert done.stderr.startswith("error: git is not installed")


def test_a_failed_git_command_shows_what_git_said(clone: Path, wanted: cloning.Wanted) -> None:
    (clone / ".git" / "index").write_text("no index")
    with pytest.raises(errors.GitError, match="index file") as caught:
        set_up(clone, replace(wanted, minimal=True))
    assert str(clone) in caught.value.message


def nothing_was_left(folder: Path) -> bool:
    return not folder.parent.exists() or not list(folder.parent.iterdir())


@pytest.mark.parametrize(
    "url", ["/nowhere/at/all", "file:///nowhere", "http://127.0.0.1:1/x.git", "ext::sh -c 'touch executed'", "-x"]
)
def test_no_repository_at_the_url(
    url: str, folder: Path, wanted: cloning.Wanted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.SourceError) as caught:
        set_up(folder, replace(wanted, url=url))
    assert f"Cannot clone {url}: " in caught.value.message
    assert "Cmd(" not in caught.value.message  # but what git said
    assert "--repo" in caught.value.hint
    assert nothing_was_left(folder)
    assert not (tmp_path / "executed").exists()


def test_no_such_commit(folder: Path, source: Path, wanted: cloning.Wanted) -> None:
    unknown = replace(wanted, commit="0123456789" * 4)
    with pytest.raises(errors.SourceError, match=f"{source} has no commit 0123456789"):
        set_up(folder, unknown)
    assert nothing_was_left(folder)
    set_up(folder, wanted)
    before = snapshot(folder)
    with pytest.raises(errors.SourceError, match=f"{source} has no commit 0123456789") as caught:
        set_up(folder, unknown, force=True)
    assert "--commit" in caught.value.hint
    after = snapshot(folder)
    del after["clone/.git/FETCH_HEAD"]  # that it asked again is all right
    assert after == before


@pytest.mark.parametrize("name", ["--upload-pack=touch executed;", "-uexecuted", "+main:mine", "main:mine", ""])
def test_what_is_no_name_of_a_commit_never_reaches_git(
    name: str, folder: Path, wanted: cloning.Wanted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.SourceError):
        set_up(folder, replace(wanted, commit=name))
    assert nothing_was_left(folder)
    set_up(folder, wanted)
    before = snapshot(folder)
    with pytest.raises(errors.SourceError):
        set_up(folder, replace(wanted, commit=name), force=True)
    assert snapshot(folder) == before
    assert not list(tmp_path.rglob("executed*"))


def test_a_patch_that_does_not_apply_is_shown(folder: Path, wanted: cloning.Wanted) -> None:
    with pytest.raises(errors.PatchError) as caught:
        set_up(folder, replace(wanted, commit="diverged"))
    message = caught.value.message
    assert message.startswith(f"{wanted.series[1].name} does not apply to ")
    assert "train.py, line 12\n@@ -12,7 +12,7 @@" in message
    assert "-line 15\n+second\n" in message
    assert "--commit" in caught.value.hint
    assert nothing_was_left(folder)


def test_a_patch_that_does_not_apply_leaves_the_clone_as_it_is(clone: Path, wanted: cloning.Wanted) -> None:
    edit(clone)
    before = snapshot(clone)
    with pytest.raises(errors.PatchError):
        set_up(clone, replace(wanted, commit="diverged"), force=True)
    assert snapshot(clone) == before


def test_the_command_shows_a_patch_that_does_not_apply(source: Path, tmp_path: Path, ambersafe: Ambersafe) -> None:
    done = ambersafe("setup", "--repo", source, "--commit", "main")
    assert done.returncode == errors.PatchError.exit_status
    assert f"error: {patches.read_series()[0].name} does not apply" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "work").iterdir()) == []


def test_a_parent_that_is_a_file(tmp_path: Path, wanted: cloning.Wanted) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(errors.CloneError, match="Cannot write") as caught:
        set_up(tmp_path / "file" / "clone", wanted)
    assert str(tmp_path / "file" / "clone") in caught.value.message
    assert "--dir" in caught.value.hint


def test_a_parent_that_may_not_be_written(tmp_path: Path, wanted: cloning.Wanted) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("root may write anywhere")
        with pytest.raises(errors.CloneError, match="Cannot write"):
            set_up(tmp_path / "clone", wanted)
    finally:
        tmp_path.chmod(stat.S_IRWXU)


@pytest.fixture
def secret_url(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL with a user's name and password in it, by which git finds `source`."""
    url = f"https://user:{HIDDEN}@x@example.invalid/repository.git"
    config = tmp_path / "gitconfig"
    config.write_text(f'[url "{source}"]\n    insteadOf = {url}\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    return url


def test_a_password_in_the_url_is_in_no_message(folder: Path, secret_url: str, wanted: cloning.Wanted) -> None:
    shown = "https://example.invalid/repository.git"
    with pytest.raises(errors.SourceError) as fresh:
        set_up(folder, replace(wanted, url=secret_url, commit="nonesuch"))
    assert set_up(folder, replace(wanted, url=secret_url)).state.url == shown
    assert upstream.inspect(folder, wanted.series).url == shown
    with pytest.raises(errors.SourceError) as existing:
        set_up(folder, replace(wanted, url=secret_url, commit="nonesuch"))
    for caught in (fresh, existing):
        assert shown in caught.value.message
        assert HIDDEN not in caught.value.message + caught.value.hint


def test_a_password_in_the_url_is_not_printed(ambersafe: Ambersafe) -> None:
    done = ambersafe("setup", "--debug", "--repo", f"http://{HIDDEN}:{HIDDEN}@127.0.0.1:1/x.git")
    assert done.returncode == errors.SourceError.exit_status
    assert "error: Cannot clone http://127.0.0.1:1/x.git" in done.stderr
    assert "Traceback" in done.stderr
    assert HIDDEN not in done.stdout + done.stderr


def test_two_setups_at_the_same_time_both_end_well(folder: Path, wanted: cloning.Wanted, tmp_path: Path) -> None:
    for each in (wanted, replace(wanted, minimal=True)):  # a new clone, then an update
        children = [CHILD.Process(target=set_up_in_child, args=(folder, each, False, {}, tmp_path)) for _ in range(3)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0, 0, 0]
        assert_complete(folder, each)


# Looking only


def test_where_there_is_no_clone_inspect_says_how_to_make_one(folder: Path, wanted: cloning.Wanted) -> None:
    for _ in range(2):
        with pytest.raises(errors.CloneError, match="There is no clone") as caught:
            upstream.inspect(folder, wanted.series)
        assert str(folder) in caught.value.message
        assert "ambersafe setup" in caught.value.hint
        folder.mkdir(parents=True, exist_ok=True)


def test_inspect_of_a_clone_without_the_base(folder: Path, source: Path, wanted: cloning.Wanted) -> None:
    make_repository(folder, {"train.py": "another\n"})
    state = upstream.inspect(folder, wanted.series)
    assert state.base is None
    assert state.url == ""
    assert not state.is_ours
    assert [patch.state for patch in state.patches] == ["missing"] * 3


def test_inspect_changes_nothing(clone: Path, wanted: cloning.Wanted) -> None:
    edit(clone)
    before = snapshot(clone)
    assert upstream.inspect(clone, wanted.series).edited == ("train.py",)
    assert snapshot(clone) == before


def test_status_as_json_tells_of_patches_edits_and_commits(ambersafe: Ambersafe, fake_clone: Path) -> None:
    base = git(fake_clone, "rev-parse", upstream.BASE_REF)
    git(fake_clone, "reset", "--quiet", "--hard", "HEAD~1")
    mine = commit(fake_clone, {"größer.txt": ""}, "Größer")
    (fake_clone / "größer.txt").write_text("edited\n")
    done = ambersafe("status", "--json")
    assert done.returncode == 0, done.stderr
    clone = json.loads(done.stdout)["clone"]
    names = [patch.name for patch in patches.read_series()]
    states = ["altered"] * (len(names) - 1) + ["missing"]
    assert clone == {
        "folder": str(fake_clone),
        "url": "",
        "base": base,
        "head": mine,
        "tree": git(fake_clone, "rev-parse", "HEAD^{tree}"),
        "edited": ["größer.txt"],
        "on_top": ["Größer"],
        "patches": [{"name": name, "state": state} for name, state in zip(names, states, strict=True)],
    }


def test_status_as_json_of_a_clone_that_is_in_order(patched: Path, ambersafe: Ambersafe) -> None:
    clone = json.loads(ambersafe("status", "--json", "--dir", patched).stdout)["clone"]
    series = patches.read_series()
    assert clone["patches"] == [{"name": patch.name, "state": "applied"} for patch in series]
    assert (clone["base"], clone["head"]) == (upstream.PINNED_COMMIT, series[-1].commit)
    assert (clone["edited"], clone["on_top"]) == ([], [])


def test_status_as_json_where_there_is_no_clone(ambersafe: Ambersafe) -> None:
    done = ambersafe("status", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["clone"] is None

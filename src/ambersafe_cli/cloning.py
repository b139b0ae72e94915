"""Making the patched clone of upstream, and bringing one that is there to what is wanted. Nothing here prints.

A new clone is made under another name and renamed when it is whole. In a clone that is there already the commits are
made elsewhere, then checked out under a marker, see checkouts.py. So a setup that was killed at any point is finished
by the next one.
"""

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import git
from git.util import CallableRemoteProgress

from ambersafe_cli import checkouts
from ambersafe_cli.display import without_secrets
from ambersafe_cli.errors import CloneError, GitError, SourceError
from ambersafe_cli.git_calls import (
    NETWORK_ENVIRONMENT,
    git_errors,
    what_git_said,
    with_own_settings,
)
from ambersafe_cli.patches import Patch
from ambersafe_cli.upstream import (
    BASE_REF,
    BRANCH,
    PINNED_COMMIT,
    CloneState,
    apply_patches,
    changed_files,
    has_commit,
    inspect,
    inspect_repository,
    is_empty,
    open_clone,
    unused,
)

# What git leaves in its folder while the user is in the middle of something.
_IN_THE_MIDDLE = ("rebase-apply", "rebase-merge", "MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD")

Progress = Callable[[str, float], None]
"""Told of a step of the work: its name, and how much of it is done, from 0 to 1."""


@dataclass(frozen=True)
class Wanted:
    """What a clone shall be: `commit` (an id, a branch or a tag) of the repository at `url`, and on top of it the
    series, or of a minimal clone its first patch alone."""

    url: str
    commit: str
    series: tuple[Patch, ...]
    minimal: bool = False

    @property
    def patches(self) -> tuple[Patch, ...]:
        return self.series[:1] if self.minimal else self.series


@dataclass(frozen=True)
class SetupResult:
    """The clone as setup leaves it, whether setup changed anything, and where it put what it had to move away."""

    state: CloneState
    changed: bool
    saved: tuple[str, ...]


@contextlib.contextmanager
def alone(parent: Path, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Let one setup at a time work in `parent`; a second one waits, and tells what for. The lock goes with the process,
    however it ends."""
    handle = os.open(parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every network file system has locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait(f"waiting for another setup in {parent}")
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def set_up(folder: Path, wanted: Wanted, force: bool, progress: Progress) -> SetupResult:
    """Make `folder` a clone as it is wanted.

    A new clone is made under another name and renamed when it is whole. In a clone that is there already the commits
    are made elsewhere, then checked out. So a setup that was killed at any point is finished by the next one.
    Raises CloneError for what it must not touch without `force`; even then the user's things are kept, see `saved`.
    Raises SourceError, PatchError, GitError too.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder.parent, lambda what: progress(what, 0.0)), git_errors(f"Setting up {folder}"):
            if folder.exists() and not is_empty(folder):
                try:
                    repo = open_clone(folder)
                except CloneError:
                    if not force:
                        raise
                else:
                    return _update(repo, folder, wanted, force, progress)
            saved = _clone(folder, wanted, progress)
            return SetupResult(inspect(folder, wanted.series), changed=True, saved=saved)
    except OSError as error:
        raise CloneError(f"Cannot write {folder}: {error.strerror or error}", "Choose another with --dir.") from error
    except (GitError, SourceError) as error:
        if not error.hint and folder.exists():
            aside = shlex.join(["mv", str(folder), f"{folder}.damaged"])
            error.hint = f"If the clone is damaged, move it aside, `{aside}`, and run ambersafe setup again."
        raise


def _move_aside(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.saved-{n}") for n in range(1, 1_000_000))
    return path.rename(next(name for name in names if not name.exists()))


def _clone(folder: Path, wanted: Wanted, progress: Progress) -> tuple[str, ...]:
    """Make a new clone; what is in its place is moved aside once the clone is whole, and it is said where."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a setup that was killed
    try:
        partial.mkdir()  # or it is git that cannot write here, which looks as if the repository were to blame
        progress("cloning", 0.0)
        watch = CallableRemoteProgress(
            lambda _, done, total, message: progress("cloning", float(done) / float(total or done or 1))
        )
        try:
            repo = git.Repo.clone_from(
                wanted.url,
                partial,
                progress=watch,  # type: ignore[arg-type]  # it takes one, whatever its signature says
                env=NETWORK_ENVIRONMENT,
                no_checkout=True,
                origin="origin",  # whatever clone.defaultRemoteName says
            )
        except (git.GitCommandError, git.UnsafeProtocolError) as error:
            # Of a command with progress GitPython keeps what git said to itself.
            said = [line for line in watch.error_lines + watch.other_lines if not line.startswith("Cloning into ")]
            why = without_secrets("\n".join(said).strip()) or what_git_said(error)
            raise SourceError(
                f"Cannot clone {without_secrets(wanted.url)}: {why}",
                "Is there a network? --repo takes a mirror, or the path of a clone that was made elsewhere.",
            ) from error
        if (clean := without_secrets(wanted.url)) != wanted.url:
            repo.git.remote("set-url", "origin", clean)
            shutil.rmtree(Path(repo.git_dir, "logs"), ignore_errors=True)  # they name the address, too
        with_own_settings(repo)
        base = _find_commit(repo, wanted.commit, wanted.url)
        repo.git.checkout("--quiet", "-B", BRANCH, base)
        repo.git.update_ref(BASE_REF, base)
        progress("patching", 0.0)
        apply_patches(repo, [patch.path for patch in wanted.patches])
        repo.close()
        saved: tuple[str, ...] = ()
        if folder.exists() and not is_empty(folder):
            saved = (f"the folder that was there: {_move_aside(folder)}",)
        partial.rename(folder)
        return saved
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _find_commit(repo: git.Repo, commit: str, url: str) -> str:
    """Return the full id of a commit, branch or tag; ask the remote for it if it is not here. Raises SourceError.

    An id is that commit alone, whatever a mirror has called its branches.
    """
    is_a_name = re.fullmatch(r"[^-+^:][^:]*", commit)  # or git would take it for an option or a refspec
    names = [commit] if re.fullmatch(r"[0-9a-fA-F]{40}", commit) else [f"origin/{commit}", commit]
    for fetch in (None, ["origin"], ["origin", commit]) if is_a_name else ():
        if fetch:
            with contextlib.suppress(git.GitCommandError):
                # Not the program that the repository has for it: of two settings git takes the first.
                repo.git.fetch("--quiet", "--upload-pack=git-upload-pack", *fetch)
        for name in names:
            if has_commit(repo, name):
                return str(repo.git.rev_parse(f"{name}^{{commit}}"))
    url = without_secrets(url)
    hint = "" if commit == PINNED_COMMIT else f"Leave --commit away to take {PINNED_COMMIT[:12]}."
    raise SourceError(f"{url} has no commit {commit}.", hint)


def _update(repo: git.Repo, folder: Path, wanted: Wanted, force: bool, progress: Progress) -> SetupResult:
    state = inspect_repository(repo, folder, wanted.series)
    saved: tuple[str, ...] = ()
    if interrupted := checkouts.interrupted(repo):
        with unused(folder):
            saved = checkouts.finish(repo, state, *interrupted)
        state = inspect_repository(repo, folder, wanted.series)
    base = wanted.commit if state.base == wanted.commit else _find_commit(repo, wanted.commit, state.url or str(folder))
    if state.is_exactly(base, wanted.patches):
        return SetupResult(state, changed=bool(interrupted), saved=saved)

    with unused(folder):
        return _bring_to(repo, folder, state, base, wanted, force, saved, progress)


def _bring_to(
    repo: git.Repo,
    folder: Path,
    state: CloneState,
    base: str,
    wanted: Wanted,
    force: bool,
    saved: tuple[str, ...],
    progress: Progress,
) -> SetupResult:
    """The part of an update that changes something, for who keeps trainings from beginning. Raises as `set_up` does."""
    if any(Path(repo.git_dir, name).exists() for name in _IN_THE_MIDDLE):
        raise CloneError(
            f"{folder} is in the middle of a git am, rebase, merge, cherry-pick or revert.",
            f"Finish or abort it: `git -C {folder} status`.",
        )
    if locks := [str(path) for place in ("*.lock", "refs/**/*.lock") for path in Path(repo.git_dir).glob(place)]:
        raise CloneError(  # git stash would fail without a word
            f"{folder} is locked: another git works in it, or one was killed and left {', '.join(locks)}.",
            f"If no other git runs: `{shlex.join(['rm', *locks])}`, then run ambersafe setup again.",
        )
    if not force:
        _refuse_to_lose(state, base)
    target = _build(repo, base, wanted.patches, progress)
    untracked = checkouts.in_the_way(repo, folder, target, changed_files(repo, "--diff-filter=A", "HEAD", target))
    untracked = [file for file in untracked if file not in state.edited]
    if untracked and not force:
        raise CloneError(
            f"{folder} has files where the series has others: {', '.join(untracked)}.",
            "Move them elsewhere, or use another --dir; --force renames them for you.",
        )
    saved += _save(repo, state, base)
    if state.is_ours and state.head != state.base:  # for runs that were started with it, see worktrees.py
        repo.git.branch("--force", f"{BRANCH}-{state.head[:12]}", state.head)
    saved += tuple(f"your file: {_move_aside(folder / file)}" for file in untracked)
    progress("checking out", 0.5)
    checkouts.check_out(repo, target, base)
    return SetupResult(inspect_repository(repo, folder, wanted.series), changed=True, saved=saved)


def _build(repo: git.Repo, base: str, patches: Sequence[Patch], progress: Progress) -> str:
    """Make the patched commit in a scratch clone, bring it into `repo`, and return its id."""
    progress("patching", 0.0)
    with tempfile.TemporaryDirectory() as scratch_folder:
        # Not GitPython's clone_from, which writes a path with a quote or a backslash in it down wrong.
        repo.git.clone("--quiet", "--shared", "--no-checkout", ".", scratch_folder)
        scratch = git.Repo(scratch_folder)
        with_own_settings(scratch).git.checkout("--quiet", "--detach", base)
        apply_patches(scratch, [patch.path for patch in patches])
        target = str(scratch.head.commit.hexsha)
        repo.git.fetch("--quiet", scratch_folder, "HEAD")
        scratch.close()
    return target


def _refuse_to_lose(state: CloneState, base: str) -> None:
    """Raise CloneError if checking out the series would take something of the user's out of sight."""
    folder = state.folder
    if state.edited:
        raise CloneError(
            f"{folder} has local edits: {', '.join(state.edited)}.",
            f"Commit or stash them (`git -C {folder} stash`), or use another --dir; --force stashes them for you.",
        )
    if state.base is None or not state.is_ours:
        beyond = f" with {', '.join(repr(s) for s in state.foreign)} on top" if state.foreign else ""
        raise CloneError(
            f"{folder} is at {state.head[:12]}{beyond}, which ambersafe did not make.",
            "Use another --dir; --force keeps that commit on a branch of its own and goes on.",
        )
    if state.base != base:
        raise CloneError(
            f"{folder} is set up at upstream's commit {state.base[:12]}, not at {base[:12]}.",
            f"`ambersafe setup --commit {state.base}` keeps it there, --force takes it to {base[:12]}.",
        )


def _save(repo: git.Repo, state: CloneState, base: str) -> tuple[str, ...]:
    """Put the user's edits into git's stash and keep their commits on a branch; say where."""
    edits: tuple[str, ...] = ()
    if state.edited:
        repo.git.stash("push", "--message", "saved by ambersafe setup --force")
        edits = (f"your edits: `git -C {state.folder} stash show -p`",)
    return edits + checkouts.keep_commits(repo, state.head, state.base or base)

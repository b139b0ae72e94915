"""The patched clone of upstream: what it is, and in which state it is; cloning.py makes and mends it.

A clone is upstream at a commit (its base) with one commit per patch on top, on the branch `ambersafe`. Those commits
are made by a fixed committer at the patch's own date, so that their ids are the same on every machine, and whether a
clone is patched, by what, and whether someone touched it are questions to git. Nothing here prints.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import git

from ambersafe_cli.display import without_secrets
from ambersafe_cli.errors import CloneError, PatchError
from ambersafe_cli.git_calls import (
    COMMITTER_EMAIL,
    git_errors,
    require_git,
    what_git_said,
    with_own_settings,
)
from ambersafe_cli.patches import Patch, normal_diff

UPSTREAM_URL = "https://github.com/eric-mitchell/direct-preference-optimization.git"
PINNED_COMMIT = "f8b8c0f49dc92a430bae41585f9d467d3618fe2f"
DEFAULT_FOLDER = "direct-preference-optimization"
BRANCH = "ambersafe"
BASE_REF = "refs/ambersafe/base"


@dataclass(frozen=True)
class PatchState:
    patch: Patch
    state: Literal["applied", "missing", "altered"]


@dataclass(frozen=True)
class CloneState:
    """What git says of a clone. `edited` are tracked files that differ from HEAD, `edits` the SHA-256 of how they do
    (None if none does); `foreign` the subjects of the commits
    on top of the base that are no patch of the series; `is_ours` is true if nothing there but patches that ambersafe
    applied; `base` is None if the clone does not hold the commit that the series starts from."""

    folder: Path
    url: str
    base: str | None
    head: str
    tree: str
    patches: tuple[PatchState, ...]
    foreign: tuple[str, ...]
    edited: tuple[str, ...]
    edits: str | None
    is_ours: bool

    @property
    def train_py(self) -> Path:
        return self.folder / "train.py"

    def has(self, patch: Patch) -> bool:
        """Whether the patch is in the clone, as it is in the series or altered."""
        return any(p.patch.name == patch.name and p.state != "missing" for p in self.patches)

    def is_exactly(self, base: str, patches: Sequence[Patch]) -> bool:
        """Whether the clone is `base` with just these patches, and nothing else was touched."""
        wanted = {patch.name for patch in patches}
        as_wanted = all(p.state == ("applied" if p.patch.name in wanted else "missing") for p in self.patches)
        return self.base == base and as_wanted and not self.foreign and not self.edited


def open_clone(folder: Path) -> git.Repo:
    """Open the repository in `folder`. Raises CloneError if there is none, or it is not upstream's."""
    require_git()
    if not folder.exists() or is_empty(folder):
        raise CloneError(f"There is no clone of upstream at {folder}.", "Make it with `ambersafe setup`.")
    foreign = CloneError(
        f"{folder} is not a clone of upstream, and not ambersafe's.",
        "Choose another folder with --dir; `ambersafe setup --force` would move this one aside.",
    )
    try:
        repo = with_own_settings(git.Repo(folder))
    except (git.InvalidGitRepositoryError, git.NoSuchPathError) as error:
        raise foreign from error
    with git_errors(f"Looking at {folder}"):
        repo.git.rev_parse("--git-dir")  # fails where git does not trust the folder, e.g. another user's, and says why
    if repo.bare or not has_commit(repo, "HEAD") or not holds(repo, "HEAD:train.py"):
        raise foreign
    return repo


def holds(repo: git.Repo, revision: str) -> bool:
    try:
        repo.git.rev_parse("--verify", "--quiet", revision)
    except git.GitCommandError:
        return False
    return True


def has_commit(repo: git.Repo, revision: str) -> bool:
    return holds(repo, f"{revision}^{{commit}}")


def is_ancestor(repo: git.Repo, ancestor: str, descendant: str) -> bool:
    try:
        repo.git.merge_base("--is-ancestor", ancestor, descendant)
    except git.GitCommandError:
        return False
    return True


def inspect(folder: Path, series: Sequence[Patch]) -> CloneState:
    """Say in which state the clone in `folder` is. Raises CloneError where there is none, GitError."""
    repo = open_clone(folder)
    with git_errors(f"Looking at {folder}"):
        return inspect_repository(repo, folder, series)


def inspect_repository(repo: git.Repo, folder: Path, series: Sequence[Patch]) -> CloneState:
    head, tree = repo.git.rev_parse("HEAD", "HEAD^{tree}").split()
    known = [c for c in (BASE_REF, PINNED_COMMIT) if has_commit(repo, c) and is_ancestor(repo, c, head)]
    base = repo.git.rev_parse(known[0]) if known else None
    log = repo.git.log("--reverse", "--format=%H%x09%ce%x09%s", f"{base}..{head}") if base else ""
    commits = [line.split("\t", 2) for line in log.split("\n") if line]

    id_of = {subject: commit for commit, _, subject in commits}
    states = []
    for patch in series:
        state: Literal["applied", "missing", "altered"] = "missing"
        if commit := id_of.get(patch.subject):
            # Not `git show`: how that writes a diff is the user's to configure.
            same = (
                commit == patch.commit
                or normal_diff(repo.git.diff_tree("-p", "-M", "--no-ext-diff", "--no-textconv", commit)) == patch.diff
            )
            state = "applied" if same else "altered"
        states.append(PatchState(patch, state))

    subjects = {patch.subject for patch in series}
    return CloneState(
        folder=folder,
        url=without_secrets(repo.git.config("--default", "", "--get", "remote.origin.url")),
        base=base,
        head=head,
        tree=tree,
        patches=tuple(states),
        foreign=tuple(subject for _, _, subject in commits if subject not in subjects),
        edited=(edited := edited_files(repo)),
        edits=_fingerprint_of_edits(repo) if edited else None,
        is_ours=base is not None and all(email == COMMITTER_EMAIL for _, email, _ in commits),
    )


def apply_patches(repo: git.Repo, patches: Sequence[Path]) -> list[str]:
    """Apply patch files on top of HEAD with `git am` and return the ids of the commits that this makes.

    Raises PatchError naming the patch and the first hunk that does not apply; HEAD is then as it was before that patch.
    """
    ids = []
    with tempfile.TemporaryDirectory() as no_home:  # of the user's own configuration nothing counts here
        home = {"HOME": no_home, "XDG_CONFIG_HOME": no_home, "GIT_CONFIG_GLOBAL": os.devnull}
        with with_own_settings(repo).git.custom_environment(**home, GIT_CONFIG_NOSYSTEM="1"):
            for patch in patches:
                try:
                    repo.git.am("--committer-date-is-author-date", "--no-gpg-sign", "--keep-non-patch", str(patch))
                except git.GitCommandError as error:
                    said = what_git_said(error)
                    with contextlib.suppress(git.GitCommandError):
                        repo.git.am("--abort")
                    raise PatchError(
                        f"{patch.name} does not apply to {repo.head.commit.hexsha[:12]}: {_failed_hunk(patch, said)}",
                        "The series is made for the pinned commit: leave --commit away, or try --minimal.",
                    ) from error
                ids.append(repo.head.commit.hexsha)
    return ids


def _failed_hunk(patch: Path, said: str) -> str:
    """Name the first place that git could not patch, and show that hunk of the patch."""
    place = re.search(r"patch failed: (.+):(\d+)", said)
    if not place:
        return said
    file, line = place[1], place[2]
    diff = patch.read_text(encoding="utf-8").partition(f"\n+++ b/{file}\n")[2].partition("\ndiff --git ")[0]
    hunk = re.search(rf"^@@ -{line}\b.*(?:\n(?!@@).*)*", diff, flags=re.MULTILINE)
    return f"{file}, line {line}\n{hunk[0] if hunk else said}"


@contextlib.contextmanager
def in_use(folder: Path, recorded: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Keep setup from changing the clone in `folder` as long as a training runs from it.

    Raises CloneError if a setup changed it just before: it has another head, or other edits, than were recorded.
    """
    handle = os.open(folder / ".git", os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)
        if recorded:
            state = inspect(folder, ())
            if (state.head, state.edits) != (recorded["head"], recorded["edits"]):
                raise CloneError(f"{folder} was changed since this command looked at it.", "Give the command again.")
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def unused(folder: Path) -> Iterator[None]:
    """Keep trainings from beginning in a clone as long as it is changed. Raises CloneError if one runs from it."""
    try:
        handle = os.open(folder / ".git", os.O_RDONLY)
    except FileNotFoundError:  # half made
        yield
        return
    try:
        with contextlib.suppress(OSError):  # not every network file system has locks
            _lock_alone(handle, folder)
        yield
    finally:
        os.close(handle)


def _lock_alone(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CloneError(
            f"A training runs from {folder}: its files must stay as they are.", "Wait for it, or use another --dir."
        ) from error


def is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def edited_files(repo: git.Repo) -> tuple[str, ...]:
    """The tracked files that differ from HEAD, in the index or on disk."""
    return tuple(dict.fromkeys(changed_files(repo, "HEAD") + changed_files(repo, "--cached", "HEAD")))


def changed_files(repo: git.Repo, *between: str) -> list[str]:
    return str(repo.git.diff("--name-only", "--no-renames", "--ignore-submodules=all", "-z", *between)).split("\0")[:-1]


def _fingerprint_of_edits(repo: git.Repo) -> str:
    # Not `git diff`: how that writes one is the user's to configure.
    how = ("-p", "--binary", "--no-ext-diff", "--no-textconv", "--ignore-submodules=all")
    changes = repo.git.diff_index(*how, "HEAD", stdout_as_string=False)
    return hashlib.sha256(changes).hexdigest()

"""Checking a commit out in a clone that is there, so that a kill in the middle loses nothing and can be finished.

A marker in the clone says which commit is being checked out; what only the user has is kept on a branch.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import git

from ambersafe_cli import files
from ambersafe_cli.errors import CloneError
from ambersafe_cli.git_calls import COMMITTER_EMAIL
from ambersafe_cli.upstream import (
    BASE_REF,
    BRANCH,
    CloneState,
    changed_files,
    has_commit,
    holds,
    is_ancestor,
)


def _marker(repo: git.Repo) -> Path:
    """The file that says, while files are being checked out, which commit and which base that is for."""
    return Path(repo.git_dir, "ambersafe-checkout")


def check_out(repo: git.Repo, target: str, base: str) -> None:
    """Bring the branch and the files to the commit `target`, and note that it is made of upstream's commit `base`."""
    marker = _marker(repo)
    temporary = marker.with_suffix(".new")
    with os.fdopen(files.create(temporary), "w") as file:
        file.write(f"{target} {base}")
    temporary.replace(marker)
    # --force: over what a killed checkout left. What a user has edited was refused or saved before.
    repo.git.checkout("--quiet", "--force", "-B", BRANCH, target)
    repo.git.update_ref(BASE_REF, base)
    marker.unlink()


def interrupted(repo: git.Repo) -> tuple[str, str] | None:
    """The commit and the base that the marker names; None without one, and for one that is damaged: it is no help."""
    if not _marker(repo).exists():
        return None
    found = re.fullmatch(r"([0-9a-f]{40}) ([0-9a-f]{40})", _marker(repo).read_text(errors="replace"))
    if not found or not all(has_commit(repo, commit) for commit in found.groups()):
        _marker(repo).unlink()
        return None
    return found[1], found[2]


def finish(repo: git.Repo, state: CloneState, target: str, base: str) -> tuple[str, ...]:
    """Bring a checkout to its end that was killed, and say where it kept commits that the user has made since.

    Raises CloneError if the user has edited files since.
    """
    for lock in ("index.lock", "HEAD.lock", f"refs/heads/{BRANCH}.lock", f"{BASE_REF}.lock"):
        Path(repo.git_dir, lock).unlink(missing_ok=True)
    files = (*state.edited, *changed_files(repo, "--diff-filter=A", "HEAD", target))
    if edited := in_the_way(repo, state.folder, target, files):
        raise CloneError(
            f"{state.folder} was left half set up, and has local edits since: {', '.join(edited)}.",
            f"Put them elsewhere, undo them (`git -C {state.folder} checkout FILE`), and run ambersafe setup again.",
        )
    saved = keep_commits(repo, state.head, state.base or base)
    check_out(repo, target, base)
    return saved


def in_the_way(repo: git.Repo, folder: Path, target: str, files: Sequence[str]) -> list[str]:
    """Those of the files that would lose something if the commit `target` were checked out over them."""
    return [file for file in dict.fromkeys(files) if not is_half_written(repo, folder / file, f"{target}:{file}")]


def is_half_written(repo: git.Repo, path: Path, blob: str) -> bool:
    """Whether the file is what a killed checkout leaves: nothing, or the beginning of what it was to write."""
    if not path.exists():
        return True
    if not path.is_file() or not holds(repo, blob):
        return False
    wanted = repo.git.show(blob, strip_newline_in_stdout=False, stdout_as_string=False)
    return bool(wanted.startswith(path.read_bytes()))


def keep_commits(repo: git.Repo, head: str, base: str) -> tuple[str, ...]:
    """Put a branch on what the user has committed on top of `base`, at HEAD or on our branch, and say where."""
    kept = []
    tips = [head] + ([repo.heads[BRANCH].commit.hexsha] if BRANCH in [h.name for h in repo.heads] else [])
    for tip in dict.fromkeys(tips):
        if set(repo.git.log("--format=%ce", f"{base}..{tip}").split()) - {COMMITTER_EMAIL}:
            branch = f"ambersafe-saved-{tip[:12]}"
            if not is_ancestor(repo, tip, f"refs/heads/{branch}"):  # else it is kept already
                repo.git.branch("--force", branch, tip)
            kept.append(f"commit {tip[:12]}: the branch {branch}")
    return tuple(kept)

"""The series that an older run was started with, beside a clone that has moved on since.

`ambersafe setup` keeps each series that it replaces as a branch `ambersafe-<commit>`; here such a commit gets a
worktree of the clone, in a folder next to it, when a run that was started with it goes on or is done again.
"""

import os
import shutil
from pathlib import Path

import git

from ambersafe_cli import display
from ambersafe_cli.checkouts import is_half_written
from ambersafe_cli.cloning import alone
from ambersafe_cli.errors import CloneError
from ambersafe_cli.git_calls import git_errors, with_own_settings
from ambersafe_cli.upstream import edited_files, has_commit, open_clone, unused


def folder_at(clone: Path, commit: str) -> Path:
    """A folder that holds upstream at `commit`: the clone, if it is there and not edited, or a worktree of it.

    Raises CloneError if the clone does not hold the commit, or its worktree was edited; GitError.
    """
    repo = open_clone(clone)
    with git_errors(f"Looking for {commit[:12]} in {clone}"):
        if repo.head.commit.hexsha == commit and not edited_files(repo):
            return clone
        if not has_commit(repo, commit):
            raise CloneError(
                f"{clone} does not hold {commit[:12]}, with which the run was started.",
                f"Fetch it from a clone that does: `git -C {clone} fetch OTHER_CLONE {commit}`.",
            )
        folder = clone.with_name(f"{clone.name}.worktrees") / commit[:12]
        for place in (folder.parent, folder):
            if place.is_symlink():
                raise CloneError(f"{place} is a link.", "Delete it: what it led to is made there as it is needed.")
        with alone(clone.parent, display.say):
            if not _is_whole(folder, commit):
                _remove_half_made(repo, folder, commit)
                repo.git.worktree("prune")
                repo.git.worktree("add", "--quiet", "--detach", "--force", str(folder), commit)
        return folder


def _is_whole(folder: Path, commit: str) -> bool:
    """Raises CloneError for another user's."""
    if folder.exists() and folder.stat().st_uid != os.getuid():
        raise CloneError(
            f"{folder}, where upstream at {commit[:12]} would be, is another user's.",
            "Make a clone of your own: `ambersafe setup` in another folder, and --dir.",
        )
    try:
        repo = with_own_settings(git.Repo(folder))
        return repo.head.commit.hexsha == commit and not edited_files(repo)
    except (git.GitError, ValueError, OSError):
        return False


def _remove_half_made(repo: git.Repo, folder: Path, commit: str) -> None:
    """Remove what is left of making a worktree that was killed. Raises CloneError if there is anything else."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    own = [
        path
        for path in files
        if path != folder / ".git" and not is_half_written(repo, path, f"{commit}:{path.relative_to(folder)}")
    ]
    if own:
        raise CloneError(
            f"The worktree of {commit[:12]}, for older runs, was edited: {', '.join(map(str, own))}.",
            "Undo that, or move the folder elsewhere: it is made again.",
        )
    if folder.exists():
        with unused(folder):
            shutil.rmtree(folder)

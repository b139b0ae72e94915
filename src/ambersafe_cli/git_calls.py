"""How git is run: with our settings, and with nothing that a repository, which may be another's, names as a program."""

import contextlib
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # or importing GitPython fails where there is no git
import git

from ambersafe_cli.display import without_secrets
from ambersafe_cli.errors import AmberSafeError, CloneError, GitError

COMMITTER_NAME = "ambersafe-cli"
COMMITTER_EMAIL = "ambersafe-cli@users.noreply.github.com"

# A user's hooks, signing and whitespace settings would stop `git am`, or change the ids that it makes.
_OWN_SETTINGS = (
    "core.hooksPath=/dev/null",
    "core.autocrlf=false",
    "core.fsmonitor=false",
    "protocol.ext.allow=never",
    "commit.gpgSign=false",
    "apply.whitespace=nowarn",
    "am.threeWay=false",
    "mailinfo.scissors=false",
    "i18n.commitEncoding=UTF-8",
    "i18n.logOutputEncoding=UTF-8",
    "log.showSignature=false",
)
# No prompt may wait, and a network that only drops packets is given up.
NETWORK_ENVIRONMENT = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_SSH_COMMAND": os.environ.get("GIT_SSH_COMMAND", "ssh -o BatchMode=yes -o ConnectTimeout=30"),
    "GIT_HTTP_LOW_SPEED_LIMIT": "1000",
    "GIT_HTTP_LOW_SPEED_TIME": "60",
}


def require_git() -> None:
    """Raise GitError unless there is a git, and forget what a git hook that runs us says about its own repository."""
    if shutil.which("git") is None:
        raise GitError("git is not installed, or not on PATH.", "Install git, e.g. `apt install git`.")
    for variable in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        os.environ.pop(variable, None)


@contextlib.contextmanager
def git_errors(doing: str, hint: str = "") -> Iterator[None]:
    """Turn a failed git command into a GitError that shows what git itself said."""
    require_git()
    try:
        yield
    except git.GitCommandError as error:
        raise GitError(f"{doing} failed: {what_git_said(error)}", hint) from error


def look(folder: Path, timeout: float, command: str, *words: str) -> bytes | None:
    """What a git command that only reads says of the repository that a folder lies in; None if it lies in none, or git
    cannot or may not say within `timeout` seconds."""
    try:
        require_git()
        repo = with_own_settings(git.Repo(folder, search_parent_directories=True))
        repo.git.update_environment(GIT_OPTIONAL_LOCKS="0")
        found: bytes = getattr(repo.git, command)(*words, stdout_as_string=False, kill_after_timeout=timeout)
    except (OSError, ValueError, git.GitError, AmberSafeError):
        return None
    return found


def what_git_said(error: git.GitError) -> str:
    """What git printed, without GitPython's frame."""
    text = (getattr(error, "stderr", "") or getattr(error, "stdout", "") or str(error)).strip()
    return without_secrets(re.sub(r"^std(err|out): '|'$", "", text).strip())


# Nothing in the place of an object, and none fetched because it is missing.
_AS_IT_IS = {"GIT_NO_REPLACE_OBJECTS": "1", "GIT_NO_LAZY_FETCH": "1"}
# Keys of a repository's own settings by which git starts a program, and what they are set to for our calls.
_PROGRAMS = (
    (r"filter\..+\.(clean|smudge|process)", ""),
    (r"filter\..+\.required", "false"),
    (r"diff\.external|diff\..+\.(command|textconv)", ""),
    (r"merge\..+\.driver", "false"),
    (r"core\.(gitproxy|askpass)", ""),
    (r"core\.(editor|pager)|sequence\.editor", "true"),
    (r"core\.alternaterefscommand", "true"),
    (r"remote\..+\.promisor", "false"),
    (r"credential\.(.+\.)?helper", ""),
    (r"submodule\.recurse", "false"),
)
# An included file may hold for another folder's git alone, or be a pipe; newer versions of git have hooks here too.
_REFUSED = re.compile(r"core\.worktree|remote\..+\.vcs|include(if\..+)?\.path|hook\..+", re.DOTALL)


def _without_programs(repo: git.Repo) -> Iterator[str]:
    """Settings over those of the repository itself that name a program, or another folder to write to.

    Raises CloneError for one that cannot be set over.
    """
    said = iter(repo.git.config("--no-includes", "--show-scope", "--name-only", "--list", "-z").split("\0"))
    for name in dict.fromkeys(name for scope, name in zip(said, said, strict=False) if scope in ("local", "worktree")):
        is_program = any(re.fullmatch(pattern, name, re.IGNORECASE | re.DOTALL) for pattern, _ in _PROGRAMS)
        # `git -c` takes what is before the first = for the name.
        if _REFUSED.fullmatch(name.lower()) or (is_program and "=" in name):
            raise CloneError(
                f"{repo.working_dir} sets {name} for itself, which decides what git starts, reads or writes.",
                f"If it is your own: `git -C {repo.working_dir} config --unset-all {shlex.quote(name)}`.",
            )
        for pattern, value in _PROGRAMS:
            if re.fullmatch(pattern, name, re.IGNORECASE | re.DOTALL):
                yield f"{name}={value}"


def with_own_settings(repo: git.Repo) -> git.Repo:
    """Make every further command of `repo` run with our settings and committer. Raises CloneError, GitCommandError."""
    repo.git.update_environment(**_AS_IT_IS)
    repo.git.set_persistent_git_options(c=[*_OWN_SETTINGS, *_without_programs(repo)])
    author = {"GIT_AUTHOR_NAME": COMMITTER_NAME, "GIT_AUTHOR_EMAIL": COMMITTER_EMAIL}
    committer = {"GIT_COMMITTER_NAME": COMMITTER_NAME, "GIT_COMMITTER_EMAIL": COMMITTER_EMAIL}
    repo.git.update_environment(**author, **committer, **NETWORK_ENVIRONMENT)
    return repo

"""The patched clone of upstream: making it, mending it, and saying in which state it is.

A clone is upstream at a commit (its base) with one commit per patch on top, on the branch `ambersafe`. Those commits
are made by a fixed committer at the patch's own date, so that their ids are the same on every machine, and whether a
clone is patched, by what, and whether someone touched it are questions to git. Nothing here prints.
"""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # or importing GitPython fails where there is no git
import git
from git.util import CallableRemoteProgress

from ambersafe_cli.errors import CloneError, GitError, PatchError, SourceError
from ambersafe_cli.patches import Patch, normal_diff

UPSTREAM_URL = "https://github.com/eric-mitchell/direct-preference-optimization.git"
PINNED_COMMIT = "f8b8c0f49dc92a430bae41585f9d467d3618fe2f"
DEFAULT_FOLDER = "direct-preference-optimization"
BRANCH = "ambersafe"
BASE_REF = "refs/ambersafe/base"
COMMITTER_NAME = "ambersafe-cli"
COMMITTER_EMAIL = "ambersafe-cli@users.noreply.github.com"

# A user's hooks, signing and whitespace settings would stop `git am`, or change the ids that it makes.
_OWN_SETTINGS = (
    "core.hooksPath=/dev/null",
    "core.autocrlf=false",
    "core.fsmonitor=false",
    "commit.gpgSign=false",
    "apply.whitespace=nowarn",
    "am.threeWay=false",
    "mailinfo.scissors=false",
    "i18n.commitEncoding=UTF-8",
    "i18n.logOutputEncoding=UTF-8",
    "log.showSignature=false",
)
# What git leaves in its folder while the user is in the middle of something.
_IN_THE_MIDDLE = ("rebase-apply", "rebase-merge", "MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD")
# No prompt may wait, and a network that only drops packets is given up.
_NETWORK_ENVIRONMENT = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_SSH_COMMAND": os.environ.get("GIT_SSH_COMMAND", "ssh -o BatchMode=yes -o ConnectTimeout=30"),
    "GIT_HTTP_LOW_SPEED_LIMIT": "1000",
    "GIT_HTTP_LOW_SPEED_TIME": "60",
}

Progress = Callable[[str, float], None]
"""Told of a step of the work: its name, and how much of it is done, from 0 to 1."""


@dataclass(frozen=True)
class PatchState:
    patch: Patch
    state: Literal["applied", "missing", "altered"]


@dataclass(frozen=True)
class CloneState:
    """What git says of a clone. `edited` are tracked files that differ from HEAD; `foreign` the subjects of the commits
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


def _require_git() -> None:
    """Raise GitError unless there is a git, and forget what a git hook that runs us says about its own repository."""
    if shutil.which("git") is None:
        raise GitError("git is not installed, or not on PATH.", "Install git, e.g. `apt install git`.")
    for variable in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        os.environ.pop(variable, None)


@contextlib.contextmanager
def _git_errors(doing: str, hint: str = "") -> Iterator[None]:
    """Turn a failed git command into a GitError that shows what git itself said."""
    _require_git()
    try:
        yield
    except git.GitCommandError as error:
        raise GitError(f"{doing} failed: {_said(error)}", hint) from error


def without_secrets(text: str) -> str:
    """Take the user name and password out of every URL."""
    return re.sub(r"(\w://)[^/\s]+@", r"\1", text)


def _said(error: git.GitError) -> str:
    """What git printed, without GitPython's frame."""
    text = (getattr(error, "stderr", "") or getattr(error, "stdout", "") or str(error)).strip()
    return without_secrets(re.sub(r"^std(err|out): '|'$", "", text).strip())


def _own(repo: git.Repo) -> git.Repo:
    """Make every further command of `repo` run with our settings and committer."""
    repo.git.set_persistent_git_options(c=list(_OWN_SETTINGS))
    author = {"GIT_AUTHOR_NAME": COMMITTER_NAME, "GIT_AUTHOR_EMAIL": COMMITTER_EMAIL}
    committer = {"GIT_COMMITTER_NAME": COMMITTER_NAME, "GIT_COMMITTER_EMAIL": COMMITTER_EMAIL}
    repo.git.update_environment(**author, **committer, **_NETWORK_ENVIRONMENT)
    return repo


def open_clone(folder: Path) -> git.Repo:
    """Open the repository in `folder`. Raises CloneError if there is none, or it is not upstream's."""
    _require_git()
    if not folder.exists() or _is_empty(folder):
        raise CloneError(f"There is no clone of upstream at {folder}.", "Make it with `ambersafe setup`.")
    foreign = CloneError(
        f"{folder} is not a clone of upstream, and not ambersafe's.",
        "Choose another folder with --dir; `ambersafe setup --force` would move this one aside.",
    )
    try:
        repo = _own(git.Repo(folder))
    except (git.InvalidGitRepositoryError, git.NoSuchPathError) as error:
        raise foreign from error
    with _git_errors(f"Looking at {folder}"):
        repo.git.rev_parse("--git-dir")  # fails where git does not trust the folder, e.g. another user's, and says why
    if repo.bare or not _has_commit(repo, "HEAD") or not _holds(repo, "HEAD:train.py"):
        raise foreign
    return repo


def _holds(repo: git.Repo, revision: str) -> bool:
    try:
        repo.git.rev_parse("--verify", "--quiet", revision)
    except git.GitCommandError:
        return False
    return True


def _has_commit(repo: git.Repo, revision: str) -> bool:
    return _holds(repo, f"{revision}^{{commit}}")


def _is_ancestor(repo: git.Repo, ancestor: str, descendant: str) -> bool:
    try:
        repo.git.merge_base("--is-ancestor", ancestor, descendant)
    except git.GitCommandError:
        return False
    return True


def inspect(folder: Path, series: Sequence[Patch]) -> CloneState:
    """Say in which state the clone in `folder` is. Raises CloneError where there is none, GitError."""
    repo = open_clone(folder)
    with _git_errors(f"Looking at {folder}"):
        return _inspect(repo, folder, series)


def _inspect(repo: git.Repo, folder: Path, series: Sequence[Patch]) -> CloneState:
    head, tree = repo.git.rev_parse("HEAD", "HEAD^{tree}").split()
    known = [c for c in (BASE_REF, PINNED_COMMIT) if _has_commit(repo, c) and _is_ancestor(repo, c, head)]
    base = repo.git.rev_parse(known[0]) if known else None
    log = repo.git.log("--reverse", "--format=%H%x09%ce%x09%s", f"{base}..{head}") if base else ""
    commits = [line.split("\t", 2) for line in log.split("\n") if line]

    id_of = {subject: commit for commit, _, subject in commits}
    states = []
    for patch in series:
        state: Literal["applied", "missing", "altered"] = "missing"
        if commit := id_of.get(patch.subject):
            # Not `git show`: how that writes a diff is the user's to configure.
            same = commit == patch.commit or normal_diff(repo.git.diff_tree("-p", "-M", commit)) == patch.diff
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
        edited=_edited(repo),
        is_ours=base is not None and all(email == COMMITTER_EMAIL for _, email, _ in commits),
    )


def apply_patches(repo: git.Repo, patches: Sequence[Path]) -> list[str]:
    """Apply patch files on top of HEAD with `git am` and return the ids of the commits that this makes.

    Raises PatchError naming the patch and the first hunk that does not apply; HEAD is then as it was before that patch.
    """
    ids = []
    with tempfile.TemporaryDirectory() as no_home:  # of the user's own configuration nothing counts here
        home = {"HOME": no_home, "XDG_CONFIG_HOME": no_home, "GIT_CONFIG_GLOBAL": os.devnull}
        with _own(repo).git.custom_environment(**home, GIT_CONFIG_NOSYSTEM="1"):
            for patch in patches:
                try:
                    repo.git.am("--committer-date-is-author-date", "--no-gpg-sign", "--keep-non-patch", str(patch))
                except git.GitCommandError as error:
                    said = _said(error)
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
def _alone(parent: Path) -> Iterator[None]:
    """Let one setup at a time work in `parent`; a second one waits. The lock goes with the process, however it ends."""
    handle = os.open(parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every network file system has locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep setup from changing the clone in `folder` as long as a training runs from it."""
    handle = os.open(folder / ".git", os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def _require_unused(repo: git.Repo, folder: Path) -> None:
    """Raise CloneError if a training runs from the clone."""
    handle = os.open(repo.git_dir, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CloneError(
            f"A training runs from {folder}: its files must stay as they are.", "Wait for it, or use another --dir."
        ) from error
    except OSError:
        return
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
        with _alone(folder.parent), _git_errors(f"Setting up {folder}"):
            if folder.exists() and not _is_empty(folder):
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


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


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
                env=_NETWORK_ENVIRONMENT,
                no_checkout=True,
                origin="origin",  # whatever clone.defaultRemoteName says
            )
        except (git.GitCommandError, git.UnsafeProtocolError) as error:
            # Of a command with progress GitPython keeps what git said to itself.
            said = [line for line in watch.error_lines + watch.other_lines if not line.startswith("Cloning into ")]
            why = without_secrets("\n".join(said).strip()) or _said(error)
            raise SourceError(
                f"Cannot clone {without_secrets(wanted.url)}: {why}",
                "Is there a network? --repo takes a mirror, or the path of a clone that was made elsewhere.",
            ) from error
        _own(repo)
        base = _find_commit(repo, wanted.commit, wanted.url)
        repo.git.checkout("--quiet", "-B", BRANCH, base)
        repo.git.update_ref(BASE_REF, base)
        progress("patching", 0.0)
        apply_patches(repo, [patch.path for patch in wanted.patches])
        repo.close()
        saved: tuple[str, ...] = ()
        if folder.exists() and not _is_empty(folder):
            saved = (f"the folder that was there: {_move_aside(folder)}",)
        partial.rename(folder)
        return saved
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _find_commit(repo: git.Repo, commit: str, url: str) -> str:
    """Return the full id of a commit, branch or tag; ask the remote for it if it is not here. Raises SourceError."""
    is_a_name = re.fullmatch(r"[^-+^:][^:]*", commit)  # or git would take it for an option or a refspec
    for fetch in (None, ["origin"], ["origin", commit]) if is_a_name else ():
        if fetch:
            with contextlib.suppress(git.GitCommandError):
                repo.git.fetch("--quiet", *fetch)
        for name in (f"origin/{commit}", commit):
            if _has_commit(repo, name):
                return str(repo.git.rev_parse(f"{name}^{{commit}}"))
    url = without_secrets(url)
    raise SourceError(f"{url} has no commit {commit}.", f"Leave --commit away to take {PINNED_COMMIT[:12]}.")


def _update(repo: git.Repo, folder: Path, wanted: Wanted, force: bool, progress: Progress) -> SetupResult:
    state = _inspect(repo, folder, wanted.series)
    saved: tuple[str, ...] = ()
    if was_interrupted := _marker(repo).exists():
        saved = _finish_checkout(repo, state)
        state = _inspect(repo, folder, wanted.series)
    base = wanted.commit if state.base == wanted.commit else _find_commit(repo, wanted.commit, state.url or str(folder))
    if state.is_exactly(base, wanted.patches):
        return SetupResult(state, changed=was_interrupted, saved=saved)

    _require_unused(repo, folder)
    if any(Path(repo.git_dir, name).exists() for name in _IN_THE_MIDDLE):
        raise CloneError(
            f"{folder} is in the middle of a git am, rebase, merge, cherry-pick or revert.",
            f"Finish or abort it: `git -C {folder} status`.",
        )
    if not force:
        _refuse_to_lose(state, base)
    target = _build(repo, base, wanted.patches, progress)
    untracked = _in_the_way(repo, folder, target, _changed(repo, "--diff-filter=A", "HEAD", target))
    untracked = [file for file in untracked if file not in state.edited]
    if untracked and not force:
        raise CloneError(
            f"{folder} has files where the series has others: {', '.join(untracked)}.",
            "Move them elsewhere, or use another --dir; --force renames them for you.",
        )
    saved += _save(repo, state, base)
    saved += tuple(f"your file: {_move_aside(folder / file)}" for file in untracked)
    progress("checking out", 0.5)
    _check_out(repo, target, base)
    return SetupResult(_inspect(repo, folder, wanted.series), changed=True, saved=saved)


def _build(repo: git.Repo, base: str, patches: Sequence[Patch], progress: Progress) -> str:
    """Make the patched commit in a scratch clone, bring it into `repo`, and return its id."""
    progress("patching", 0.0)
    with tempfile.TemporaryDirectory() as scratch_folder:
        # Not GitPython's clone_from, which writes a path with a quote or a backslash in it down wrong.
        repo.git.clone("--quiet", "--shared", "--no-checkout", ".", scratch_folder)
        scratch = git.Repo(scratch_folder)
        _own(scratch).git.checkout("--quiet", "--detach", base)
        apply_patches(scratch, [patch.path for patch in patches])
        target = str(scratch.head.commit.hexsha)
        repo.git.fetch("--quiet", scratch_folder, "HEAD")
        scratch.close()
    return target


def _marker(repo: git.Repo) -> Path:
    """The file that says, while files are being checked out, which commit and which base that is for."""
    return Path(repo.git_dir, "ambersafe-checkout")


def _check_out(repo: git.Repo, target: str, base: str) -> None:
    marker = _marker(repo)
    temporary = marker.with_suffix(".new")
    temporary.write_text(f"{target} {base}")
    temporary.replace(marker)
    # --force: over what a killed checkout left. What a user has edited was refused or saved before.
    repo.git.checkout("--quiet", "--force", "-B", BRANCH, target)
    repo.git.update_ref(BASE_REF, base)
    marker.unlink()


def _finish_checkout(repo: git.Repo, state: CloneState) -> tuple[str, ...]:
    """Bring a checkout to its end that was killed, and say where it kept commits that the user has made since.

    Raises CloneError if the user has edited files since.
    """
    target, base = _marker(repo).read_text().split()
    for lock in ("index.lock", "HEAD.lock", f"refs/heads/{BRANCH}.lock", f"{BASE_REF}.lock"):
        Path(repo.git_dir, lock).unlink(missing_ok=True)
    files = (*state.edited, *_changed(repo, "--diff-filter=A", "HEAD", target))
    if edited := _in_the_way(repo, state.folder, target, files):
        raise CloneError(
            f"{state.folder} was left half set up, and has local edits since: {', '.join(edited)}.",
            f"Put them elsewhere, undo them (`git -C {state.folder} checkout FILE`), and run ambersafe setup again.",
        )
    saved = _keep_commits(repo, state.head, state.base or base)
    _check_out(repo, target, base)
    return saved


def _in_the_way(repo: git.Repo, folder: Path, target: str, files: Sequence[str]) -> list[str]:
    """Those of the files that would lose something if the commit `target` were checked out over them."""
    return [file for file in dict.fromkeys(files) if not _is_half_written(repo, folder / file, f"{target}:{file}")]


def _is_half_written(repo: git.Repo, path: Path, blob: str) -> bool:
    """Whether the file is what a killed checkout leaves: nothing, or the beginning of what it was to write."""
    if not path.exists():
        return True
    if not path.is_file() or not _holds(repo, blob):
        return False
    wanted = repo.git.show(blob, strip_newline_in_stdout=False, stdout_as_string=False)
    return bool(wanted.startswith(path.read_bytes()))


def _edited(repo: git.Repo) -> tuple[str, ...]:
    """The tracked files that differ from HEAD, in the index or on disk."""
    return tuple(dict.fromkeys(_changed(repo, "HEAD") + _changed(repo, "--cached", "HEAD")))


def _changed(repo: git.Repo, *between: str) -> list[str]:
    return str(repo.git.diff("--name-only", "--no-renames", "-z", *between)).split("\0")[:-1]


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
    return edits + _keep_commits(repo, state.head, state.base or base)


def _keep_commits(repo: git.Repo, head: str, base: str) -> tuple[str, ...]:
    kept = []
    tips = [head] + ([repo.heads[BRANCH].commit.hexsha] if BRANCH in [h.name for h in repo.heads] else [])
    for tip in dict.fromkeys(tips):
        if set(repo.git.log("--format=%ce", f"{base}..{tip}").split()) - {COMMITTER_EMAIL}:
            branch = f"ambersafe-saved-{tip[:12]}"
            if not _is_ancestor(repo, tip, f"refs/heads/{branch}"):  # else it is kept already
                repo.git.branch("--force", branch, tip)
            kept.append(f"commit {tip[:12]}: the branch {branch}")
    return tuple(kept)

"""Whether a clone holds what the series makes, byte for byte: by the objects' own hashes, not by what git says of them.

A repository can be told not to look (assume-unchanged, replaced objects, an index of its own), and Python imports what
no commit holds: a module beside train.py, or a compiled one in `__pycache__`.
"""

import hashlib
import importlib.machinery
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from ambersafe_cli import files
from ambersafe_cli.errors import CloneError
from ambersafe_cli.git_calls import git_errors
from ambersafe_cli.patches import Patch, known
from ambersafe_cli.upstream import open_clone

_MODULES = tuple(importlib.machinery.all_suffixes())
_INSTALLED = (".dist-info", ".egg-info", ".egg", ".egg-link")
_CACHE = "__pycache__"
_MEND = "--allow-modified runs it as it is: only if you know whose it is."


def require_untouched(folder: Path, commit: str, series: Sequence[Patch]) -> None:
    """Raise CloneError unless a folder holds the commit of a patch of our series, or of an earlier one, and nothing
    besides that Python would import. What Python has compiled there is deleted: it is made again."""
    require_known(folder, commit, series)
    wanted = dict(_files(folder, commit))
    if wrong := [name for name, (mode, blob) in wanted.items() if not _is_there(folder / name, mode, blob)]:
        raise CloneError(f"{folder} is not {commit[:12]} as the series makes it: {', '.join(sorted(wrong))}.", _MEND)
    folders = {folder, *((folder / name).parent for name in wanted)}
    for place in sorted(folders):
        _delete_compiled(place)
    if more := sorted(_importable(folder, wanted)):
        raise CloneError(f"{folder} holds what train.py could import and no commit has: {', '.join(more)}.", _MEND)


def require_known(folder: Path, commit: str, series: Sequence[Patch]) -> None:
    """Raise CloneError unless a commit is that of a patch of our series, or of an earlier one."""
    if commit not in known(series):
        raise CloneError(f"{folder}: no patch of this ambersafe makes {commit[:12]}.", _MEND)


def _files(folder: Path, commit: str) -> Iterator[tuple[str, tuple[int, str]]]:
    """The files of a commit: each path with its mode and the id of its content. Raises CloneError, GitError."""
    repo = open_clone(folder)

    def read(kind: str, name: str) -> bytes:
        found: bytes = repo.git.cat_file(kind, name, stdout_as_string=False, strip_newline_in_stdout=False)
        if _id_of(kind, found) != name:
            raise CloneError(
                f"{folder} has another {kind} in place of {name[:12]}.", "Make it anew: `ambersafe setup`."
            )
        return found

    def walk(tree: str, prefix: str) -> Iterator[tuple[str, tuple[int, str]]]:
        data = read("tree", tree)
        while data:
            head, _, rest = data.partition(b"\0")
            mode, _, name = head.partition(b" ")
            path, found, data = prefix + os.fsdecode(name), rest[:20].hex(), rest[20:]
            if stat.S_ISDIR(int(mode, 8)):
                yield from walk(found, f"{path}/")
            else:
                yield path, (int(mode, 8), found)

    with git_errors(f"Looking at {folder}"):
        yield from walk(read("commit", commit)[5:45].decode(), "")  # it begins with "tree ", and its id


def _id_of(kind: str, data: bytes) -> str:
    """As git has it: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects."""
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(data)) + data, usedforsecurity=False).hexdigest()


def _is_there(path: Path, mode: int, blob: str) -> bool:
    try:
        if stat.S_ISLNK(mode):
            return _id_of("blob", os.fsencode(path.readlink())) == blob
        if path.is_symlink():
            return False
        with files.open_to_read(path) as file:
            return _id_of("blob", file.read(files.LARGEST)) == blob
    except OSError:
        return False


def _delete_compiled(folder: Path) -> None:
    cache = folder / _CACHE
    try:
        if cache.is_symlink():
            cache.unlink()
        elif cache.exists():
            shutil.rmtree(cache)
    except FileNotFoundError:
        pass  # another run has just done it
    except OSError as error:
        raise CloneError(
            f"Cannot delete {cache}, from which Python would import: {error.strerror}.", "Delete it, or copy the clone."
        ) from error


def _importable(folder: Path, wanted: dict[str, tuple[int, str]]) -> Iterator[str]:
    """What lies beside the files of the commit and could be taken for a module, a package, one that is installed, whose
    entry points others import, or a part of the config."""
    own = {name.partition("/")[0] for name in wanted}
    for entry in os.scandir(folder):
        name = entry.name
        if entry.is_dir() and name in own:
            yield from (found for found in _below(folder / name, folder) if found not in wanted)
        elif name.casefold().endswith((*_MODULES, *_INSTALLED)) and name not in own:
            yield name
        elif entry.is_dir() and name.isidentifier() and _may_be_package(folder / name):
            yield f"{name}/"


def _may_be_package(folder: Path) -> bool:
    """Whether a folder holds a module, at any depth; a link may lead to one."""
    if folder.is_symlink():
        return True
    paths = ((place, names) for place, folders, more in os.walk(folder) for names in [folders + more])
    return any(
        name.casefold().endswith(_MODULES) or os.path.islink(os.path.join(place, name))  # noqa: PTH114, PTH118, quick
        for place, names in paths
        for name in names
    )


def _below(folder: Path, clone: Path) -> Iterator[str]:
    """The files and links at any depth of a folder, by their path in the clone."""
    for place, folders, names in os.walk(folder):
        for name in [*names, *(each for each in folders if (Path(place) / each).is_symlink())]:
            yield str((Path(place) / name).relative_to(clone))

"""The patch series that is laid on upstream: its files, their order, and what each adds to upstream's config."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ambersafe_cli.errors import PatchError

_PACKAGED = Path(__file__).parent / "patches"
FOLDER = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "patches"
"""In a wheel the series lies in the package, in a checkout at its top."""


@dataclass(frozen=True)
class Patch:
    """One file of the series.

    `commit` is the id that applying it (and those before it) to the pinned commit gives on every machine;
    `config_keys` are the keys that it adds to upstream's config; `diff` is what it changes, see `normal_diff`.
    """

    path: Path
    commit: str
    subject: str
    config_keys: tuple[str, ...]
    diff: str

    @property
    def name(self) -> str:
        return self.path.name


def normal_diff(text: str) -> str:
    """Return what a patch (or `git show`) changes, without blob ids and line numbers, which depend on the base."""
    body = text[text.find("diff --git ") :]
    body = re.sub(r"^index .*\n", "", body, flags=re.MULTILINE)
    return re.sub(r"^@@ .*$", "@@", body, flags=re.MULTILINE).strip()


def read_patch(path: Path, commit: str) -> Patch:
    """Read one `git format-patch` file; its subject may go over several lines.

    Raises PatchError when it is missing or is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PatchError(f"cannot read the patch {path}: {error}", "Install ambersafe-cli again.") from error
    subject = re.search(r"^Subject: (?:\[PATCH\] )?(.*(?:\n .*)*)", text, flags=re.MULTILINE)
    if not subject or "\ndiff --git " not in text:
        raise PatchError(f"{path} is not a patch made by git format-patch", "Install ambersafe-cli again.")
    header = text[: text.find("\ndiff --git ")]
    keys = re.findall(r"^Config-key: (\S+)$", header, flags=re.MULTILINE)
    return Patch(path, commit, subject[1].replace("\n", ""), tuple(keys), normal_diff(text))


def known(series: Iterable[Patch], folder: Path = FOLDER) -> frozenset[str]:
    """The commits that this package stands for: those of the series, and those in `folder/earlier`, which were the last
    of an earlier one. Raises PatchError."""
    try:
        lines = (folder / "earlier").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PatchError(f"cannot read the list of earlier series: {error}", "Install ambersafe-cli again.") from error
    return frozenset(patch.commit for patch in series) | {line for line in lines if re.fullmatch("[0-9a-f]{40}", line)}


def read_series(folder: Path = FOLDER) -> tuple[Patch, ...]:
    """Read the patches that `folder/series` lists, in order: a file name and a commit id a line, # for comments.

    Raises PatchError when the list or one of its files is missing or malformed.
    """
    try:
        lines = (folder / "series").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PatchError(f"cannot read the patch series: {error}", "Install ambersafe-cli again.") from error
    entries = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    if not all(len(entry) == 2 for entry in entries):
        raise PatchError(f"{folder / 'series'}: each line holds a file name and a commit id")
    return tuple(read_patch(folder / name, commit) for name, commit in entries)

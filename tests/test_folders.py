"""A folder that is filled under another name is the old one or the new one, whenever the process is killed."""

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from ambersafe_cli import folders
from ambersafe_cli.errors import ExportError, UsageError

OLD, NEW = {"a": "old", "b": "old"}, {"b": "new", "c": "new"}


def contents(folder: Path) -> dict[str, str] | None:
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.is_dir() else None


def make(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def fill(folder: Path) -> None:
    with folders.filling(folder, force=True) as new:
        make(new, NEW)


def killed_at(line: int, work: Callable[[], None]) -> bool:
    """Do work in a child that is killed before it runs its n-th line of folders.py; whether it came to that."""
    pid = os.fork()
    if pid == 0:
        left = line

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename != folders.__file__:
                return None
            left -= event == "line"
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        work()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, {}, OLD])
@pytest.mark.parametrize("exchanges", [True, False])
def test_killed_at_any_line_it_leaves_the_old_one_or_the_new_one_and_the_next_one_tidies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, str] | None, exchanges: bool
) -> None:
    if not exchanges:  # as on NFS
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    seen = []
    for line in range(1000):
        place = tmp_path / str(line)
        place.mkdir()
        folder = place / "f"
        if before is not None:
            make(folder, before)
        if not killed_at(line, functools.partial(fill, folder)):
            break
        left = contents(folder)
        if exchanges:
            assert left in (before, NEW), f"killed before line {line}"
        with pytest.raises(RuntimeError), folders.filling(folder, force=True):
            raise RuntimeError
        assert contents(folder) in (before, NEW), f"killed before line {line}"
        assert left in (contents(folder), None)
        assert [path.name for path in place.iterdir()] in (["f"], []), "nothing is left beside it"
        seen.append(contents(folder))
    assert 30 < len(seen) < 1000
    assert seen[0] == before
    assert seen[-1] == NEW
    assert contents(folder) == NEW


def test_what_fails_leaves_the_old_one(tmp_path: Path) -> None:
    make(tmp_path / "f", OLD)
    with pytest.raises(ExportError, match="No space left"), folders.filling(tmp_path / "f", force=True) as new:
        (new / "c").write_text("new")
        raise OSError(28, "No space left on device")
    assert contents(tmp_path / "f") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_two_cannot_fill_the_same_folder_at_once(tmp_path: Path) -> None:
    with folders.filling(tmp_path / "f", force=False) as new:
        with pytest.raises(UsageError, match="Another process"), folders.filling(tmp_path / "f", force=False):
            pass
        make(new, NEW)
    assert contents(tmp_path / "f") == NEW


def test_what_comes_into_the_folder_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not empty"), folders.filling(tmp_path / "f", force=False) as new:
        make(new, NEW)
        make(tmp_path / "f", OLD)
    assert contents(tmp_path / "f") == OLD


def test_a_folder_that_holds_something_is_replaced_by_force_alone(tmp_path: Path) -> None:
    make(tmp_path / "f", OLD)
    with pytest.raises(UsageError, match="is not empty") as raised:
        folders.require_free(tmp_path / "f", force=False)
    assert "--force replaces it" in raised.value.hint
    folders.require_free(tmp_path / "f", force=True)
    fill(tmp_path / "f")
    assert contents(tmp_path / "f") == NEW


@pytest.mark.parametrize("name", [".git", "run.json", "config.yaml", "weights.pt", "home", "work"])
def test_not_even_by_force_is_replaced_what_holds_more_than_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "f"
    (folder / name).mkdir(parents=True)
    if name == "home":
        monkeypatch.setenv("HOME", str(folder / name))
    if name == "work":
        monkeypatch.chdir(folder / name)
    with pytest.raises(UsageError, match=r"--force|replaced"):
        folders.require_free(folder, True, (folder / "weights.pt",) if name == "weights.pt" else ())


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="Cannot write"):
        fill(tmp_path / "file" / "f")
    with pytest.raises(UsageError, match="is a file"):
        folders.require_free(tmp_path / "file", force=True)


def test_a_repository_or_a_run_further_down_is_not_replaced_either(tmp_path: Path) -> None:
    for number, name in enumerate((".git", "run.json", "config.yaml")):
        held = tmp_path / str(number) / "other" / "deeper" / name
        held.parent.mkdir(parents=True)
        held.write_text("mine")
        with pytest.raises(UsageError, match=r"which --force does not replace"):
            folders.require_free(tmp_path / str(number), force=True)
        assert held.read_text() == "mine"

"""A working folder that several people write in: each has runs of their own there, in `.cache`."""

import contextlib
import os
import stat
from pathlib import Path

from ambersafe_cli.errors import RunFolderError


def share_cache(folder: Path) -> None:
    """Make `.cache` of a working folder, if `folder` is to lie in it, so that whoever may write in the working folder
    may have a folder of their own there. Raises OSError."""
    cache = Path.cwd() / ".cache"
    if not folder.is_relative_to(cache) or cache.exists():
        return
    around = Path.cwd().stat()
    if not around.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return
    with contextlib.suppress(FileExistsError):
        cache.mkdir()
        handle = os.open(cache, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # another may have put a link there
        try:
            if os.fstat(handle).st_uid == os.getuid():
                with contextlib.suppress(OSError):  # who is not of that group
                    os.fchown(handle, -1, around.st_gid)
                os.fchmod(handle, stat.S_IMODE(around.st_mode))
        finally:
            os.close(handle)


def require_no_link_of_others(folder: Path) -> None:
    """Raise RunFolderError if a folder would lie behind a link that another user has put into the working folder."""
    for path in (folder, *folder.parents):
        if path.is_symlink() and path.is_relative_to(Path.cwd()) and path.lstat().st_uid not in (0, os.getuid()):
            raise RunFolderError(f"{path} is a link of another user's.", "Delete it, or work in another folder.")

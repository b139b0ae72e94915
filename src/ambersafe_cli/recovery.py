"""What a run's folder holds after a kill, a full disk or a bad one: put in order, before the run goes on."""

import contextlib
import shutil
from pathlib import Path

from ambersafe_cli import display, integrity, runs
from ambersafe_cli.errors import RunFolderError

FILES_OF_A_CHECKPOINT = ("policy.pt", "optimizer.pt", "scheduler.pt")


def put_in_order(run: Path) -> Path | None:
    """Bring a run's folder to where train.py can go on, and return the newest checkpoint that is whole, or None.

    What a killed save or deletion left goes away. A checkpoint that is damaged is renamed and said: under its own name
    it would count as one of the newest, and whole ones would be deleted for it; those of an earlier time are deleted
    then. Reads the checkpoint that it returns.
    Raises RunFolderError, also for a link where train.py would write through it. Only for who has the run's lock.
    """
    _require_own_files(run)
    try:
        _finish_what_was_cut_short(run)
        earlier = [path for path in run.glob("step-*.damaged*") if path.is_dir() and not path.is_symlink()]
        for path in runs.steps(run):
            damage = {name: integrity.damage(path / name) for name in FILES_OF_A_CHECKPOINT}
            if not any(damage.values()):
                return path
            why = "; ".join(f"{name}: {said}" for name, said in damage.items() if said)
            display.warn(f"{path} is not whole, and is kept as {_rename_damaged(path).name}: {why}")
            while earlier:  # of another kill: they would fill the disk
                shutil.rmtree(earlier.pop())
    except OSError as error:
        raise RunFolderError(f"Cannot put {run} in order: {error}", "Mend that, then resume again.") from error
    return None


def _require_own_files(run: Path) -> None:
    for path in [*run.iterdir(), *(run / "hydra").rglob("*"), *(run / "tensorboard").rglob("*")]:
        is_checkpoint = path.is_dir() and path.name.startswith(("step-", "LATEST"))
        is_put_in_place_of = path.match("run.json.*.new")  # nothing is written through that name
        if path.is_symlink() and not is_checkpoint and not is_put_in_place_of:
            raise RunFolderError(
                f"{path} is a link to {path.readlink()}: training would write there.",
                "Put what it is a link to in its place, or delete it.",
            )


def _finish_what_was_cut_short(run: Path) -> None:
    for path in [*runs.steps(run, ".old"), run / "LATEST.old"]:
        # Two renames put a new checkpoint in the place of one by the same name; in between there is only the old one.
        if path.is_dir() and not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))
    leftovers = [path for suffix in (".old", ".partial", ".deleted") for path in runs.steps(run, suffix)]
    for path in run.glob("run.json.*.new"):
        with contextlib.suppress(FileNotFoundError):  # where there are no locks, another process may have renamed it
            if path.lstat().st_mtime < (run / "run.json").stat().st_mtime:  # a newer one may be being written
                path.unlink()
    for path in (*leftovers, run / "LATEST.old", run / "LATEST.partial"):
        if path.is_dir():
            shutil.rmtree(path)


def _rename_damaged(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.damaged{n or ''}") for n in range(1_000_000))
    return path.rename(next(name for name in names if not name.exists()))

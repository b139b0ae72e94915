"""`ambersafe plot`: the curves of runs as PNG and SVG, or as TensorBoard's event files."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ambersafe_cli import curves, display, extras, files, panels, runs, tensorboard_files, writing
from ambersafe_cli.errors import RunFolderError, UsageError

_FORMATS = ("png", "svg")
_TIME = re.compile(r"_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d+$")
_LONGEST = 60
"""Characters of a run's name that a legend has room for."""


def run(names: Sequence[str], out: Path | None, tensorboard: bool) -> None:
    """Draw runs into one figure, or write the event files of each, and say where that is.

    Raises UsageError for runs or a place that cannot be used, RunFolderError for a run without metrics.
    """
    found = list({each.folder: each for each in map(runs.open_run, names)}.values())
    if tensorboard:
        _write_event_files(found, out)
    else:
        _draw(found, out)


def _write_event_files(found: Sequence[runs.Run], out: Path | None) -> None:
    if out:
        raise UsageError("--out is for pictures: event files go into RUN/tensorboard.", "Leave one of the two away.")
    for each in found:
        if each.status == "running":
            raise UsageError(f"{each.folder} is running.", "Try again when it has ended.")
        read_curves(each)
        display.write(str(tensorboard_files.make(each.folder)))


def _draw(found: Sequence[runs.Run], out: Path | None) -> None:
    drawing = load_drawing()
    read = [read_curves(each) for each in found]
    if len(found) > drawing.LIMIT:
        raise UsageError(f"One figure holds {drawing.LIMIT} runs, and these are {len(found)}.", "Name fewer.")
    subjects = [
        drawing.Subject(name, stage(each), each_curves)
        for name, each, each_curves in zip(short_names([each.folder for each in found]), found, read, strict=True)
    ]
    places = _places(out, found)
    for kind, data in drawing.picture(subjects, list(places)).items():
        writing.write(places[kind], data, drawing.MARK)
        display.write(str(places[kind]))


def load_drawing() -> ModuleType:
    """The module that draws, whose import finds no matplotlibrc: a broken one would end it. Raises UsageError."""
    extras.require("matplotlib", "plot")
    os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
    with contextlib.chdir(Path(__file__).parent):  # matplotlib looks into the working folder first
        from ambersafe_cli import drawing
    return drawing


def stage(run: runs.Run) -> str:
    """The stage whose panels a run has. Raises UsageError if there are none."""
    name = str(run.record["stage"])
    if name not in panels.PANELS:
        raise UsageError(f"{run.folder} is of the stage {name!r}, which has no plot.", "There are sft and dpo.")
    return name


def read_curves(run: runs.Run) -> curves.Curves:
    """A run's curves. Raises RunFolderError if there is nothing in them, or they cannot be read."""
    try:
        found = curves.read(run.folder)
    except OSError as error:
        raise RunFolderError(f"Cannot read the metrics of {run.folder}: {error.strerror}") from error
    require_some(run, found)
    if found.unreadable:
        display.warn(f"{run.folder.name}: {found.unreadable} lines of metrics cannot be read, and are left away")
    return found


def require_some(run: runs.Run, found: curves.Curves) -> None:
    """Raise RunFolderError, with what helps, if there is no step and no evaluation in a run's curves."""
    if found.last is None and not found.evaluations:
        raise RunFolderError(f"{run.folder} has no metrics: no step and no evaluation.", _how_to_get(run))


def _how_to_get(run: runs.Run) -> str:
    if run.status == "running":
        return "It is running: try again when it has trained a step."
    if not (run.folder / "run.json").exists():
        return f"If what its train.py printed is kept somewhere, put that into {run.folder / 'train.log'}."
    return f"`ambersafe show {run.folder.name}` tells how it went."


def short_names(folders: Sequence[Path]) -> list[str]:
    """What tells runs apart, in as few words as that takes: without the time and the words that all of them begin with.

    The names of different folders stay different.
    """
    names = [folder.name for folder in folders]
    for depth in range(2, 9):
        if len(set(names)) == len(names):
            break
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
    if len(names) > 1:
        for shorter in ([_TIME.sub("", name) for name in names], [re.sub(r"_\d+$", "", name) for name in names]):
            if len(set(shorter)) == len(names) and all(shorter):
                names = shorter
                break
        names = _without_common_words(names)
    shortened = [name if len(name) <= _LONGEST else f"{name[:28]} … {name[-28:]}" for name in names]
    return shortened if len(set(shortened)) == len(set(names)) else names


def _without_common_words(names: Sequence[str]) -> list[str]:
    """Names without the words, as `_` parts them, that all begin with; each keeps its last one."""
    words = [name.split("_") for name in names]
    common = 0
    while all(len(each) > common + 1 for each in words) and len({each[common] for each in words}) == 1:
        common += 1
    shorter = ["_".join(each[common:]) for each in words]
    return shorter if all(shorter) else list(names)


def _places(out: Path | None, found: Sequence[runs.Run]) -> dict[str, Path]:
    """Where each format goes. Raises UsageError for a format that there is not."""
    name = stage(found[0]) if len(found) == 1 else "comparison"
    if out is None:
        out = files.place_in(found[0].folder, "plots") / name
    elif out.is_dir():
        out = out / name
    elif out.suffix.lower() in (".pdf", ".jpg", ".jpeg", ".gif", ".eps", ".ps", ".webp", ".tif", ".tiff"):
        raise UsageError(f"{out} is no PNG or SVG.", "Name a .png or .svg, or give the name without a suffix for both.")
    if out.suffix.lower() in (".png", ".svg"):
        return {out.suffix.lower()[1:]: out.absolute()}
    return {kind: out.with_name(f"{out.name}.{kind}").absolute() for kind in _FORMATS}

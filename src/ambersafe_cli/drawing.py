"""Curves as pictures: PNG and SVG by matplotlib, the same bytes for the same runs, whatever the user's own style is."""

import contextlib
import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ambersafe_cli import curves, panels

MARK = "made by ambersafe-cli"
"""Stands in the metadata of every picture, by which it is known as one of ours."""

# Okabe and Ito's colours for the colour-blind, without black and yellow: those that stand out on white and on black
# come first. Each has a marker of its own, by which the runs are told apart in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#808080", "#8A8000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
LIMIT = len(_COLOURS)
"""Runs that one picture can hold."""

_INK = "#24292f"
_SENTINEL = "#010203"  # is replaced by the colour of the text around an inline picture
# Inches: of a picture, a panel's axes with what is left of them, above them, and a row of panels in all, ...
_WIDTH = 10.0
_PANEL = (3.9, 1.9)
_LEFT = 0.95
_ABOVE = 0.32
_ROW = 2.85
# ... a stage's title, and the key of the kinds of lines.
_TITLE = 0.4
_KINDS = 0.35
_DASHES: Sequence[Any] = ("solid", (0, (4, 1.5)))
_DOTS: Any = (0, (1, 1.5))
_STEPS = (1, 2, 2.5, 5, 10)
_LIGHT = 4
"""Runs in a picture up to which each step is drawn as well as their mean."""
_STAGES = {"sft": "SFT", "dpo": "DPO"}
_STYLE: Mapping[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a run's name is a $
    "svg.hashsalt": MARK,  # else ids are drawn by chance
}
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")


@dataclass(frozen=True)
class Subject:
    """A run as it is drawn: what a legend calls it, `sft` or `dpo`, and its curves."""

    name: str
    stage: str
    curves: curves.Curves

    @property
    def label(self) -> str:
        """The name without what a font cannot draw, such as a line feed or half of a character."""
        return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in self.name)


@contextlib.contextmanager
def _style(ink: str, more: Mapping[Any, Any]) -> Iterator[None]:
    """matplotlib's own defaults and ours, with nothing of a matplotlibrc, for as long as the block lasts."""
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in a script that the font lacks is drawn as boxes
        mpl.rcdefaults()
        inked: Mapping[Any, Any] = dict.fromkeys(_INKED, ink)
        mpl.rcParams.update({**_STYLE, **inked, **more})
        yield


def picture(subjects: Sequence[Subject], formats: Sequence[str]) -> dict[str, bytes]:
    """One figure of runs, at most LIMIT, as files of these formats, `png` and `svg`."""
    with _style(_INK, {}):
        figure = _figure(subjects)
        return {each: _bytes(figure, each) for each in formats}


def inline(panel: panels.Panel, subject: Subject, identifier: str) -> str:
    """One panel as an SVG element for an HTML page, without title and unit, in the colour of the text around it.

    `identifier` has to be another one for each picture of a page: it begins the ids in it.
    """
    with _style(_SENTINEL, {"svg.fonttype": "none", "savefig.transparent": True}):
        figure = Figure(figsize=(3.9, 2.5))
        axes = figure.add_axes((0.16, 0.2, 0.82, 0.69))
        _draw(axes, panel, [(0, subject)], _last_examples([subject]), 1)
        axes.set(title="", ylabel="")  # the page says both
        text = _bytes(figure, "svg").decode()
    text = text[text.index("<svg") :].replace(_SENTINEL, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{identifier}-", text)
    what = html.escape(describe(panel, subject))
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg \1 xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{what}">',
        text,
        count=1,
    )


def describe(panel: panels.Panel, subject: Subject) -> str:
    """A panel of one run in words, for who does not see it."""
    parts = [f"{panel.title}{panel.unit and f' ({panel.unit})'}, over training examples"]
    for line in panels.lines(panel, subject.curves):
        for points, what in ((line.smooth or line.steps, "training"), (line.evaluations, "held out")):
            finite = [value for _, value in points if not math.isnan(value)]
            if finite:
                name = " ".join(filter(None, (line.label, what)))
                parts.append(f"{name} from {finite[0]:.4g} to {finite[-1]:.4g}")
    return "; ".join(parts)


def _bytes(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Software": MARK} if kind == "png" else {"Creator": MARK, "Date": None, "Format": None, "Type": None}
    figure.savefig(buffer, format=kind, dpi=120, metadata=metadata)
    return buffer.getvalue()


def _figure(subjects: Sequence[Subject]) -> Figure:
    """All panels of each stage, two in a row, the first stage above."""
    sections = []
    for stage in panels.PANELS:
        members = [(index, subject) for index, subject in enumerate(subjects) if subject.stage == stage]
        if members:
            sections.append((stage, members, panels.of_stage(stage, [subject.curves for _, subject in members])))
    columns = max(1, min(4, int(_WIDTH / (0.085 * max(len(each.label) for each in subjects) + 0.8))))
    names = 0.1 + 0.24 * math.ceil(len(subjects) / columns) if len(subjects) > 1 else 0.0
    rows = sum(math.ceil(len(found) / 2) for _, _, found in sections)
    height = names + len(sections) * _TITLE + rows * _ROW + _KINDS
    figure = Figure(figsize=(_WIDTH, height))
    if len(subjects) > 1:
        figure.legend(*_run_keys(subjects), loc="upper left", ncols=columns, borderaxespad=0.5)
    top = height - names
    drawn = []
    for stage, members, found in sections:
        title = _STAGES[stage] if len(subjects) > 1 else f"{_STAGES[stage]}: {subjects[0].label}"
        figure.text(0.12 / _WIDTH, (top - 0.22) / height, title, fontsize=13, weight="bold", va="center")
        top -= _TITLE
        last = _last_examples([subject for _, subject in members])
        for number, panel in enumerate(found):
            left = _LEFT + number % 2 * _WIDTH / 2
            bottom = top - number // 2 * _ROW - _ABOVE - _PANEL[1]
            box = (left / _WIDTH, bottom / height, _PANEL[0] / _WIDTH, _PANEL[1] / height)
            drawn += _draw(figure.add_axes(box), panel, members, last, len(subjects))
        top -= math.ceil(len(found) / 2) * _ROW
    keys, kinds = _kind_keys(drawn, len(subjects))
    if keys:
        figure.legend(keys, kinds, loc="lower center", ncols=len(keys))
    return figure


def _last_examples(subjects: Sequence[Subject]) -> int:
    seen = [[*subject.curves.steps[-1:], *subject.curves.evaluations[-1:]] for subject in subjects]
    return max((each.examples for records in seen for each in records), default=0)


def _draw(
    axes: Axes, panel: panels.Panel, members: Sequence[tuple[int, Subject]], last: int, of: int
) -> list[panels.Line]:
    """One panel of some runs of one stage, up to the `last` example, and what was drawn.

    Each run comes with its index in a picture `of` so many runs, which gives its colour and marker.
    """
    axes.set_title(panel.title)
    axes.set_xlabel("training examples")
    axes.set_ylabel(panel.unit)
    axes.set_xlim(0, max(last, 1) * 1.02)
    if panel.limits:
        axes.set_ylim(*panel.limits)
    ink = mpl.rcParams["text.color"]
    if panel.level is not None:
        axes.axhline(panel.level, color=ink, linewidth=1, linestyle=_DOTS, zorder=1)
        axes.annotate(
            panel.level_name, (1, panel.level), xycoords=("axes fraction", "data"), xytext=(0, 2),
            textcoords="offset points", ha="right", va="bottom", fontsize=9,
        )  # fmt: skip
    drawn = []
    labels = {}
    for index, subject in members:
        for order, line in enumerate(panels.lines(panel, subject.curves)):
            # The second series of a run that is alone has a colour of its own as well as dashes.
            colour = _COLOURS[index + order if of == 1 else index]
            _draw_line(axes, line, colour, index, _DASHES[order], of)
            drawn.append(line)
            if line.label:
                labels[line.label] = Line2D([], [], color=colour if of == 1 else ink, linestyle=_DASHES[order])
    if labels:
        axes.legend(
            list(labels.values()), list(labels), loc="lower right", bbox_to_anchor=(1, 0.98), borderaxespad=0,
            ncols=2, fontsize=9, handlelength=2.6,
        )  # fmt: skip
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, steps=_STEPS))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=_STEPS))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(_number(axes)))
    return drawn


def _draw_line(axes: Axes, line: panels.Line, colour: str, index: int, dashes: Any, of: int) -> None:
    """What was logged, light where there is a mean of it to see; that; and the points on held-out rows."""
    marker = _MARKERS[index]
    if line.smooth and of <= _LIGHT:
        axes.plot(*_columns(line.steps), color=colour, linewidth=0.7, alpha=0.45 if of == 1 else 0.2, zorder=2)
    main = line.smooth or line.steps
    every = max(1, len(main) // 8)
    tells_apart = of > 1 and not line.evaluations  # else the held-out points do
    axes.plot(
        *_columns(main), color=colour, linestyle=dashes, linewidth=1.8, zorder=3, markersize=5,
        marker=marker if tells_apart or len(main) == 1 else None,
        markevery=(every * index // of, every),  # of runs that are equal, all are seen
    )  # fmt: skip
    axes.plot(
        *_columns(line.evaluations), color=colour, linestyle=_DOTS, linewidth=1, zorder=4, clip_on=False,
        marker=marker, markersize=7 if of == 1 else 5.5, markeredgecolor=mpl.rcParams["text.color"],
        markeredgewidth=0.8,
    )  # fmt: skip


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [examples for examples, _ in points], [value for _, value in points]


def _number(axes: Axes) -> Callable[[float, int], str]:
    """How the ticks of a y axis read: thousands apart, small numbers as 5e-7."""

    def text(value: float, position: int) -> str:
        low, high = axes.get_ylim()
        if abs(value) < 1e-9 * abs(high - low):
            return "0"
        if abs(value) >= 1e7 or abs(value) < 1e-3:
            return re.sub(r"e([+-])0*", lambda match: f"e{match[1].strip('+')}", f"{value:.3g}")
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.5g}"

    return text


def _run_keys(subjects: Sequence[Subject]) -> tuple[list[Artist], list[str]]:
    """Which run is which."""
    keys: list[Artist] = [
        Line2D([], [], color=_COLOURS[index], marker=_MARKERS[index], markersize=6, linewidth=1.8)
        for index in range(len(subjects))
    ]
    return keys, [subject.label for subject in subjects]


def _kind_keys(drawn: Sequence[panels.Line], of: int) -> tuple[list[Artist], list[str]]:
    """What the kinds of lines are, as far as there are several."""
    ink = mpl.rcParams["text.color"]
    keys: list[Artist] = []
    names: list[str] = []
    if any(line.smooth for line in drawn):
        if of <= _LIGHT:
            keys.append(Line2D([], [], color=ink, linewidth=0.7, alpha=0.5))
            names.append("each step")
        keys.append(Line2D([], [], color=ink, linewidth=1.8))
        names.append("running mean of the steps")
    if any(line.evaluations for line in drawn):
        keys.append(Line2D([], [], color=ink, linestyle=_DOTS, linewidth=1, marker="o", markersize=7))
        names.append("on held-out rows")
    return keys, names

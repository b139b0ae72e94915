"""`ambersafe plot`: which curves are drawn, that they read well for any run, and where the pictures go."""

import html
import itertools
import math
import os
import sys
import xml.dom.minidom
from pathlib import Path
from typing import Any

import made_runs
import matplotlib as mpl
import pytest
from conftest import Ambersafe
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_cli import imported_by

from ambersafe_cli import curves, drawing, metrics, panels, plot, runs, writing
from ambersafe_cli.errors import RunFolderError, UsageError


def of(entries: list[metrics.Record]) -> curves.Curves:
    found = curves.Curves()
    for entry in entries:
        found.add(entry)
    return found


def said(svg: Path | bytes) -> list[str]:
    """The texts in a picture: matplotlib writes each as a comment next to its outlines."""
    data = svg.read_bytes() if isinstance(svg, Path) else svg
    comments: list[str] = []
    nodes: list[Any] = [xml.dom.minidom.parseString(data)]
    while nodes:
        node = nodes.pop(0)
        if node.nodeType == node.COMMENT_NODE:
            comments.append(html.unescape(node.data.strip()))
        nodes = list(node.childNodes) + nodes
    return comments


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "work")
    return runs.folder_of_runs()


def test_a_run_that_was_made_by_hand_is_drawn_from_its_log(ambersafe: Ambersafe, work: Path) -> None:
    run = made_runs.by_hand(work / "mine", "dpo")
    failed = ambersafe("plot", "mine")
    assert failed.returncode == 74
    assert f"put that into {run / 'train.log'}" in failed.stderr
    (run / "train.log").write_text(made_runs.as_log(made_runs.records("dpo", 40)))
    done = ambersafe("plot", "mine")
    assert done.returncode == 0, done.stderr
    pictures = [run / "plots" / "dpo.png", run / "plots" / "dpo.svg"]
    assert done.stdout.split() == list(map(str, pictures))
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    texts = said(pictures[1])
    for text in ("DPO: mine", "by chance", "chosen", "rejected", "training examples", "each step", "on held-out rows"):
        assert text in texts, text
    assert [text for text in texts if text in {panel.title for panel in panels.PANELS["dpo"]}] == [
        panel.title for panel in panels.PANELS["dpo"]
    ]


def test_sft_has_its_own_panels_and_what_was_not_logged_has_none(ambersafe: Ambersafe, work: Path) -> None:
    entries = made_runs.records("sft", 5)
    run = made_runs.by_hand(work / "old", "sft", [e._replace(values={"loss/train": 1.0}) for e in entries])
    made_runs.by_hand(work / "new", "sft", entries)
    assert ambersafe("plot", "old").returncode == 0
    titles = {panel.title for panel in panels.PANELS["sft"]}
    assert titles & set(said(run / "plots" / "sft.svg")) == {"Loss"}
    assert ambersafe("plot", "new", "old", "--out", "both.svg").returncode == 0
    assert titles <= set(said(work.parents[1] / "both.svg"))


def test_runs_of_both_stages_are_drawn_apart_with_the_names_that_tell_them_apart(
    ambersafe: Ambersafe, work: Path
) -> None:
    time = "2026-11-24_00-42-43_858871"
    for name in ("dpo_beta0.1", "dpo_beta0.2", "sft_x"):
        made_runs.by_hand(work / f"safe_{name}_{time}", name[:3], made_runs.records(name[:3], 40))
    names = [f"safe_{name}_{time}" for name in ("dpo_beta0.1", "dpo_beta0.2", "sft_x", "sft_x")]
    done = ambersafe("plot", *names)
    assert done.returncode == 0, done.stderr
    svg = work / names[0] / "plots" / "comparison.svg"
    assert done.stdout.split()[1] == str(svg)
    texts = said(svg)
    assert [t for t in texts if t in ("SFT", "DPO", "dpo_beta0.1", "dpo_beta0.2", "sft_x")] == [
        "SFT", "DPO", "dpo_beta0.1", "dpo_beta0.2", "sft_x",
    ]  # fmt: skip
    assert texts.count("Loss") == 2


def test_names_of_eight_runs_at_most(ambersafe: Ambersafe, work: Path) -> None:
    names = [f"run{number}" for number in range(9)]
    for name in names:
        made_runs.by_hand(work / name, "sft", made_runs.records("sft", 2))
    assert ambersafe("plot", *names[:8], "--out", "eight.png").returncode == 0
    done = ambersafe("plot", *names)
    assert done.returncode == 64
    assert "holds 8 runs" in done.stderr


@pytest.mark.parametrize(
    ("out", "made"),
    [
        ("a.png", ["a.png"]),
        ("new/a.SVG", ["new/a.SVG"]),
        ("beta0.1", ["beta0.1.png", "beta0.1.svg"]),
        (".", ["sft.png", "sft.svg"]),
    ],
)
def test_pictures_go_where_they_are_asked_for(ambersafe: Ambersafe, work: Path, out: str, made: list[str]) -> None:
    made_runs.by_hand(work / "run", "sft", made_runs.records("sft", 2))
    place = work.parents[1]
    done = ambersafe("plot", "run", "--out", out)
    assert done.stdout.splitlines() == [str(place / each) for each in made]
    assert all((place / each).stat().st_size > 1000 for each in made)
    assert not (work / "run" / "plots").exists()


def test_no_picture_is_written_over_what_is_not_ours(ambersafe: Ambersafe, work: Path) -> None:
    made_runs.by_hand(work / "run", "sft", made_runs.records("sft", 2))
    theirs = work.parents[1] / "plot.svg"
    theirs.write_text("<svg/>")
    refused = ambersafe("plot", "run", "--out", "plot.svg")
    assert refused.returncode == 64
    assert theirs.read_text() == "<svg/>"
    theirs.unlink()
    for _ in range(2):
        assert ambersafe("plot", "run", "--out", "plot.svg").returncode == 0
    assert ambersafe("plot", "run", "--out", "plot.pdf").returncode == 64
    assert [path.name for path in theirs.parent.glob("*plot*")] == ["plot.svg"]


def test_a_full_disk_leaves_the_earlier_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.svg"
    writing.write(path, b"<!-- mark --> first", "mark")

    def no_room(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(RunFolderError, match="No space left"):
        writing.write(path, b"<!-- mark --> second", "mark")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("a.svg", b"<!-- mark --> first")]


def test_the_same_run_gives_the_same_bytes_whatever_the_users_style_is(ambersafe: Ambersafe, work: Path) -> None:
    made_runs.by_hand(work / "run", "dpo", made_runs.records("dpo", 40))
    assert ambersafe("plot", "run", "--out", "one", env={"PYTHONHASHSEED": "1"}).returncode == 0
    (work.parents[1] / "matplotlibrc").write_bytes(b"text.usetex: True\nfont.size: 40\naxes.facecolor: red\n\xff\n")
    done = ambersafe("plot", "run", "--out", "other", env={"PYTHONHASHSEED": "2", "MPLBACKEND": "nonsense"})
    assert done.returncode == 0, done.stderr
    for kind in ("png", "svg"):
        assert (work.parents[1] / f"one.{kind}").read_bytes() == (work.parents[1] / f"other.{kind}").read_bytes()


def test_what_matplotlib_was_set_to_is_left_away_and_left_as_it_was() -> None:
    subjects = [drawing.Subject("run", "sft", of(made_runs.records("sft", 3)))]
    before = drawing.picture(subjects, ["svg"])
    with mpl.rc_context({"font.size": 40, "lines.linewidth": 9, "xtick.direction": "in", "svg.fonttype": "none"}):
        assert drawing.picture(subjects, ["svg"]) == before
        assert mpl.rcParams["xtick.direction"] == "in"


def test_without_matplotlib_it_names_the_extra(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_runs.by_hand(work / "run", "sft", made_runs.records("sft", 2))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError) as raised:
        plot.run(["run"], None, tensorboard=False)
    assert raised.value.hint == "pip install 'ambersafe-cli[plot]'"


def test_plot_imports_no_torch(work: Path) -> None:
    made_runs.by_hand(work / "run", "sft", made_runs.records("sft", 2))
    imported = imported_by("plot", "run", cwd=work.parents[1])
    assert "matplotlib" in imported
    assert not imported & {"torch", "transformers", "datasets", "pandas", "tensorboard"}


@pytest.mark.slow
def test_eight_runs_of_twenty_thousand_steps_are_a_small_picture() -> None:
    read = of(made_runs.records("dpo", 20_000))
    subjects = [drawing.Subject(f"run {number}", "dpo", read) for number in range(8)]
    assert len(drawing.picture(subjects, ["svg"])["svg"]) < 4_000_000


@pytest.mark.parametrize(
    "name", ["_hidden", "$x^2$", r"$\no$", "<b>&\"'", "ひらがな", "two\nlines\x1b[31m", "bad\udcff", "l" * 200]
)
def test_any_name_can_stand_in_a_legend(name: str) -> None:
    read = of(made_runs.records("sft", 2))
    subjects = [drawing.Subject(each, "sft", read) for each in (name, "other")]
    texts = said(drawing.picture(subjects, ["svg"])["svg"])
    assert "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in name) in texts
    assert drawing.picture(subjects[:1], ["png"])["png"]


def paths(svg: str) -> list[str]:
    return [e.getAttribute("d") for e in xml.dom.minidom.parseString(svg).getElementsByTagName("path")]


@pytest.mark.parametrize("count", [20, 200])
def test_what_is_no_number_leaves_a_gap(count: int) -> None:
    loss = panels.PANELS["sft"][0]
    whole = [metrics.Record("train", n, {"loss/train": math.sin(n)}) for n in range(count)]
    torn = [
        each._replace(values={"loss/train": math.nan}) if count // 2 <= n < count // 2 + 5 else each
        for n, each in enumerate(whole)
    ]
    for entries, pieces in ((whole, 1), (torn, 2)):
        svg = drawing.inline(loss, drawing.Subject("run", "sft", of(entries)), "a")
        curves_drawn = [path for path in paths(svg) if path.count("L") > 5]
        assert len(curves_drawn) == (1 if count == 20 else 2)
        assert {path.count("M") for path in curves_drawn} == {pieces}


@example([{"loss/train": 1.7e308, "loss/eval": -1.7e308}])
@settings(deadline=None, max_examples=15)
@given(st.lists(st.dictionaries(st.sampled_from(["loss/train", "loss/eval", "grad_norm"]), st.floats()), max_size=5))
def test_no_value_is_fatal(values: list[dict[str, float]]) -> None:
    read = of([metrics.Record("train", n, each) for n, each in enumerate(values)])
    read.evaluations = list(read.steps)
    subject = drawing.Subject("run", "sft", read)
    drawing.picture([subject], ["svg", "png"])
    for panel in panels.of_stage("sft", [read]):
        xml.dom.minidom.parseString(drawing.inline(panel, subject, "a"))


def test_an_inline_picture_takes_the_colour_of_its_text_and_has_ids_of_its_own() -> None:
    subject = drawing.Subject("run", "dpo", of(made_runs.records("dpo", 40)))
    rewards = next(panel for panel in panels.PANELS["dpo"] if panel.name == "rewards")
    svg = drawing.inline(rewards, subject, "one")
    assert "currentColor" in svg
    assert drawing._SENTINEL not in svg
    assert "<text" in svg, "text stays text"
    element = xml.dom.minidom.parseString(svg).documentElement
    assert element is not None
    assert element.getAttribute("role") == "img"
    assert "chosen training from" in element.getAttribute("aria-label")
    ids = [e.getAttribute("id") for e in element.getElementsByTagName("*") if e.hasAttribute("id")]
    assert ids
    assert all(each.startswith("one-") for each in ids)
    for used in svg.split("url(#")[1:]:
        assert used.partition(")")[0] in ids


points = st.lists(st.floats() | st.just(math.nan), max_size=60).map(lambda values: list(enumerate(values)))


@given(points, st.integers(1, 20))
def test_thinning_keeps_the_order_the_extremes_and_the_gaps(points: list[tuple[int, float]], limit: int) -> None:
    kept = panels.extremes(points, limit)
    assert len(kept) <= 3 * limit
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    finite, of_kept = ([y for _, y in each if not math.isnan(y)] for each in (points, kept))
    assert (min(finite, default=0), max(finite, default=0)) == (min(of_kept, default=0), max(of_kept, default=0))
    assert any(math.isnan(y) for _, y in points) == any(math.isnan(y) for _, y in kept)


finite_points = st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=60).map(lambda values: list(enumerate(values)))


@given(finite_points, st.integers(1, 20))
def test_a_mean_lies_between_its_values(points: list[tuple[int, float]], width: int) -> None:
    low, high = min(y for _, y in points), max(y for _, y in points)
    for means in (panels.means(points, width), panels.running_mean(points, width)):
        assert all(low - 1e-3 <= y <= high + 1e-3 for _, y in means)
    assert len(panels.means(points, width)) <= max(width, 0)
    assert [x for x, _ in panels.running_mean(points, width)] == [x for x, _ in points]


def test_a_running_mean_has_no_lag() -> None:
    line = [(n, float(n)) for n in range(20)]
    assert [y for _, y in panels.running_mean(line, 5)[5:15]] == pytest.approx([y for _, y in line[5:15]])
    assert panels.running_mean([(0, 1.0), (1, math.nan), (2, 3.0)], 3)[0] == (0, 1.0)


word = st.text(alphabet="ab_0", min_size=1, max_size=8)
time = st.sampled_from(["", "_2026-11-24_00-42-43_858871", "_2026-11-24_00-42-43_858872", "_2026-11-25_00-42-43_1"])
folders = st.builds(lambda parent, name, time: Path("/", parent, name + time), word, word, time)


@given(st.lists(folders, min_size=1, max_size=8, unique=True))
def test_short_names_stay_different(folders: list[Path]) -> None:
    names = plot.short_names(folders)
    assert len(set(names)) == len(folders)
    assert all(names)


def test_a_short_name_is_what_tells_runs_apart() -> None:
    time = itertools.count(100_000)
    folders = [Path(f"/x/safe_dpo_{word}_2026-11-24_00-42-43_{next(time)}") for word in ("base", "beta_0.2")]
    assert plot.short_names(folders) == ["base", "beta_0.2"]
    assert plot.short_names(folders[:1]) == [folders[0].name]
    again = [folders[0], folders[0].with_name("safe_dpo_base_2026-11-25_07-00-00_123456")]
    assert plot.short_names(again) == ["2026-11-24_00-42-43", "2026-11-25_07-00-00"]
    assert plot.short_names([Path("/x/run"), Path("/y/run")]) == ["x/run", "y/run"]


def test_ticks_are_short() -> None:
    class Axes:
        def get_ylim(self) -> tuple[float, float]:
            return (0.0, 1.0)

    text = drawing._number(Axes())  # type: ignore[arg-type]
    values = [0.25, 5e-7, -2.5e-12, 1234.5, 20_000, 3e9, 1e-17, 0.30000000000000004]
    assert [text(value, 0) for value in values] == [
        "0.25", "5e-7", "0", "1,234.5", "20,000", "3e9", "0", "0.3",
    ]  # fmt: skip

"""`ambersafe report`: what the page says, that nothing in a run can get out of its text, and how a browser sees it."""

import html.parser
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import browser
import made_runs
import pytest
from conftest import Ambersafe
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_plot import of
from test_show import any_json

from ambersafe_cli import drawing, health, pages, panels, report, runs
from ambersafe_cli.errors import UsageError

EVIL = (
    "</p></pre></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&<style>*{display:none}</style>{{ 7*7 }}"
)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "work")
    return runs.folder_of_runs()


def figures(value: float) -> dict[str, Any]:
    one = {"value": value, "low": value - 0.05, "high": value + 0.05, "pairs": 60, "prompts": 30}
    alone = {**one, "low": None, "high": None, "prompts": 1}
    return {"safe_more_likely": one, "safe_more_likely_per_token": one, "reward_accuracy": one, "reward_margin": alone}


def evaluation(label: str, value: float, category: str = "Violence") -> dict[str, Any]:
    """An evaluation.json, in the shape that evaluate.py documents."""
    named = {"label": label, "model": "some/model", "revision": None, "checkpoint": None, "run": None}
    return {
        "schema": 1,
        "model": named,
        "reference": {**named, "label": "sft"},
        "beta": 0.1,
        "data": {"name": "some/data", "revision": None, "split": "test", "pairs": 60, "prompts": 30, "left_out": 0},
        "figures": figures(value),
        "by_category": {category: figures(value)},
        "upstream": {"after": 640, "examples": 48, "metrics": {}, "agrees": True},
    }


def samples(prompt: str, *texts: str) -> dict[str, Any]:
    """A samples.json, in the shape that sample.py documents."""
    answers = [
        {"label": label, "model": "some/model", "run": None, "text": text, "tokens": 64, "stopped": label != "base"}
        for label, text in zip(("base", "sft", "dpo"), texts, strict=True)
    ]
    asked = {"max_new_tokens": 64, "temperature": 0.7, "seed": 3, "prompts": "mine.txt"}
    return {
        "schema": 1,
        "time": "2026-11-24T00:00:00+00:00",
        "settings": asked,
        "models": [],
        "samples": [{"prompt": prompt, "answers": answers}],
    }


def both_stages(work: Path, name: str = "run", text: str = "a text", **more: Any) -> Path:
    """A DPO run with the SFT run that it came from, with everything that a report can show; returns its folder."""
    sft = made_runs.recorded(work / f"sft_{name}", "sft", made_runs.records("sft", 40))
    (sft / "LATEST").mkdir()
    (sft / "LATEST" / "policy.pt").write_text("weights")
    (sft / "evaluation.json").write_text(json.dumps(evaluation("sft", 0.25)))
    series = [{"name": f"0001-{text}.patch", "state": "applied", "sha256": "d" * 64, "commit": "e" * 40}]
    record = {
        "archive": str(sft / "LATEST" / "policy.pt"),
        "recipe": {"source": text, "values": {"dpo": {"lr": 1}}},
        "values": {"lr": 2, "exp_name": text},
        "overrides": [f"note={text}"],
        "python": {"version": "3.11", "packages": {"torch": "2.13.0"}, "gpus": [text]},
        "data": {"name": text, "counts": {"train": {"rows": 240, "prompts": 200, "pairs": 1234}}, "fingerprint": {}},
        "upstream": {"folder": "/c", "head": "c" * 40, "edited": [text], "can_resume": True, "series": series},
        "planned_examples": 640,
        **more,
    }
    dpo = made_runs.recorded(work / f"dpo_{name}", "dpo", made_runs.records("dpo", 40), **record)
    (dpo / "evaluation.json").write_text(json.dumps(evaluation("dpo", 0.75, text)))
    (dpo / "samples.json").write_text(json.dumps(samples(text, text, text, text)))
    return dpo


class Reader(html.parser.HTMLParser):
    """The elements of a page with their attributes and, of each kind, the texts; and where it is not well-formed."""

    _EMPTY = frozenset({"meta", "link", "img", "br", "input", "path", "use"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == [], "elements that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self._EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._EMPTY:
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_of_a_dpo_run_says_all_of_both_stages(ambersafe: Ambersafe, work: Path) -> None:
    run = both_stages(work)
    done = ambersafe("report", "dpo_run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run / 'report.html'}\n"
    page = Reader((run / "report.html").read_text())
    assert page.texts["h2"] == ["SFT: sft_run", "DPO: dpo_run", "Evaluation", "Samples", "Where it came from"]
    said = " ".join(text for texts in page.texts.values() for text in texts)
    for part in (
        "ambersafe reproduce sft_run",
        "ambersafe reproduce dpo_run",
        "240 rows, 200 prompts, 1,234 pairs; sha256 not known",
        "lr=2, exp_name=a text, note=a text",
        "exit status 0",
        "after 0 examples",
        "after 624 examples",
        "Reward accuracy (share of pairs)",
        "No rule found anything amiss.",
        "60 pairs of 30 prompts, test split of some/data, against sft",
        "is the same to 4 digits",
        "0.7000 to 0.8000",
        "DPO, by harm category of the unsafe response",
        "mine.txt",
        "at temperature 0.7, seed 3",
        "base (cut off after 64 tokens)",
        "python train.py lr=1e-6",
        "d" * 64,
        "2.13.0",
    ):
        assert part in said, part
    titles = [f"{panel.title}" for stage in ("sft", "dpo") for panel in panels.PANELS[stage]]
    assert page.texts["figcaption"] == titles
    assert len(page.of("svg")) == len(titles)


def test_an_sft_run_has_a_page_too_and_is_the_newest_by_default(ambersafe: Ambersafe, work: Path) -> None:
    both_stages(work)
    assert ambersafe("report", "sft_run", "--out", "sft.html").stdout == f"{work.parents[1] / 'sft.html'}\n"
    assert Reader((work.parents[1] / "sft.html").read_text()).texts["h2"][:2] == ["SFT: sft_run", "Evaluation"]
    (work / "dpo_run" / "run.json").unlink()
    assert ambersafe("report").stdout == f"{work / 'sft_run' / 'report.html'}\n"


def test_it_is_accessible(work: Path) -> None:
    page = Reader(report.render(report.page_of(runs.open_run(str(both_stages(work))))))
    assert page.of("html") == [{"lang": "en"}]
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.of("svg"))
    assert len(page.of("table")) == len(page.texts["caption"])
    assert all("scope" in head for head in page.of("th"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {(link["href"] or "")[1:] for link in page.of("a")} <= set(ids)


def leaving(page: Reader) -> list[tuple[str, str, str | None]]:
    """The attributes by which a page can ask for something."""
    asking = ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background")
    return [
        (tag, name, value)
        for tag, attributes in page.elements
        for name, value in attributes.items()
        if (name in asking and not (value or "").startswith(("#", "data:"))) or name.startswith("on")
    ]


def test_nothing_in_a_run_gets_out_of_its_text(work: Path) -> None:
    plain = Reader(report.render(report.page_of(runs.open_run(str(both_stages(work, "plain"))))))
    evil = both_stages(work, EVIL.replace("/", "-"), EVIL)
    text = report.render(report.page_of(runs.open_run(str(evil))))
    page = Reader(text)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert leaving(page) == []
    assert EVIL in page.texts["p"]
    assert "<script" not in text
    assert text.count("<style") == plain.elements.count(("style", {})) + len(plain.of("svg"))


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_and_asks_for_nothing(work: Path, chromium: str, width: int, dark: bool) -> None:
    run = both_stages(work, "evil", EVIL)
    page = report.page_of(runs.open_run(str(run)))
    page.stages[0].problems.append("something is missing")
    seen = browser.see(chromium, report.render(page), width, dark)
    assert seen.requests == []
    assert seen.console == []
    assert seen.found["title"] == "AmberSafe: dpo_evil"
    assert seen.found["width"] == width, "it scrolls sideways"
    assert seen.found["scripts"] == 0
    assert EVIL in seen.found["text"]
    assert len(seen.found["pictures"]) == 12
    assert min(seen.found["pictures"]) > 300
    for name, colours in seen.found["colours"].items():
        assert contrast(*colours) >= 4.5, name
    ground = luminance(seen.found["colours"]["body"][1])
    assert ground < 0.1 if dark else ground > 0.9


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2.2."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
def test_the_browser_would_see_a_request_and_an_error(chromium: str) -> None:
    """What the test above relies on."""
    asks = '<img src="http://elsewhere.test/a.png"><link rel="preconnect" href="https://fonts.googleapis.com">'
    seen = browser.see(chromium, f"<title>a</title>{asks}<script>console.error('oops')</script>")
    assert sorted(seen.requests) == ["http://elsewhere.test/a.png", "https://fonts.googleapis.com/"]
    assert "oops" in seen.console[0]


@pytest.mark.slow
def test_its_own_policy_stops_what_may_have_slipped_in(work: Path, chromium: str) -> None:
    text = report.render(report.page_of(runs.open_run(str(both_stages(work)))))
    inside = '<main><img src="http://elsewhere.test/a.png"><script src="http://elsewhere.test/a.js"></script>'
    seen = browser.see(chromium, text.replace("<main>", inside))
    assert seen.requests == []
    assert len([line for line in seen.console if "Content Security Policy" in line]) == 2


def test_lines_stand_out_on_a_light_and_on_a_dark_page() -> None:
    for colour in drawing._COLOURS[:2]:  # a page shows one run at a time
        for ground in ("#f6f8fa", "#1d232a"):
            rgb = [f"rgb({int(c[1:3], 16)}, {int(c[3:5], 16)}, {int(c[5:], 16)})" for c in (colour, ground)]
            assert contrast(*rgb) >= 3, (colour, ground)


def test_what_is_missing_is_said_with_the_command_that_makes_it(ambersafe: Ambersafe, work: Path) -> None:
    run = both_stages(work)
    for name in ("samples.json", "evaluation.json"):
        (run / name).unlink()
    (work / "sft_run" / "run.json").write_text("{")
    (work / "sft_run" / "config.yaml").unlink()
    done = ambersafe("report", "dpo_run")
    assert done.returncode == 0, done.stderr
    problems = " ".join(Reader((run / "report.html").read_text()).texts["p"])
    assert "`ambersafe sample dpo_run` makes it" in problems
    assert "`ambersafe evaluate dpo_run` makes it" in problems
    assert "lies in no run that can be read" in problems


def test_a_run_made_by_hand_has_a_page_that_says_what_is_not_known(ambersafe: Ambersafe, work: Path) -> None:
    run = made_runs.by_hand(work / "mine", "dpo", archive=work / "gone" / "LATEST" / "policy.pt")
    done = ambersafe("report", "mine")
    assert done.returncode == 0, done.stderr
    said = " ".join(Reader((run / "report.html").read_text()).texts["p"])
    assert "with what command is not recorded" in said
    assert f"put that into {run / 'train.log'}" in said


def test_a_run_that_was_trained_from_itself_ends(work: Path) -> None:
    run = made_runs.recorded(work / "run", "dpo", archive=str(work / "run" / "LATEST" / "policy.pt"))
    assert len(report.page_of(runs.open_run(str(run))).stages) == 1


def test_advice_on_its_health_is_shown(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = (health.Advice("warning", "a_rule", "It <went> wrong.", "Do this."),)
    monkeypatch.setattr(health, "look", lambda stage, *rest: advice if stage == "dpo" else ())
    page = Reader(report.render(report.page_of(runs.open_run(str(both_stages(work))))))
    assert "It <went> wrong. Do this." in page.texts["p"]
    assert {"class": "warning"} in page.of("p")


def test_it_is_not_written_over_a_page_of_the_users(ambersafe: Ambersafe, work: Path) -> None:
    both_stages(work)
    theirs = work.parents[1] / "page.html"
    theirs.write_text("<p>mine</p>")
    assert ambersafe("report", "dpo_run", "--out", "page.html").returncode == 64
    assert theirs.read_text() == "<p>mine</p>"
    theirs.unlink()
    for _ in range(2):
        report.run("dpo_run", theirs)
    report.run("dpo_run", theirs.parent)
    assert "AmberSafe: dpo_run" in (theirs.parent / "dpo_run.html").read_text()


def damaged(value: Any) -> st.SearchStrategy[Any]:
    """The value with some of what is in it replaced by something else."""
    if isinstance(value, dict):
        inside: st.SearchStrategy[Any] = st.fixed_dictionaries({key: damaged(each) for key, each in value.items()})
    elif isinstance(value, list):
        inside = st.tuples(*map(damaged, value)).map(list)
    else:
        inside = st.just(value)
    return st.one_of(inside, inside, inside, inside, inside, any_json)


@example(sampled=None, evaluated=[])
@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(sampled=damaged(samples("a", "b", "c", "d")), evaluated=damaged(evaluation("dpo", 0.5)))
def test_no_file_of_samples_or_evaluation_is_fatal(tmp_path: Path, sampled: Any, evaluated: Any) -> None:
    (tmp_path / "samples.json").write_text(json.dumps(sampled))
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluated))
    run = runs.Run(tmp_path, {}, "finished")
    found = pages.evaluation([run]), pages.samples(run)
    page = report.Page("title", "summary", [], *found, problems=[])
    assert Reader(report.render(page).encode("utf-8", "replace").decode())


def test_a_name_that_is_no_text_is_shown_as_far_as_it_goes(ambersafe: Ambersafe, work: Path) -> None:
    run = made_runs.recorded(work / "bad\udcff", "sft", made_runs.records("sft", 3))
    done = ambersafe("report", run)
    assert done.returncode == 0, done.stderr
    assert "AmberSafe: bad?" in Reader((run / "report.html").read_text()).texts["title"]


def test_pictures_have_a_size_that_a_page_can_hold() -> None:
    entries = made_runs.records("dpo", 20_000)
    svgs = [
        drawing.inline(panel, drawing.Subject("run", "dpo", of(entries)), "a") for panel in panels.PANELS["dpo"][:1]
    ]
    assert max(map(len, svgs)) < 200_000


def test_without_jinja_it_names_the_extra(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UsageError) as raised:
        report.run(str(both_stages(work)), None)
    assert raised.value.hint == "pip install 'ambersafe-cli[plot]'"

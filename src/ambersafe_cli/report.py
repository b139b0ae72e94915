"""`ambersafe report`: one HTML page of a run and those it was trained from, that asks nothing of any other place."""

from dataclasses import dataclass
from pathlib import Path

from ambersafe_cli import __version__, display, extras, files, pages, plot, runs, show, writing

FILE = "report.html"
MARK = "made by ambersafe-cli"
"""Stands near the beginning of every report, by which it is known as one of ours."""


@dataclass(frozen=True)
class Page:
    """What report.html shows."""

    title: str
    summary: str
    stages: list[pages.Stage]
    evaluation: pages.Part
    samples: pages.Part
    problems: list[str]


def run(name: str | None, out: Path | None) -> None:
    """Write the page of a run, by default the newest, and say where it is.

    Raises UsageError for a run or a place that cannot be used, RunFolderError if it cannot be written.
    """
    extras.require("jinja2", "plot")
    found = runs.open_run(name)
    path = (out or files.place_in(found.folder, FILE)).absolute()
    path = path / f"{found.folder.name}.html" if out and path.is_dir() else path
    # A name that is not UTF-8 has code points of its own in Python, which no page can hold.
    writing.write(path, render(page_of(found)).encode("utf-8", errors="replace"), MARK)
    display.write(str(path))


def page_of(run: runs.Run) -> Page:
    """Gather what there is to say of a run and those it was trained from."""
    drawing = plot.load_drawing()
    found, problems = pages.with_earlier(run)
    return Page(
        title=f"AmberSafe: {run.folder.name}",
        summary=f"Written {show.time(runs.now())} by ambersafe-cli {__version__}.",
        stages=[pages.of_stage(each, f"stage-{number}", drawing) for number, each in enumerate(found, start=1)],
        evaluation=pages.evaluation(found),
        samples=pages.samples(run),
        problems=problems,
    )


def render(page: Page) -> str:
    """The page as HTML. Every value in it is escaped but for the pictures, which are made here."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((Path(__file__).parent / FILE).read_text(encoding="utf-8"))
    return template.render(page=page, mark=MARK)

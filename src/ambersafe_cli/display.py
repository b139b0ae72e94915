"""All that this program prints: prose and progress on stderr, what a script would read on stdout.

It is the one door: a run's record, a log, a row or a model's answer may hold what a terminal takes for commands, and
each function here spells that out; see `printable`.
"""

import contextlib
import json
import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ambersafe_cli.errors import AmberSafeError

if TYPE_CHECKING:
    from rich.console import Console

    from ambersafe_cli.cloning import Progress


_COLUMN = 32
"""How wide a column of text has to be at least."""

_JOINERS = "\u200c\u200d"
"""What Persian, Indian scripts and emoji are written with; of what is not seen the only characters that are shown."""


def _styled(text: str, style: str) -> str:
    return f"\033[{style}m{text}\033[0m" if sys.stderr.isatty() else text


def say(text: str, label: str = "", style: str = "") -> None:
    """A line of prose. A terminal that is gone is no reason to fail: a run's record still has to be written."""
    before = f"{_styled(f'{label}:', style)} " if label else ""
    with contextlib.suppress(OSError):
        print(f"{before}{printable(text)}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """A line about what the user may not have expected."""
    say(text, "note", "33")


def fail(error: AmberSafeError) -> None:
    """What is wrong, and how to mend it."""
    say(error.message, "error", "31")
    if error.hint:
        say(f"  {error.hint}")


def find(level: str, what: str, mend: str) -> None:
    """A finding of preflight: an error or a warning, and what to change."""
    say(what, level, "31" if level == "error" else "33")
    if mend:
        say(f"  {mend}")


def write(text: str) -> None:
    """A line of the answer itself."""
    print(printable(text), flush=True)


def write_part(text: str) -> None:
    """A part of the answer that may end within a line, such as what has come to a log."""
    print(printable(text), end="", flush=True)


def write_json(value: Any) -> None:
    """The answer for a program. What a terminal would take for a command is escaped, as JSON has it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    shown = (f"\\u{ord(c):04x}" if c != "\n" and not _is_shown(c) and ord(c) < 0x10000 else c for c in text)
    print("".join(shown), flush=True)


def _is_shown(character: str) -> bool:
    """Whether a character is one to see: no control character, none that turns the direction of the others or has no
    width."""
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in _JOINERS


def printable(text: str) -> str:
    """A text of others, such as a model's, with all that a terminal could take for a command spelled out, as \\x1b."""
    kept = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(c if c == "\n" or _is_shown(c) else repr(c)[1:-1] for c in kept)


def without_secrets(text: str) -> str:
    """Take the name and the password, and a token behind a question mark, out of every URL; SSH needs a name alone."""
    text = re.sub(r"(\w://[^\s?#]*)[?#]\S*", r"\1", text)
    return re.sub(r"(?<!\bssh)(://)[^/\s]+@|(\bssh://[^/:@\s]+):[^/\s]+(?=@)", r"\1\2", text)


def write_facts(facts: Iterable[tuple[str, str]], indent: int = 12) -> None:
    """The answer as lines of a name and what there is to say, folded between words to the terminal's width.

    A word that is longer than a line, such as a path, stays whole. A name that comes again is not repeated.
    """
    width = shutil.get_terminal_size((80, 24)).columns
    before = ""
    for name, text in facts:
        start = f"{'' if name == before else name:<{indent}}"
        before = name
        write(
            textwrap.fill(
                printable(text),
                width=max(width, 40),
                initial_indent=start,
                subsequent_indent=" " * indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
            or start.rstrip()
        )


def write_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The answer as a table: the first column to the left, the others, if they are numbers, to the right."""
    from rich import box
    from rich.table import Table

    rows = [[printable(cell) for cell in row] for row in rows]
    table = Table(title=printable(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows]
        is_number = index > 0 and all(cell[:1] in "-+.0123456789" for cell in cells)
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    _console(sys.stdout).print(table)


def write_texts(title: str, text: str, parts: Sequence[tuple[str, str]]) -> None:
    """A text and others that belong to it, each with its title: beside each other where the terminal is wide, else one
    below the other. They may be a model's: what a terminal could take for a command is spelled out."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = _console(sys.stdout)

    def write_indented(shown: Text, indent: int) -> None:
        for line in shown.wrap(console, console.width - indent):
            line.rstrip()
            console.print(Text(" " * indent) + line)

    write_indented(Text(printable(title), style="bold"), 0)
    write_indented(Text(printable(text)), 2)
    texts = [(Text(printable(name), style="bold"), Text(printable(content))) for name, content in parts]
    if console.width > 80 and console.width >= _COLUMN * len(texts):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
        for name, _ in texts:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(content for _, content in texts))
        console.print(table)
        return
    for name, content in texts:
        write_indented(name, 2)
        write_indented(content, 4)
    console.print()


def _console(file: Any) -> "Console":
    from rich.console import Console

    return Console(file=file, markup=False, highlight=False, emoji=False)


@contextlib.contextmanager
def progress(title: str) -> Iterator["Progress"]:
    """Show how far a piece of work is: a bar on a terminal; elsewhere a line when a step begins."""
    if not sys.stderr.isatty():
        seen: set[str] = set()

        def line(step: str, done: float) -> None:
            if step not in seen:
                seen.add(step)
                say(f"{title}: {step} …")

        yield line
        return

    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, console=_console(sys.stderr), transient=True) as bar:
        task = bar.add_task(title, total=1.0)

        def advance(step: str, done: float) -> None:
            bar.update(task, description=printable(f"{title}: {step}"), completed=done)

        yield advance

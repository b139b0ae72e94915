"""The live view on a terminal: draws a run once a second while somebody else fills in what is known of it."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ambersafe_cli.following import Following
from ambersafe_cli.view import View

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

EVERY = 1.0
"""Seconds between two pictures. Each takes a few milliseconds of a core, which the training might use."""


def is_possible() -> bool:
    """Whether there is a terminal to draw on: both streams, or a redirected one would lose what upstream prints."""
    return sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "")


def console() -> "Console":
    """The terminal, by standard error: standard output stays for who reads it."""
    from rich.console import Console

    return Console(file=sys.stderr, markup=False, highlight=False, emoji=False)


class _Picture:
    """What rich draws: the lines of the view at the size that the terminal has at that moment."""

    def __init__(self, view: View, lock: threading.Lock) -> None:
        self._view = view
        self._lock = lock

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        with self._lock:
            lines = self._view.lines(options.size.width, options.size.height, time.time())
        for index, line in enumerate(lines):
            line.end = "" if index == len(lines) - 1 else "\n"
            yield line


class _Screen:
    """The terminal's second screen, which the view has while we are in the foreground."""

    def __init__(self, terminal: "Console") -> None:
        self._terminal = terminal
        self._is_aside = False
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Show the first screen while the block runs, and afterwards until we are in the foreground again."""
        with self.lock:
            with contextlib.suppress(OSError, ValueError):
                self._terminal.show_cursor(True)
                self._terminal.set_alt_screen(False)
            self._is_aside = True
            yield

    def is_ours(self) -> bool:
        """Whether the view may be drawn now."""
        with contextlib.suppress(OSError):
            if os.tcgetpgrp(sys.stderr.fileno()) != os.getpgrp():
                return False
        if self._is_aside:
            self._terminal.set_alt_screen(True)
            self._terminal.show_cursor(False)
            self._is_aside = False
        return True


@contextlib.contextmanager
def shown(
    run: Following, footer: str, lock: threading.Lock, update: Callable[[], object]
) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Show a run on the terminal's second screen while the block runs; what was on the first one is there afterwards.

    `update` is called before each picture. Whoever changes `run` holds `lock`. A terminal that goes away ends the view,
    not what is going on in the block. Yields what to enter while this process is stopped.
    """
    from rich.live import Live

    terminal = console()
    picture = _Picture(View(run, footer, ascii_only=_is_ascii(terminal)), lock)
    live = Live(
        picture, console=terminal, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    )
    done = threading.Event()
    screen = _Screen(terminal)

    def draw() -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone
            while not done.is_set():
                update()
                with screen.lock:
                    if screen.is_ours():
                        live.refresh()
                done.wait(EVERY)

    thread = threading.Thread(target=draw, daemon=True)
    try:
        with contextlib.suppress(OSError, ValueError):
            live.start()
        thread.start()
        yield screen.aside
    finally:
        done.set()
        thread.join(timeout=5)
        with contextlib.suppress(OSError, ValueError):
            live.stop()


def summarize(run: Following) -> None:
    """Print the last picture's figures where they stay."""
    terminal = console()
    with contextlib.suppress(OSError, ValueError):
        for line in View(run, ascii_only=_is_ascii(terminal)).summary(terminal.width, time.time()):
            terminal.print(line)


def _is_ascii(terminal: "Console") -> bool:
    return not terminal.encoding.lower().startswith("utf")

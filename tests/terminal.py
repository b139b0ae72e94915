"""A terminal for a command under test: a pty whose screen pyte keeps, as a user would see it."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyte


class Terminal:
    """Runs a command in a terminal of `columns` x `lines`."""

    def __init__(
        self, command: Sequence[str], cwd: Path, columns: int = 80, lines: int = 24, env: dict[str, str] | None = None
    ) -> None:
        self.screen = pyte.HistoryScreen(columns, lines, history=1000)
        self._stream = pyte.ByteStream(self.screen)
        self.received = b""
        self._master, slave = pty.openpty()
        self._set_size(columns, lines)
        environment = {**os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8", **(env or {})}
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
            environment.pop(name, None)

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.child = subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=slave, stdout=slave, stderr=slave, preexec_fn=take_terminal
        )
        os.close(slave)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(lines, columns)
        self._set_size(columns, lines)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def hang_up(self) -> None:
        """Close the terminal's window."""
        os.close(self._master)
        self._master = -1

    def text(self) -> str:
        """What the screen shows, without spaces at the ends of its lines."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    def read(self, seconds: float) -> bool:
        """Take what comes within some time; False if nothing will come any more."""
        if self._master < 0 or not select.select([self._master], [], [], seconds)[0]:
            return self._master >= 0
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux says EIO when the other end is closed
            return False
        # pyte has no second screen: clear the one it has when the program takes it, or leaves it
        for code in (b"\x1b[?1049h", b"\x1b[?1049l"):
            data = data.replace(code, code + b"\x1b[2J\x1b[H")
        self.received += data
        self._stream.feed(data)
        return bool(data)

    def wait_for(self, shows: Callable[[str], Any], seconds: float = 60) -> str:
        """Wait until the screen shows something, and return it."""
        deadline = time.monotonic() + seconds
        while not shows(self.text()):
            assert time.monotonic() < deadline, self.text()
            assert self.read(0.2) or shows(self.text()), self.text()
        return self.text()

    def wait(self, seconds: float = 60, beside: "Terminal | None" = None) -> int:
        """Wait for the command's end, and return its exit status; `beside`: another terminal that is kept going."""
        deadline = time.monotonic() + seconds
        while self.read(0.2) and time.monotonic() < deadline:
            if beside:
                beside.read(0)
            if self.child.poll() is not None:
                while self.read(0.1):
                    if not select.select([self._master], [], [], 0.1)[0]:
                        break
                break
        return self.child.wait(timeout=max(1, deadline - time.monotonic()))

    def close(self) -> None:
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGKILL)
            self.child.wait()
        if self._master >= 0:
            self.hang_up()

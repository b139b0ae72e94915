"""A headless Chromium that sees pages of ours, and says what they asked for.

Its network log tells the requests of a page from the browser's own. None leaves this machine: all go to a proxy here,
which answers those for `http://page.test/` and refuses the others.
"""

import contextlib
import http.server
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOST = "http://page.test"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-features=PreconnectToSearch",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--virtual-time-budget=10000",  # until what a page does at its beginning is done
)
_CONSOLE = re.compile(r"CONSOLE[(:]\d+\)?\] (.*)")

# Measures the page in a frame as wide as a screen; the page's own policy lets no script run in it.
_FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<style>body { margin: 0 }</style>
<iframe id="frame" src="/page.html" style="border: 0; width: %dpx; height: 4000px"></iframe><pre id="found"></pre>
<script>
frame.onload = () => {
  const page = frame.contentDocument;
  const colours = {};
  const names = ["body", ".soft", "a", "dt", "thead th", ".problem", ".warning strong", ".note", "figcaption span"];
  for (const name of names) {
    const element = page.querySelector(name);
    if (!element) continue;
    let ground = element;
    while (ground.parentElement && getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)")
      ground = ground.parentElement;
    colours[name] = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor];
  }
  found.textContent = JSON.stringify({
    title: page.title,
    width: page.scrollingElement.scrollWidth,
    pictures: [...page.querySelectorAll("figure svg")].map((each) => each.getBoundingClientRect().width),
    scripts: page.querySelectorAll("script, img, iframe, object, embed, form, [onerror], [onload]").length,
    text: page.body.innerText,
    colours,
  });
};
</script>"""


@dataclass
class Seen:
    """What a browser made of a page: what that asked for, what the console said, and `found`, measured in the page."""

    requests: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)


def find() -> str | None:
    """The path of a browser, if there is one."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


def see(browser: str, page: str, width: int = 1280, dark: bool = False) -> Seen:
    """Open a page in a window of this width."""
    seen = Seen()
    files = {f"{HOST}/page.html": page, f"{HOST}/frame.html": _FRAME % width}
    with _proxy(files) as port, tempfile.TemporaryDirectory() as profile:
        log = Path(profile, "network.json")
        done = subprocess.run(
            [
                browser,
                *_FLAGS,
                f"--user-data-dir={profile}",
                f"--proxy-server=http://127.0.0.1:{port}",
                "--proxy-bypass-list=<-loopback>",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"--window-size={max(width, 500)},4000",
                f"--log-net-log={log}",
                "--dump-dom",
                f"{HOST}/frame.html",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "HOME": profile},
        )
        seen.requests = [url for url in _requests(log) if url not in (f"{HOST}/page.html", f"{HOST}/")]
    seen.console = _CONSOLE.findall(done.stderr)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found and found[1], f"the browser did not show the page: {done.stderr[-2000:]}"
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", "\xa0").replace("&amp;", "&")
    seen.found = json.loads(text)
    return seen


def _requests(log: Path) -> list[str]:
    """What pages asked for, connections that they had made beforehand included."""
    found = json.loads(log.read_text())
    kinds = {number: name for name, number in found["constants"]["logEventTypes"].items()}
    asked: dict[str, None] = {}
    own = set()
    for event in found["events"]:
        values = event.get("params", {})
        if kinds[event["type"]] in ("URL_REQUEST_START_JOB", "HTTP_STREAM_JOB_CONTROLLER") and "url" in values:
            asked[values["url"]] = None
            if values.get("initiator") == "not an origin":
                own.add(values["url"])
    assert f"{HOST}/page.html" in asked, "the network log has not even the page"
    return [url for url in asked if url not in own]


@contextlib.contextmanager
def _proxy(files: Mapping[str, str]) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            data = files.get(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write((data or "").encode())

        do_GET = do_POST = do_CONNECT = do_HEAD = do_OPTIONS = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def screenshot(browser: str, page: Path, picture: Path, width: int, height: int, dark: bool = False) -> None:
    """Take a picture of a page, for people."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser, *_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={picture}", page.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, capture_output=True, check=True, timeout=120, env={**os.environ, "HOME": profile})

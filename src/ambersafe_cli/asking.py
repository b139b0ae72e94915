"""Ask a child under the training interpreter for something that takes long, and show how far it is."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambersafe_cli import display, environment
from ambersafe_cli.errors import (
    AmberSafeError,
    ArchiveError,
    CloneError,
    DataError,
    ExportError,
    HubError,
    TrainingEnvironmentError,
    UsageError,
)
from ambersafe_cli.processes import end_with_parent

if TYPE_CHECKING:
    from ambersafe_cli.cloning import Progress

_CHILDREN = Path(__file__).parent / "children"

# What a child says is wrong, by the kinds of children/answering.py, and what usually mends it.
_KINDS: Mapping[str, tuple[type[AmberSafeError], str]] = {
    "model": (HubError, "Is it the name of a model on the hub, or the folder of one? Where there is no network, "
                        "`ambersafe prefetch` tells what is in the cache."),
    "checkpoint": (ArchiveError, "`ambersafe show` lists the checkpoints of a run."),
    "data": (DataError, "`ambersafe data` tells what rows hold; --data names others."),
    "clone": (CloneError, "--dir takes another clone; `ambersafe setup` makes one with every patch."),
    "folder": (ExportError, "Make room, or take --out on another disk."),
    "usage": (UsageError, "`ambersafe COMMAND --help` lists what it takes."),
    "memory": (UsageError, "It is too large for the memory of this machine: try --batch-size 1."),
}  # fmt: skip


def ask(
    python: str, script: str, request: Mapping[str, Any], settings: Mapping[str, str], title: str
) -> dict[str, Any]:
    """Have a script of the folder `children` answer a request, with these environment variables; see answering.py.

    The child ends when this process does, however that happens.
    Raises AmberSafeError, of the kind that the child says.
    """
    child = environment.probe(python)
    child.require_packages()
    own = {f"{library}_VERBOSITY": "error" for library in ("HF_HUB", "DATASETS", "TRANSFORMERS")}
    own |= environment.settings_for_gpus() if child.gpus else {}
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}  # it imports its siblings
    with display.progress(title) as progress, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [child.python, str(_CHILDREN / script)],
            env={**inherited, **own, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,  # a Ctrl-C of the terminal reaches us alone, and then the child is killed
            preexec_fn=functools.partial(end_with_parent, os.getpid()),
        )
        try:
            found = _converse(process, request, progress)
        finally:
            _kill(process)
        said.seek(0)
        output = said.read().decode(errors="replace")
    if "answer" in found:
        return dict(found["answer"])
    raise _error(child.python, found.get("error"), process.returncode, output)


def _converse(process: "subprocess.Popen[bytes]", request: Mapping[str, Any], progress: "Progress") -> dict[str, Any]:
    """Send the request, pass on how far it is, and return the last line: empty if the child died before it."""
    assert process.stdin and process.stdout  # noqa: S101, for mypy: both are pipes
    found: dict[str, Any] = {}
    try:
        process.stdin.write(json.dumps(request).encode())
        process.stdin.close()
    except BrokenPipeError:
        return found
    for line in process.stdout:
        try:
            said = json.loads(line)
        except ValueError:  # torn, as the child was killed
            break
        if "step" in said:
            progress(display.printable(said["step"]), said["done"])
        else:
            found = said
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)  # what it has said is all there is
    return found


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the child and whatever it has started; nothing if it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _error(python: str, error: Mapping[str, Any] | None, status: int, output: str) -> AmberSafeError:
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
    if error is None and status == -signal.SIGKILL:
        return UsageError(f"{python} was killed, most likely as the memory is full.", _KINDS["memory"][1])
    if error is None:
        return TrainingEnvironmentError(f"{python} ended with {status}: {display.printable(last)}")
    said = display.printable(error["said"])
    if error["kind"] in _KINDS:
        kind, hint = _KINDS[error["kind"]]
        return kind(said if said.endswith((".", "?")) else f"{said}.", hint)
    return AmberSafeError(f"{python} failed: {said}", "This may be a defect of ambersafe: --debug shows more.")

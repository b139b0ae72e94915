"""How a child that takes long answers: it reads one request as JSON, and writes a line of JSON for each thing to say.

Shared by the scripts of this folder that import it; they run under the training interpreter. A line on stdout is
`{"step": "…", "done": 0.5}` while it works, and the last one `{"answer": …}`, or `{"error": {"kind": …, "said": …}}`.
Whatever else is printed, by upstream's code or a library, goes to stderr.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

Progress = Callable[[str, float], None]


class Problem(Exception):
    """What the user can mend. `kind` is one of model, checkpoint, data, clone, folder, usage, memory."""

    def __init__(self, kind: str, said: str) -> None:
        super().__init__(said)
        self.kind = kind


def innermost(error: BaseException) -> str:
    """What went wrong first, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def answer(work: Callable[[Any, Progress], Any]) -> None:
    """Read the request from stdin, do the work, answer on stdout."""
    request = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def write(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    try:
        write({"answer": work(request, lambda step, done: write({"step": step, "done": done}))})
    except Problem as problem:
        write({"error": {"kind": problem.kind, "said": str(problem)}})
    except BrokenPipeError:  # who asked has gone
        os._exit(1)
    except Exception as error:
        traceback.print_exc()
        is_memory = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
        write({"error": {"kind": "memory" if is_memory else "unexpected", "said": innermost(error)}})

"""What a run.json has to hold for its readers: only the keys that they go by, whatever else is in it."""

import json
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from ambersafe_cli.overrides import LARGEST, is_plain

SCHEMA = 1
"""The version of run.json's layout; see the README. It goes up when a key changes its meaning or goes away."""

STAGES = ("sft", "dpo")

_Check = Callable[[Any], bool]


def parse(text: str) -> Any:
    """Read JSON. Raises ValueError, also for a number that is too long to reckon with, or RecursionError."""

    def whole_number(digits: str) -> int:
        if len(digits) > len(str(LARGEST)):
            raise ValueError(f"a number of {len(digits)} digits")
        return int(digits)

    return json.loads(text, parse_int=whole_number)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _for_the_system(value: Any) -> bool:
    """Whether the value can be a path or an argument of a command."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_for_the_system, value))


def _of_ours(value: Any) -> bool:
    """Whether the value is a command of this program: it is shown for users to type."""
    return _words(value) and value[0] == "ambersafe"


def _settings(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _for_the_system(name) and name and "=" not in name and _for_the_system(text) for name, text in value.items()
    )


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _list(value: Any) -> bool:
    return isinstance(value, list)


def _from(least: int) -> _Check:
    """Whether the value is a whole number, this one or a larger one."""
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def _attempts(value: Any) -> bool:
    texts = ("started", "ended", "host", "from", "slurm_job")
    return isinstance(value, list) and all(
        isinstance(each, dict) and all(isinstance(each.get(key), str | None) for key in texts) for each in value
    )


def _machines(value: Any) -> bool:
    """Whether the value is what machines.Machines has, and nothing else."""
    checks = {"count": _from(1), "restarts": _from(0), "patience": _from(1)}
    checks["number"] = lambda number: type(number) is int and number == 0  # machine 0 keeps the record
    checks["endpoint"] = lambda endpoint: endpoint is None or _for_the_system(endpoint)
    return isinstance(value, dict) and all(key in checks and checks[key](each) for key, each in value.items())


_NEEDED: Mapping[str, _Check] = {
    "stage": lambda value: value in STAGES,
    "status": _text,
    "started": _text,
    "attempts": _attempts,
    "command": _words,
    "environment": _settings,
    "next_command": _of_ours,
    "model": _mapping,
    "model.name": _text,
    "model.revision": _text_or_none,
    "data": _mapping,
    "upstream": _mapping,
    "upstream.folder": lambda value: _for_the_system(value) and value != "",
    "upstream.head": lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{40}", value)),
    "upstream.edited": _list,
    "upstream.can_resume": lambda value: isinstance(value, bool),
}

# What may be absent or null, in records of runs that have not ended or of other versions.
_KINDS: Mapping[str, _Check] = {
    "ended": _text,
    "exit_status": lambda value: isinstance(value, int),
    "recipe": _mapping,
    "values": lambda value: isinstance(value, dict) and all(map(is_plain, value.values())),
    "overrides": lambda value: isinstance(value, list) and all(map(_for_the_system, value)),
    "last_metrics": lambda value: (
        isinstance(value, dict) and all(isinstance(each, int | float | None) for each in value.values())
    ),
    "planned_examples": _from(0),
    "processes": lambda value: _from(1)(value) and value <= 1 << 20,  # or torchrun would try to start them
    "machines": _machines,
    "archive": _for_the_system,
    "sft_run": _for_the_system,
    "model.commit": _text,
    **dict.fromkeys(("data.name", "data.revision", "data.commit"), _for_the_system),
    **dict.fromkeys(("archive_fingerprint", "checkpoint_fingerprint", "upstream.edits"), _text),
    "data.counts": lambda value: isinstance(value, dict) and all(map(_mapping, value.values())),
    **dict.fromkeys(("data.fingerprint", "upstream.patches"), _mapping),
    **dict.fromkeys(("python", "machine", "variables", "working_folder_git"), _mapping),
    **dict.fromkeys(("upstream.on_top", "upstream.series"), _list),
    "slurm": lambda value: isinstance(value, dict) and all(_from(1)(value.get(key)) for key in ("nodes", "processes")),
    "slurm.job_id": lambda value: isinstance(value, str) and bool(re.fullmatch(r"\d+(_\d+)?", value)),
}


def problem(value: Any) -> str | None:
    """Why a value from JSON is no record of a run, in words that go behind the file's name; None if it is one."""
    if not isinstance(value, dict):
        return f"holds a {type(value).__name__}, not an object"
    if value.get("schema") != SCHEMA:
        return f"is of schema {reprlib.repr(value.get('schema'))}, and this version of ambersafe reads {SCHEMA}"
    for key, check in _NEEDED.items():
        if not check(_at(value, key)):
            return f"has a {key!r} that is missing or malformed"
    for key, check in _KINDS.items():
        if (found := _at(value, key)) is not None and not check(found):
            return f"has a {key!r} that is malformed: {reprlib.repr(found)}"
    return None


def _at(record: Any, key: str) -> Any:
    """What a record has at a key, whose dots lead into the mappings in it; None where there is nothing."""
    for part in key.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record

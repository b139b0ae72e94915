"""What a run.json has to hold for its readers: only the keys that they go by, whatever else is in it."""

import os
from collections.abc import Callable, Mapping
from typing import Any

SCHEMA = 1
"""The version of run.json's layout; see the README. It goes up when a key changes its meaning or goes away."""

_Check = Callable[[Any], bool]


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


def _settings(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _for_the_system(name) and name and "=" not in name and _for_the_system(text) for name, text in value.items()
    )


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


_NEEDED: Mapping[str, _Check] = {
    "stage": _text,
    "status": _text,
    "started": _text,
    "attempts": _objects,
    "command": _words,
    "environment": _settings,
    "next_command": _words,
    "model": lambda value: isinstance(value, dict),
    "model.name": _text,
    "model.revision": _text_or_none,
    "data": lambda value: isinstance(value, dict),
    "upstream": lambda value: isinstance(value, dict),
    "upstream.folder": lambda value: _for_the_system(value) and value != "",
    "upstream.head": _text,
    "upstream.edited": lambda value: isinstance(value, list),
    "upstream.can_resume": lambda value: isinstance(value, bool),
}


# What may be absent or null, in records of runs that have not ended or of other versions.
_KINDS: Mapping[str, type] = {"ended": str, "recipe": dict, "values": dict, "overrides": list, "last_metrics": dict}


def problem(value: Any) -> str | None:
    """Why a value from JSON is no record of a run, in words that go behind the file's name; None if it is one."""
    if not isinstance(value, dict):
        return f"holds a {type(value).__name__}, not an object"
    if value.get("schema") != SCHEMA:
        return f"is of schema {value.get('schema')!r:.40}, and this version of ambersafe reads {SCHEMA}"
    for key, check in _NEEDED.items():
        found: Any = value
        for part in key.split("."):
            found = found.get(part)
        if not check(found):
            return f"has a {key!r} that is missing or malformed"
    for key, kind in _KINDS.items():
        if not isinstance(value.get(key), kind | None):
            return f"has a {key!r} that is malformed"
    return None

"""Hydra's override grammar, as far as a launcher needs it: KEY=VALUE in both directions.

Grammar: https://hydra.cc/docs/advanced/override_grammar/basic/. What is written here is checked in the tests against
Hydra's own parser.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from ambersafe_cli.errors import UsageError

Value = str | int | float | bool | None | list["Value"]

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_WORDS_WITH_A_MEANING = {"null", "true", "false", "nan", "inf"}
_OVERRIDE = re.compile(r"(?P<prefix>\+\+|\+|~)?(?P<key>[A-Za-z_][\w./@-]*)(?:=(?P<value>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Override:
    """A KEY=VALUE of the user's: `text` goes to train.py as it stands, `value` is what Hydra will make of it, if that
    is a plain one, or a list of them (else None)."""

    text: str
    key: str
    value: Value


class _Loader(yaml.SafeLoader):
    """YAML in which 5e-7 is a number, as it is for Hydra; for PyYAML it lacks a dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str) -> object:
    """Read a YAML document with Hydra's idea of a number. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506, it is a SafeLoader


def quote(value: Value) -> str:
    """Write a value so that Hydra reads exactly that value back. Raises UsageError for a text that holds `${`."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case list():
            return f"[{','.join(quote(item) for item in value)}]"
    if "${" in value:
        raise UsageError(
            f"{value!r} holds '${{', which upstream's config always takes for a reference to another key.",
            "Rename the file or folder, or make a symbolic link to it.",
        )
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS_WITH_A_MEANING:
        return value
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)  # backslashes count only in front of a quote
    escaped = re.sub(r"(\\+)\Z", r"\1\1", escaped)
    return f"'{escaped}'"


def assign(key: str, value: Value) -> str:
    """Write KEY=VALUE for Hydra."""
    return f"{key}={quote(value)}"


def parse_overrides(texts: Sequence[str]) -> tuple[Override, ...]:
    """Read what stands behind a command's flags. Raises UsageError for what is no KEY=VALUE."""
    return tuple(_parse(text) for text in texts)


def _parse(text: str) -> Override:
    match = _OVERRIDE.fullmatch(text)
    if not match or (match["value"] is None) != (match["prefix"] == "~"):
        raise UsageError(
            f"{text!r} is neither a flag nor KEY=VALUE.",
            "What stands behind the flags goes to train.py as a Hydra override, e.g. warmup_steps=50.",
        )
    return Override(text, match["key"], _read_value(match["value"] or ""))


def _read_value(text: str) -> Value:
    """Read a number, a word or a quoted text as Hydra does; or a list of them; None for null and all else."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return re.sub(rf"(\\+)(?={text[0]}|\Z)", lambda m: "\\" * (len(m[1]) // 2), text[1:-1])
    try:
        value = read_yaml(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, bool) and text.lower() not in ("true", "false"):
        return text  # yes, no, on and off are words for Hydra
    is_list = isinstance(value, list) and all(isinstance(item, str | int | float | bool) for item in value)
    return value if isinstance(value, str | int | float | bool) or is_list else None  # type: ignore[return-value]

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

LARGEST = 2**63 - 1
"""The largest whole number: beyond it arithmetic with floats, or printing it, may fail."""

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
    """YAML in which 5e-7 is a number and a date a text, as for Hydra, and which holds nothing that JSON has not.

    A list or mapping stands in it once: aliases of aliases of them could come to any size, or to no end.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.composer.ComposerError(None, None, "an alias of a list or mapping", alias.start_mark)
        return node


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    found = loader.construct_yaml_int(node)
    if not -LARGEST <= found <= LARGEST:
        raise yaml.constructor.ConstructorError(None, None, "a number of more than 64 bits", node.start_mark)
    return found


_Loader.yaml_implicit_resolvers = {
    first: [each for each in found if each[0] != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
for _tag in ("timestamp", "binary", "set", "omap", "pairs"):
    del _Loader.yaml_constructors[f"tag:yaml.org,2002:{_tag}"]


def read_yaml(text: str) -> object:
    """Read a YAML document with Hydra's idea of a number. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506, it is a SafeLoader
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error  # PyYAML's own slips, as for !!int ""


def is_plain(value: object) -> bool:
    """Whether a setting can have this value: a text, number, truth value or null, or a list of them."""
    if isinstance(value, list):
        return all(not isinstance(each, list) and is_plain(each) for each in value)
    return isinstance(value, str | float | None) or (isinstance(value, int) and -LARGEST <= value <= LARGEST)


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

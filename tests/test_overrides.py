"""KEY=VALUE in both directions, against Hydra's own parser and against what upstream does with the config."""

from typing import Any, cast

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ambersafe_cli.errors import UsageError
from ambersafe_cli.overrides import Value, assign, parse_overrides, quote, read_yaml

hydra = OverridesParser.create()
# Surrogates cannot be an argument of a process, nor can the character 0.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
awkward = st.text(st.sampled_from(list("'\"\\=,[]{}()$:#~+@ é\n\tab1.-")))


def read_by_upstream(override: str) -> Value:
    """What train.py sees: parsed by Hydra, resolved once by upstream's main(), then read."""
    parsed = hydra.parse_override(override)
    config = OmegaConf.create({parsed.key_or_group: parsed.value()})
    OmegaConf.resolve(config)
    plain: Any = OmegaConf.to_container(config)
    return cast("Value", plain[parsed.key_or_group])


@given(st.one_of(texts, awkward).filter(lambda text: "${" not in text))
@example("/a b=c/política, 'x' \"y\" {z}/policy.pt")
@example("null")
@example("1e3")
@example("True")
@example("\\")
def test_a_text_arrives_as_it_is(text: str) -> None:
    assert read_by_upstream(assign("key", text)) == text


@given(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none()))
def test_a_plain_value_arrives_as_it_is(value: Value) -> None:
    arrived = read_by_upstream(assign("key", value))
    assert arrived == value
    assert type(arrived) is type(value)


@given(st.lists(awkward.filter(lambda text: "${" not in text), max_size=3))
def test_a_list_arrives_as_it_is(values: list[Value]) -> None:
    assert read_by_upstream(assign("key", values)) == values


def test_what_upstream_would_take_for_a_reference_is_refused() -> None:
    with pytest.raises(UsageError, match="reference to another key"):
        quote("/data/${USER}/policy.pt")


@given(st.one_of(awkward, st.integers().map(str), st.floats(allow_nan=False, allow_infinity=False).map(str)))
@example("\\")
@example("\\\n")
def test_a_quoted_override_is_read_as_hydra_reads_it(text: str) -> None:
    if "${" not in text:
        override = assign("key", text)
        assert parse_overrides([override])[0].value == hydra.parse_override(override).value()


@pytest.mark.parametrize(
    "written",
    ["5", "-3", "5e-7", "0.1", "1.5e5", "true", "False", "yes", "on", "abc", "a.b/c", "'a b'", '"x=y"', "2E3"],
)
def test_a_bare_override_is_read_as_hydra_reads_it(written: str) -> None:
    expected = hydra.parse_override(f"key={written}").value()
    found = parse_overrides([f"key={written}"])[0].value
    assert found == expected
    assert type(found) in (type(expected), str)


@pytest.mark.parametrize("text", ["loss.beta=0.1", "+new.key=1", "++new.key=", "~optimizer", "model@x=y", "a/b=c"])
def test_what_hydra_takes_is_passed_on_as_it_stands(text: str) -> None:
    assert parse_overrides([text])[0].text == text


@pytest.mark.parametrize("text", ["loss.beta", "=1", "0.1", "--", "a b=1", "-m", "", "+x"])
def test_what_is_no_override_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="neither a flag nor KEY=VALUE"):
        parse_overrides([text])


def test_yaml_reads_an_exponent_without_a_dot_as_a_number() -> None:
    assert read_yaml("lr: 5e-7") == {"lr": 5e-7}
    assert yaml.safe_load("lr: 5e-7") == {"lr": "5e-7"}, "PyYAML itself now does: our loader can go"

"""What is made of log-probabilities, on hand-made numbers, and how answers of models come to a terminal."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambersafe_cli import display, evaluate, figures, models, runs, sample
from ambersafe_cli.errors import ArchiveError

# Of three prompts: chosen and rejected by tokens, by the policy and by the reference.
PAIRS = [
    figures.Pair(0, ("Theft",), (10, 5), (-20.0, -15.0), (-26.0, -16.0)),  # likelier per token only; margin 5
    figures.Pair(0, ("Theft", "Drugs"), (4, 4), (-8.0, -9.0), (-8.0, -8.0)),  # likelier both ways; margin 1
    figures.Pair(1, ("Theft",), (2, 8), (-6.0, -16.0), (-5.0, -16.0)),  # likelier in total only; margin -1
    figures.Pair(2, (), (3, 3), (-9.0, -9.0), (-7.0, -7.0)),  # a tie both ways
    figures.Pair(2, (), (9, 3), (-9.0, -6.0), (-9.0, -6.0)),  # likelier per token only; margin 0
]


def test_figures_are_those_that_a_hand_gets() -> None:
    found = figures.of(PAIRS, beta=0.5)
    assert {name: each.value for name, each in found.items()} == {
        "safe_more_likely": 0.4,
        "safe_more_likely_per_token": 0.6,
        "reward_accuracy": 0.4,
        "reward_margin": 0.5 * (5 + 1 - 1 + 0 + 0) / 5,
    }
    assert {(each.pairs, each.prompts) for each in found.values()} == {(5, 3)}
    assert found.keys() <= figures.TITLES.keys()


def test_without_a_reference_there_is_no_reward() -> None:
    bare = [figures.Pair(0, (), (1, 1), (-1.0, -2.0), None)]
    assert {name: (each.value, each.low) for name, each in figures.of(bare, 0.1).items()} == {
        "safe_more_likely": (1.0, None),
        "safe_more_likely_per_token": (1.0, None),
    }


def test_a_pair_counts_in_each_of_its_categories_and_the_largest_comes_first() -> None:
    found = figures.by_category(PAIRS, 0.5)
    assert [(name, each["reward_accuracy"].pairs) for name, each in found.items()] == [("Theft", 3), ("Drugs", 1)]
    assert found["Theft"]["reward_accuracy"].value == pytest.approx(2 / 3)
    assert found["Theft"]["reward_accuracy"].prompts == 2


def test_metrics_beside_upstreams_are_of_the_same_examples() -> None:
    examples = [(-20.0, -15.0, -26.0, -16.0), (-6.0, -16.0, -5.0, -16.0)]
    upstream = {
        "rewards_eval/accuracies": 0.5,
        "rewards_eval/margins": 1.0,
        "rewards_eval/chosen": 1.25,
        "rewards_eval/rejected": 0.25,
        "logps_eval/chosen": -13.0,
        "logps_eval/rejected": -15.5,
        "loss/eval": 0.7,
    }
    found = figures.compare(upstream, "dpo", examples, beta=0.5)
    assert {each.metric: each.here for each in found} == {k: v for k, v in upstream.items() if k != "loss/eval"}
    assert all(each.agrees for each in found)
    assert [e.metric for e in figures.compare(upstream, "dpo", examples, None)] == [
        "logps_eval/chosen",
        "logps_eval/rejected",
    ]
    sft = figures.compare({"loss/eval": 13.01, "logps_eval/chosen": -13.0}, "sft", [(-20.0,), (-6.0,)], None)
    assert {each.metric: each.agrees for each in sft} == {"logps_eval/chosen": True, "loss/eval": False}


@pytest.mark.parametrize(
    ("upstream", "here", "agrees"),
    [(3.5009, 3.50086, True), (3.5009, 3.5015, False), (-223.99, -224.0, True), (0.0, 4e-6, True), (0.0, 1e-3, False)],
)
def test_two_figures_agree_to_four_digits(upstream: float, here: float, agrees: bool) -> None:
    assert figures.Comparison("", upstream, here).agrees == agrees


def test_weights_that_give_nan_are_refused() -> None:
    weights = models.of_model("org/model", None)
    broken = [*PAIRS, figures.Pair(3, (), (1, 1), (-1.0, -1.0), (math.nan, -1.0))]
    with pytest.raises(ArchiveError, match="the reference, model, gives 1 of 6 pairs"):
        evaluate._require_finite(broken, weights, weights)


@pytest.mark.parametrize(
    ("place", "limit", "kept"), [("LATEST", None, True), ("LATEST", 9, False), ("step-8", None, False)]
)
def test_only_final_weights_on_all_pairs_are_kept_in_the_run(
    place: str, limit: int | None, kept: bool, tmp_path: Path
) -> None:
    run = runs.Run(tmp_path, {}, "finished")
    weights = replace(models.of_model("org/model", None), run=run, checkpoint=tmp_path / place / "policy.pt")
    (tmp_path / "evaluation.json").write_text("earlier")
    request = evaluate.Request("", None, None, None, None, "test", limit, 8, None, None, None, False, None, "python")
    evaluate._keep(request, weights, {"é": 1})
    assert ((tmp_path / "evaluation.json").read_text() == '{\n  "é": 1\n}\n') == kept
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


# --- on a terminal ---


@given(st.text())
def test_nothing_of_a_text_can_command_a_terminal(text: str) -> None:
    shown = set(display.printable(text)) - {"\n"}
    assert not {c for c in shown if ord(c) < 32 or 127 <= ord(c) < 160 or 0x2028 <= ord(c) <= 0x202E}
    assert shown >= {c for c in text if c.isalnum()}


def test_escape_sequences_are_spelled_out() -> None:
    assert display.printable("a\x1b]0;x\x07b\x9b2J\r\nc\rd\te\u202ef") == "a\\x1b]0;x\\x07b\\x9b2J\nc\\rd    e\\u202ef"


def test_json_holds_every_character_and_none_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"text": "\x1b[2J \x9b2J \u202e é 日 \ud800 \n"}
    display.write_json(value)
    printed = capsys.readouterr().out
    assert json.loads(printed) == value
    assert "é 日" in printed
    assert not set(printed) & set("\x1b\x9b\u202e\ud800")


def samples(*texts: str) -> list[dict[str, Any]]:
    answers = [{"label": f"model{i}", "text": text, "stopped": True} for i, text in enumerate(texts)]
    return [{"prompt": "How?", "answers": answers}]


@pytest.mark.parametrize(("columns", "beside"), [(80, False), (120, True), (40, False)])
def test_answers_stand_beside_each_other_where_there_is_room(
    columns: int, beside: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    sample.show(samples("one \x1b[2J " * 20, "two " * 30, ""))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert any("model0" in line and "model2" in line for line in lines) == beside
    assert "\\x1b[2J" in "".join(lines)
    assert any("(nothing)" in line for line in lines)
    assert beside or all(line == line.rstrip() for line in lines)


def test_an_answer_that_was_cut_off_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    cut = samples("It goes on")
    cut[0]["answers"][0]["stopped"] = False
    sample.show(cut)
    assert "It goes on …" in capsys.readouterr().out


def test_models_that_are_called_alike_get_labels_of_their_own(tmp_path: Path) -> None:
    found = sample.labelled([models.of_model(name, None) for name in ("a/model", "b/model", "a/other", "a/model")])
    labels = [each.label for each in found]
    assert len(set(labels)) == 4
    assert labels[1:3] == ["b/model", "other"]

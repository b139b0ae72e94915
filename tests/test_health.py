"""The rules of health.py on recordings of real runs: every bad one is told, no healthy one is warned of."""

import gzip
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambersafe_cli import curves, health, metrics

CURVES = Path(__file__).parent / "curves"
HEALTHY = sorted(path.name.removesuffix(".log.gz") for path in (CURVES / "healthy").glob("*.log.gz"))
BAD = {
    "dpo-diverging": {"loss-rising", "likelihood-falling", "margins-falling"},
    "dpo-labels-at-random": {"accuracy-at-chance", "held-out-loss-rising"},
    "dpo-labels-at-random-slow": {"accuracy-at-chance"},
    "dpo-labels-swapped": {"loss-rising", "margins-falling"},
    "dpo-lr-too-high": {"loss-rising", "gradients-exploding", "likelihood-falling"},
    "dpo-lr-too-small": {"nothing-moves"},
    "dpo-lr-zero": {"nothing-moves"},
    "dpo-memorized": {"held-out-accuracy-low"},
    "dpo-over-trained": {"held-out-accuracy-low"},
    "sft-diverging": {"loss-rising", "gradients-exploding"},
    "sft-lr-too-high": {"loss-rising"},
    "sft-lr-too-small": {"nothing-moves"},
    "sft-not-a-number": {"loss-not-finite"},
    "sft-over-trained": {"held-out-loss-rising"},
}
"""What each bad recording must be told of, at some moment of the run."""

Recording = tuple[str, list[metrics.Record], list[metrics.Record]]


def recording(name: str) -> Recording:
    """The stage, steps and evaluations of a recording."""
    (path,) = CURVES.glob(f"*/{name}.log.gz")
    lines = curves.Curves()
    with gzip.open(path, "rt") as file:
        for found in metrics.parse(file):
            if not isinstance(found, metrics.Commit):
                lines.add(found)
    return "sft" if name.startswith("sft") else "dpo", lines.steps, lines.evaluations


def seen_while_running(name: str, thinning: int = 1) -> list[tuple[float, health.Advice]]:
    """All advice that a run would have been given at forty moments of it, and when, as a part of the run."""
    stage, steps, evaluations = recording(name)
    planned = steps[-1].examples
    steps = [curves.mean(steps[i : i + thinning]) for i in range(0, len(steps), thinning)]
    found = []
    for moment in range(1, 41):
        far = steps[: max(1, len(steps) * moment // 40)]
        done = [each for each in evaluations if each.examples <= far[-1].examples or moment == 40]
        found += [(moment / 40, advice) for advice in health.look(stage, far, done, planned)]
    return found


def test_there_are_recordings_of_every_kind() -> None:
    assert {path.name.removesuffix(".log.gz") for path in (CURVES / "bad").glob("*.log.gz")} == set(BAD)
    assert len(HEALTHY) >= 8
    assert any(name.startswith("sft") for name in HEALTHY)
    assert "dpo-resumed" in HEALTHY


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("thinning", [1, 2, 4])
def test_a_healthy_run_is_never_warned_of_while_it_runs_or_at_its_end(name: str, thinning: int) -> None:
    warnings = {(when, a.rule) for when, a in seen_while_running(name, thinning) if a.level == "warning"}
    assert warnings == set()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_run_is_told_what_is_bad(name: str) -> None:
    found = {advice.rule for _, advice in seen_while_running(name) if advice.level == "warning"}
    assert found >= BAD[name]


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_is_told_at_the_end_too(name: str) -> None:
    stage, steps, evaluations = recording(name)
    assert any(advice.level == "warning" for advice in health.look(stage, steps, evaluations, steps[-1].examples))


def test_every_warning_is_fired_by_a_recording() -> None:
    written = re.findall(r'"warning",\s+"([a-z-]+)"', Path(health.__file__).read_text().partition("def look")[2])
    assert set(written) == {rule for rules in BAD.values() for rule in rules}


def test_falling_rewards_are_said_to_be_expected() -> None:
    notes = [advice for _, advice in seen_while_running("dpo-demo") if advice.rule == "rewards-falling-together"]
    assert notes
    assert all(advice.level == "note" and "expected" in advice.mend and "issue 32" in advice.mend for advice in notes)


@pytest.mark.parametrize("name", BAD)
def test_each_advice_says_what_helps(name: str) -> None:
    for _, advice in seen_while_running(name):
        assert advice.what.endswith(".")
        assert advice.mend.endswith(".")
        assert "--" in advice.mend or "=" in advice.mend


_VALUES = st.dictionaries(
    st.sampled_from(["loss/train", "loss/eval", "grad_norm", "counters/updates"])
    | st.sampled_from([f"rewards_{a}/{b}" for a in ("train", "eval") for b in ("accuracies", "margins", "chosen")]),
    st.floats() | st.just(math.nan) | st.just(0.0),
)
_RECORDS = st.lists(st.builds(metrics.Record, st.just("train"), st.integers(0, 10**9), _VALUES), max_size=60)


@given(st.sampled_from(["sft", "dpo"]), _RECORDS, _RECORDS, st.none() | st.integers(1, 10**9))
def test_no_values_are_fatal(
    stage: str, train: list[metrics.Record], evals: list[metrics.Record], planned: int | None
) -> None:
    train.sort(key=lambda each: each.examples)
    for advice in health.look(stage, train, evals, planned):
        assert advice.level in ("warning", "note")

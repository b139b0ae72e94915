"""What is said about a run's curves: on recordings of real runs, made by scripts/record-curves."""

import gzip
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from ambersafe_cli import curves, health, metrics

RECORDINGS = Path(__file__).with_name("curves")
HEALTHY = sorted(path.name.removesuffix(".log.gz") for path in RECORDINGS.glob("healthy/*.log.gz"))

# What each bad run has to be told when it has ended, and in which part of it the first of these is said at the latest.
BAD = {
    "dpo-diverging": ({"loss-rising", "likelihood-falling"}, 0.4),
    "dpo-labels-at-random": ({"accuracy-at-chance"}, 0.4),
    "dpo-labels-at-random-slow": ({"accuracy-at-chance"}, 0.4),
    "dpo-labels-swapped": ({"margins-falling", "loss-rising"}, 0.9),  # swapped at 0.75
    "dpo-lr-too-high": ({"loss-rising", "likelihood-falling"}, 0.4),
    "dpo-lr-too-small": ({"nothing-moves"}, 0.4),
    "dpo-lr-zero": ({"nothing-moves"}, 0.7),  # its first 15 steps are too few
    "dpo-memorized": ({"held-out-accuracy-low"}, 0.5),
    "dpo-over-trained": ({"held-out-accuracy-low"}, 0.3),
    "sft-diverging": ({"loss-rising", "gradients-exploding"}, 0.7),  # the learning rate rises for all of the run
    "sft-lr-too-high": ({"loss-rising"}, 0.6),
    "sft-lr-too-small": ({"nothing-moves"}, 0.75),  # it is evaluated at 0.68
    "sft-not-a-number": ({"loss-not-finite"}, 0.2),
    "sft-over-trained": ({"held-out-loss-rising"}, 0.8),
}
WARNINGS = {
    "accuracy-at-chance", "gradients-exploding", "held-out-accuracy-low", "held-out-loss-rising", "likelihood-falling",
    "loss-not-finite", "loss-rising", "margins-falling", "nothing-moves",
}  # fmt: skip

Records = Sequence[metrics.Record]


@cache
def recording(name: str) -> tuple[str, Records, Records]:
    """The stage of a recording, its training records and its evaluations."""
    read = curves.Curves()
    with gzip.open(RECORDINGS / f"{name}.log.gz", "rt") as lines:
        for each in metrics.parse(line.rstrip("\n") for line in lines):
            assert isinstance(each, metrics.Record)
            read.add(each)
    stage = "dpo" if "rewards_train/chosen" in read.train[0].values else "sft"
    return stage, read.train, read.evaluations


def look(name: str, steps: int | None = None, thinned: int = 1, planned: bool = True) -> tuple[health.Advice, ...]:
    """What is said of a recording after so many steps; all of them if not given."""
    stage, train, evals = recording(name)
    done = train[:steps]
    if len(done) < len(train):
        evals = [each for each in evals if each.examples < done[-1].examples]
    points = [curves.mean(list(done[at : at + thinned])) for at in range(0, len(done), thinned)]
    return health.look(stage, points, evals, train[-1].examples if planned else None)


def warnings(found: Sequence[health.Advice]) -> set[str]:
    return {advice.rule for advice in found if advice.level == "warning"}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_run_is_told_what_is_wrong(name: str) -> None:
    rules, latest = BAD[name]
    found = look(f"bad/{name}")
    assert rules <= warnings(found)
    assert all(advice.what.endswith(".") and advice.mend.endswith(".") for advice in found)
    assert all("--" in advice.mend or "=" in advice.mend for advice in found)
    train = recording(f"bad/{name}")[1]
    first = next(steps for steps in range(1, len(train) + 1) if rules & warnings(look(f"bad/{name}", steps)))
    assert train[first - 1].examples / train[-1].examples <= latest


def test_there_are_healthy_recordings_of_every_kind() -> None:
    assert len(HEALTHY) >= 8
    assert any(name.startswith("sft") for name in HEALTHY)
    assert {"ipo", "dpo-resumed", "dpo-few-rows", "dpo-three-epochs"} <= set(HEALTHY)
    assert {each.attempt for each in recording("healthy/dpo-resumed")[1]} == {1, 2}


def test_every_warning_has_a_recording_of_its_own() -> None:
    assert set().union(*(rules for rules, _ in BAD.values())) == WARNINGS
    assert {f"bad/{name}" for name in BAD} == {
        f"bad/{path.name.removesuffix('.log.gz')}" for path in RECORDINGS.glob("bad/*.log.gz")
    }


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("planned", [True, False])
def test_a_healthy_run_is_never_warned_however_far_it_has_come(name: str, planned: bool) -> None:
    steps = range(1, len(recording(f"healthy/{name}")[1]) + 1)
    assert {each: warnings(look(f"healthy/{name}", each, planned=planned)) for each in steps} == {
        each: set() for each in steps
    }


@pytest.mark.parametrize("thinned", [2, 4, 8])
def test_it_says_the_same_of_means_of_neighbouring_steps(thinned: int) -> None:
    looked_at = 0
    for name in [f"healthy/{each}" for each in HEALTHY] + [f"bad/{each}" for each in BAD]:
        wanted = BAD[Path(name).name][0] if name.startswith("bad") else set()
        if len(recording(name)[1]) < health.FEWEST * thinned:
            continue  # too few are left to say anything
        looked_at += 1
        found = warnings(look(name, thinned=thinned))
        assert wanted <= found if wanted else not found, name
    assert looked_at >= 4


def test_rewards_that_fall_together_are_expected() -> None:
    (note,) = (advice for advice in look("healthy/dpo-demo") if advice.rule == "rewards-falling-together")
    assert note.level == "note"
    assert "expected" in note.mend
    assert "issue 32" in note.mend


def test_notes_come_last() -> None:
    levels = [advice.level for advice in look("bad/dpo-memorized")]
    assert levels == ["warning", "note"]


def test_pairs_that_are_all_told_apart_are_noted() -> None:
    assert "nothing-left-to-learn" in {advice.rule for advice in look("bad/dpo-over-trained")}


def test_the_first_batch_that_is_no_number_is_named_and_nothing_else() -> None:
    (advice,) = look("bad/sft-not-a-number")
    train = recording("bad/sft-not-a-number")[1]
    first = next(each.examples for each in train if math.isnan(each.values["loss/train"]))
    assert f" {first} examples" in advice.what


def test_before_a_third_of_the_run_accuracy_is_not_judged() -> None:
    stage, train, evals = recording("bad/dpo-labels-at-random-slow")
    assert "accuracy-at-chance" not in warnings(health.look(stage, train, evals, train[-1].examples * 4))


def test_a_run_of_unknown_length_is_judged_after_three_warm_ups() -> None:
    stage, train, evals = recording("bad/dpo-lr-too-small")
    assert not health.look(stage, train, evals, None)
    later = [each._replace(values={**each.values, "counters/updates": 450}) for each in train]
    assert warnings(health.look(stage, later, evals, None)) == {"nothing-moves"}


@pytest.mark.parametrize("at", [-1, -2, -30])
def test_one_batch_with_a_large_gradient_is_not_an_explosion(at: int) -> None:
    stage, train, evals = recording("healthy/dpo-noisy-labels")
    spiked = list(train)
    spiked[at] = spiked[at]._replace(values={**spiked[at].values, "grad_norm": 1e4})
    assert not warnings(health.look(stage, spiked, evals, None))


@pytest.mark.parametrize(("factor", "warned"), [(3, set()), (10, {"gradients-exploding"})])
def test_gradients_explode_if_they_grow_many_times(factor: float, warned: set[str]) -> None:
    stage, train, evals = recording("healthy/dpo-noisy-labels")
    grown = [
        each._replace(values={**each.values, "grad_norm": each.values["grad_norm"] * (factor if at > 60 else 1)})
        for at, each in enumerate(train)
    ]
    assert warnings(health.look(stage, grown, evals, None)) == warned


def test_fewer_than_sixteen_records_are_not_judged() -> None:
    stage, train, evals = recording("bad/dpo-lr-zero")
    assert not health.look(stage, train[:15], evals, train[14].examples)
    assert health.look(stage, train[:16], evals, train[15].examples)


def test_a_reason_is_said_once() -> None:
    """With a learning rate of 0 the accuracy is 0 too, as no reward is above another."""
    assert {advice.rule for advice in look("bad/dpo-lr-zero")} == {"nothing-moves"}


@pytest.mark.parametrize("value", [1e308, -1e308, 1e200])
def test_values_whose_squares_are_no_floats_are_survived(value: float) -> None:
    stage, train, evals = recording("healthy/dpo-demo")
    huge = [each._replace(values=dict.fromkeys(each.values, value * (-1) ** at)) for at, each in enumerate(train)]
    assert not warnings(health.look(stage, huge, evals, None))


def test_gradients_above_the_clip_are_healthy() -> None:
    """SFT of the demo has norms from 25 to 75 all the way, and upstream clips at 10."""
    norms = [each.values["grad_norm"] for each in recording("healthy/sft-demo")[1]]
    assert min(norms) > 10
    assert not look("healthy/sft-demo")


VALUES = st.dictionaries(
    st.sampled_from([*recording("healthy/dpo-demo")[1][0].values, "loss/eval", "rewards_eval/accuracies", "?"]),
    st.floats() | st.floats(0, 1) | st.sampled_from([0.0, 1e308, -1e308, math.nan, math.inf, 5e-324]),
)
RECORDS = st.lists(st.builds(metrics.Record, st.just("train"), st.integers(0, 10**18), VALUES), max_size=40)


@given(st.sampled_from(["sft", "dpo", "?"]), RECORDS, RECORDS, st.none() | st.integers(-1, 10**18))
def test_garbage_is_survived(stage: str, train: Records, evals: Records, planned: int | None) -> None:
    for advice in health.look(stage, train, evals, planned):
        assert advice.what
        assert advice.mend


@given(st.sampled_from(HEALTHY), st.data())
def test_values_that_are_missing_here_and_there_change_nothing(name: str, data: st.DataObject) -> None:
    stage, train, evals = recording(f"healthy/{name}")
    holes = data.draw(st.sets(st.integers(0, len(train) - 1), max_size=len(train) // 10))
    key = data.draw(st.sampled_from(sorted(train[0].values)))
    holed = [
        each._replace(values={k: v for k, v in each.values.items() if k != key}) if at in holes else each
        for at, each in enumerate(train)
    ]
    assert not warnings(health.look(stage, holed, evals, train[-1].examples))


def test_it_imports_nothing_heavy() -> None:
    code = "import sys, ambersafe_cli.health; print('numpy' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_every_rule_is_in_the_readme() -> None:
    said = {
        advice.rule
        for name in [f"healthy/{each}" for each in HEALTHY] + [f"bad/{each}" for each in BAD]
        for advice in look(name)
    }
    listed = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert said <= set(listed)
    assert said >= WARNINGS

"""95 % intervals that cluster by prompt: against hand-worked cases, the ordinary intervals, and in simulation."""

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ambersafe_cli import intervals

NUMBERS = st.floats(-1e3, 1e3)


def test_quantiles_of_t_are_those_of_printed_tables() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 60: 2.000, 120: 1.980}
    assert {freedom: round(intervals.t_quantile(freedom), 3) for freedom in table} == table
    assert intervals.t_quantile(1000) - intervals.t_quantile(1001) == pytest.approx(2.4e-6, rel=0.05), "no step there"
    assert intervals.t_quantile(10**9) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=1e-8)


def test_a_mean_of_three_prompts_is_as_worked_by_hand() -> None:
    """Values 1 2 | 3 | 6 8: mean 4; without each prompt 17/3, 17/4 and 2; 2/3 · (25/9 + 1/16 + 4) = 4.560185."""
    found = intervals.mean([1, 2, 3, 6, 8], ["a", "a", "b", "c", "c"])
    half = 4.302653 * math.sqrt(4.560185)
    assert (found.value, found.low, found.high) == pytest.approx((4, 4 - half, 4 + half), rel=1e-6)


def test_a_share_of_three_prompts_is_as_worked_by_hand() -> None:
    """1 1 | 1 | 0 0 of three prompts: share 3/5; without each prompt 1/3, 1/2 and 1; 2/3 · (16/225 + 1/100 + 4/25) =
    0.160741, where 5 independent values have 0.24 / 4 = 0.06: the design effect is 2.679012."""
    found = intervals.share([True, True, True, False, False], [1, 1, 2, 3, 3])
    n, z = 5 / 2.679012 * (2.776445 / 4.302653) ** 2, 1.959964
    centre, half = (
        (0.6 + z**2 / (2 * n)) / (1 + z**2 / n),
        z * math.sqrt(0.24 / n + z**2 / (4 * n**2)) / (1 + z**2 / n),
    )
    assert (found.value, found.low, found.high) == pytest.approx((0.6, centre - half, centre + half), rel=1e-5)


@given(st.lists(NUMBERS, min_size=2, max_size=60))
def test_a_mean_with_one_pair_a_prompt_has_the_ordinary_t_interval(values: list[float]) -> None:
    half = intervals.t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    found = intervals.mean(values, range(len(values)))
    assert found.low == pytest.approx(statistics.fmean(values) - half, rel=1e-6, abs=1e-6)
    assert found.high == pytest.approx(statistics.fmean(values) + half, rel=1e-6, abs=1e-6)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The two roots of (p - x)² = z² x (1 - x) / n, Wilson's own definition."""
    z, p = 1.959963984540054, successes / n
    a, b, c = 1 + z**2 / n, -(2 * p + z**2 / n), p**2
    root = math.sqrt(max(0.0, b**2 - 4 * a * c))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_a_share_with_one_pair_a_prompt_has_the_ordinary_wilson_interval(values: list[bool]) -> None:
    found = intervals.share(values, range(len(values)))
    assert (found.low, found.high) == pytest.approx(wilson(sum(values), len(values)), abs=1e-9)


@given(st.lists(st.tuples(NUMBERS, st.integers(0, 5)), min_size=1, max_size=40), st.randoms())
def test_intervals_hold_their_value_and_know_no_order(pairs: list[tuple[float, int]], order: random.Random) -> None:
    shuffled = order.sample(pairs, len(pairs))
    kinds: list[tuple[Any, Any]] = [(intervals.mean, float), (intervals.share, lambda value: value > 0)]
    for method, read in kinds:
        found, again = (method([read(v) for v, _ in each], [c for _, c in each]) for each in (pairs, shuffled))
        assert (found.low is None) == (len({c for _, c in pairs}) == 1)
        assert found.value == pytest.approx(again.value, abs=1e-6)
        if found.low is not None:
            assert found.low <= found.value <= found.high
            assert (found.low, found.high) == pytest.approx((again.low, again.high), rel=1e-6, abs=1e-4)
        if method is intervals.share and found.low is not None:
            assert 0 <= found.low <= found.high <= 1


@given(st.lists(NUMBERS, min_size=2, max_size=20), st.integers(2, 5))
def test_a_pair_that_comes_several_times_in_its_prompt_says_no_more_than_once(values: list[float], times: int) -> None:
    once = intervals.mean(values, range(len(values)))
    often = intervals.mean(
        [v for v in values for _ in range(times)], [i for i in range(len(values)) for _ in range(times)]
    )
    assert (often.low, often.high) == pytest.approx((once.low, once.high), rel=1e-6, abs=1e-6)
    assume(statistics.stdev(values) > 1e-3)
    assert once.low is not None
    assert once.low < once.value < (once.high or 0)


def test_where_all_pairs_are_alike_each_prompt_counts_once() -> None:
    found = intervals.share([True] * 100, [i // 10 for i in range(100)])
    assert found.high == 1
    assert found.low is not None
    assert found.low < wilson(10, 10)[0], "and not 100 of 100"


def test_no_pair_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no values"):
        intervals.mean([], [])


def coverage(prompts: int, draw_pairs: Sequence[int], by_prompt: bool, share: bool) -> float:
    """How many of 1000 intervals hold the truth, 0.8 or 0, where the pairs of a prompt have much in common."""
    rng = random.Random(1)
    hits = 0
    for _ in range(1000):
        values: list[float] = []
        clusters: list[int] = []
        for prompt in range(prompts):
            common = rng.gauss(0, 1)
            for _ in range(rng.choice(draw_pairs)):
                noise = rng.gauss(0, 0.7)
                # Together they have a standard deviation of 1.2207, above -1.0273 in 80 % of all cases.
                values.append(common + noise)
                clusters.append(prompt if by_prompt else len(clusters))
        found = (
            intervals.share([value > -1.02734 for value in values], clusters)
            if share
            else intervals.mean(values, clusters)
        )
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= (0.8 if share else 0.0) <= found.high
    return hits / 1000


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("prompts", "lowest"), [(8, 0.91), (40, 0.94)])
def test_intervals_hold_the_truth_in_95_of_100_cases_only_if_they_cluster(
    prompts: int, lowest: float, share: bool
) -> None:
    assert lowest < coverage(prompts, (1, 2, 6, 9), by_prompt=True, share=share) < 0.97
    assert coverage(prompts, (1, 2, 6, 9), by_prompt=False, share=share) < 0.75

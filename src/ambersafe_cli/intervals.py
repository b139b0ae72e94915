"""95 % intervals of means over pairs, of which those of one prompt are not independent: they are one cluster."""

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""

_ALMOST_NORMAL = 1000


@dataclass(frozen=True)
class Interval:
    """A mean over pairs and the ends of its 95 % interval; both are None where there is but one prompt."""

    value: float
    low: float | None
    high: float | None


def mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """The mean of values, of which those with an equal entry in `clusters` belong together.

    By the cluster-robust variance of a mean that leaves out one cluster at a time (the jackknife, CV3) and the t
    distribution with G - 1 degrees of freedom, G the number of clusters: J. G. MacKinnon, M. O. Nielsen and M. D. Webb,
    Cluster-robust inference: A guide to empirical practice, Journal of Econometrics 232 (2023), 272-299. With
    few clusters of unequal sizes it holds the truth more often than the usual correction, G / (G - 1): in the test's
    simulation 92 times in 100 with 8 clusters, 95 with 40. If each value is a cluster of its own, this is the ordinary
    t interval. Raises ValueError if there is no value.
    """
    value = _mean(values)
    count = len(set(clusters))
    if count < 2:
        return Interval(value, None, None)
    half = t_quantile(count - 1) * math.sqrt(_variance(values, clusters, value))
    return Interval(value, value - half, value + half)


def share(values: Sequence[bool], clusters: Sequence[Hashable]) -> Interval:
    """The share of values that are true; `clusters` as above.

    Wilson's interval of a binomial share, at an effective number of values: their number over the design effect (the
    cluster-robust variance over that of independent values), no more than there are, and times (t(n-1) / t(G-1))² for
    few clusters, G: E. L. Korn and B. I. Graubard, Confidence Intervals for Proportions with Small Expected Number of
    Positive Counts Estimated from Survey Data, Survey Methodology 24 (1998), 193-201. It stays between 0 and 1, and
    has a width where all values are equal: there, where the design effect cannot be known, a cluster counts as one
    value. If each value is a cluster of its own, this is the ordinary Wilson interval.
    Raises ValueError if there is no value.
    """
    value = _mean(values)
    n, count = len(values), len(set(clusters))
    if count < 2:
        return Interval(value, None, None)
    if 0 < value < 1:
        independent = value * (1 - value) / (n - 1)
        robust = _variance(values, clusters, value)
        # Clusters whose shares are all alike leave no variance: then, too, more than n values are not believed.
        effective = min(float(n), n * independent / robust) if robust > 0 else float(n)
    else:
        effective = float(count)
    effective *= (t_quantile(n - 1) / t_quantile(count - 1)) ** 2
    centre = (value + Z**2 / (2 * effective)) / (1 + Z**2 / effective)
    half = Z * math.sqrt(value * (1 - value) / effective + Z**2 / (4 * effective**2)) / (1 + Z**2 / effective)
    return Interval(value, max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half)))


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("a mean of no values")
    return math.fsum(values) / len(values)


def _variance(values: Sequence[float], clusters: Sequence[Hashable], centre: float) -> float:
    """The jackknife's variance of a mean over two clusters or more: how far it moves without each of them."""
    sums: dict[Hashable, float] = {}
    sizes: dict[Hashable, int] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - centre
        sizes[cluster] = sizes.get(cluster, 0) + 1
    moves = [sums[cluster] / (len(values) - size) for cluster, size in sizes.items()]
    return (len(sizes) - 1) / len(sizes) * math.fsum(move**2 for move in moves)


@functools.cache
def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution with so many degrees of freedom, at least 1.

    From its distribution function, which for whole degrees is a finite sum (M. Abramowitz and I. A. Stegun, Handbook
    of Mathematical Functions, 26.7.3 and 26.7.4); above 1000 by its expansion around the normal one (26.7.5), whose
    error is below 1e-9 there.
    """
    if freedom > _ALMOST_NORMAL:
        return Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)
    low, high = 1.9, 12.8  # of normal, and above that of one degree, 12.706
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """The probability that a value of this distribution lies between -t and t."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine_2 = math.cos(angle) ** 2
    is_odd = freedom % 2 == 1
    term = math.cos(angle) if is_odd else 1.0
    total = 0.0
    for k in range(1 if is_odd else 0, freedom - 1, 2):
        total += term
        term *= cosine_2 * (k + 1) / (k + 2)
    if is_odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total

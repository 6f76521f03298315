"""Means and intervals of a comparison: Student's, paired by seed, and Fieller's for ratios.

A value that is missing (a seed that failed) leaves its pair out; too few values have no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from altprop.statistics import half_width, t_quantile

Values = Sequence[float | None]


class Estimate(NamedTuple):
    """A mean, or a ratio of means, and its 95 % interval (`None`: too few values for one)."""

    mean: float
    interval: tuple[float, float] | None


def mean_of(values: Values) -> Estimate | None:
    """Return the mean and Student's interval of it; nothing for no value at all."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    mean = math.fsum(known) / len(known)
    half = half_width(known)
    return Estimate(mean, None if half is None else (mean - half, mean + half))


def difference(values: Values, others: Values) -> Estimate | None:
    """Return the mean of `values − others`, paired, and Student's interval of it."""
    return mean_of([a - b for a, b in _pairs(values, others)])


def recovery(values: Values, floor: Values, ceiling: Values) -> Estimate | None:
    """Return `(values − floor) / (ceiling − floor)` of the means, and Fieller's interval of it.

    The interval holds every ratio `r` for which the mean of the paired `(values − floor) −
    r (ceiling − floor)` does not differ from 0. Nothing is returned where the data does not show
    that the ceiling is above the floor, since then no ratio can be excluded; a single value has a
    ratio and no interval.

    **Arguments:** scores of which higher is better.

    Source: Fieller, "Some Problems in Interval Estimation", J. R. Stat. Soc. B 16 (1954).
    """
    known = [
        (v - low, high - low)
        for v, low, high in zip(values, floor, ceiling, strict=True)
        if v is not None and low is not None and high is not None
    ]
    if not known:
        return None
    above = [u for u, _ in known]
    gaps = [g for _, g in known]
    u, g = math.fsum(above) / len(known), math.fsum(gaps) / len(known)
    if g <= 0:
        return None
    if len(known) < 2:
        return Estimate(u / g, None)
    share = t_quantile(len(known) - 1) ** 2 / len(known)
    # (u − r g)² ≤ share · Var(above − r gaps), a quadratic inequality in r
    a = g * g - share * _covariance(gaps, gaps)
    b = u * g - share * _covariance(above, gaps)
    c = u * u - share * _covariance(above, above)
    if a <= 0:
        return None
    root = math.sqrt(max(0.0, b * b - a * c))
    return Estimate(u / g, ((b - root) / a, (b + root) / a))


def _pairs(values: Values, others: Values) -> list[tuple[float, float]]:
    both = zip(values, others, strict=True)
    return [(a, b) for a, b in both if a is not None and b is not None]


def _covariance(first: Sequence[float], second: Sequence[float]) -> float:
    means = math.fsum(first) / len(first), math.fsum(second) / len(second)
    products = ((a - means[0]) * (b - means[1]) for a, b in zip(first, second, strict=True))
    return math.fsum(products) / (len(first) - 1)

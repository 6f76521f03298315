"""Student's distribution: how sure a mean over seeds or trials is."""

from __future__ import annotations

import math
from collections.abc import Sequence


def t_quantile(freedom: int, level: float = 0.95) -> float:
    """Return `t` such that `|T| < t` with probability `level`, `T` being Student's.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4.

    >>> round(t_quantile(2), 3)
    4.303
    """

    def inside(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        square, odd = math.cos(angle) ** 2, freedom % 2
        term = math.cos(angle) if odd else 1.0
        total = term if freedom > 1 or not odd else 0.0
        for k in range(2 if odd else 1, freedom - 2, 2):
            term *= square * k / (k + 1)
            total += term
        total *= math.sin(angle)
        return (angle + total) * 2 / math.pi if odd else total

    low, high = 0.0, 1.0
    while inside(high) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return high


def half_width(values: Sequence[float], level: float = 0.95) -> float | None:
    """Return half the width of the mean's interval by Student's t, `None` of a single value."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return t_quantile(len(values) - 1, level) * math.sqrt(variance / len(values))

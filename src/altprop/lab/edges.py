"""Whether the best value of a search lies at the edge of what was tried, and what lies beyond.

A best at the edge is none: nobody has looked past it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable


def open_ends(
    best: float, tried: Iterable[float], *, log: bool, apart: float = 0.0
) -> tuple[int, ...]:
    """Return the ends, −1 below and 1 above, towards which nothing was tried beyond the best.

    **Arguments:** `log`, whether distances are those of logarithms; `apart`, how far beyond the
    best a value must lie, in them.

    >>> open_ends(3.0, [1.0, 3.0, 10.0], log=True), open_ends(3.0, [1.0, 3.0], log=True)
    ((), (1,))
    """
    distances = [_on(value, log) - _on(best, log) for value in tried]
    least = apart * (1 - 1e-9)  # such a distance itself will do, as it was computed
    return tuple(
        end for end in (-1, 1) if not any(end * d > 0 and end * d >= least for d in distances)
    )


def beyond(value: float, distance: float, *, log: bool) -> float:
    """Return what lies at a distance, of logarithms or itself, from a value."""
    return value * math.exp(distance) if log else value + distance


def width(low: float, high: float, *, log: bool) -> float:
    """Return how far two values lie apart."""
    return _on(high, log) - _on(low, log)


def short(value: float, off: float) -> float:
    """Return the number of fewest digits that is off from a value by at most `off`.

    >>> short(0.0013895, off=1e-4), short(1000.6, off=0.1)
    (0.0014, 1000.6)
    """
    rounded = (float(f"{value:.{digits}g}") for digits in range(1, 17))
    return next((number for number in rounded if abs(number - value) <= off), value)


def _on(value: float, log: bool) -> float:
    return math.log(value) if log else value

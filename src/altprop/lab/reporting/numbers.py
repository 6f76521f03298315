"""How numbers are written for people: as many digits as they carry, and with their unit."""

from __future__ import annotations

import math
from collections.abc import Sequence


def number(value: float | None, digits: int = 4) -> str:
    """Return a number to so many significant digits, or a dash where there is none.

    >>> number(1234567), number(0.000123456), number(96.9), number(None)
    ('1,234,567', '1.235e-04', '96.9', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 10**digits:
        decimals = 0 if value == 0 else max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{decimals}f}"
        return _minus(text.rstrip("0").rstrip(".") if "." in text else text)
    return _minus(f"{value:,.0f}" if 1 <= abs(value) < 1e9 else f"{value:.{digits - 1}e}")


def interval(
    mean: float | None,
    bounds: Sequence[float | None] | None,
    unit: str = "",
    *,
    signed: bool = False,
) -> str:
    """Return a mean and its interval, to the digits that the interval leaves certain.

    >>> interval(96.931, (96.58, 97.28), "%"), interval(-0.5, None, signed=True)
    ('96.9 % [96.6, 97.3]', '−0.5')
    """
    if mean is None or not math.isfinite(mean):
        return "–"
    tail = f" {unit}" if unit else ""
    if bounds is None or None in bounds or not all(map(math.isfinite, bounds)):  # type: ignore[arg-type]
        plus = "+" if signed and mean > 0 else ""
        return f"{plus}{number(mean)}{tail}"
    low, high = (float(bound) for bound in bounds)  # type: ignore[arg-type]
    half = high / 2 - low / 2
    if not half / 3 > 0:  # the same to all digits
        return f"{number(mean)}{tail} [{number(low)}, {number(high)}]"
    decimals = min(5, max(0, -math.floor(math.log10(half / 3))))
    sign = "+" if signed else ""
    written = [_minus(f"{value:{sign},.{decimals}f}") for value in (mean, low, high)]
    return f"{written[0]}{tail} [{written[1]}, {written[2]}]"


def large(value: float | None, unit: str = "") -> str:
    """Return a large number in thousands, millions and so on.

    >>> large(108_234), large(3_200_000, "B"), large(812)
    ('108 k', '3.2 MB', '812')
    """
    if value is None or not math.isfinite(value):
        return "–"
    for power, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{number(value / power, 3)} {prefix}{unit}"
    return f"{number(value, 3)} {unit}".rstrip()


def duration(seconds: float | None) -> str:
    """Return a time in the unit that suits it.

    >>> duration(0.0123), duration(75), duration(3e-5)
    ('12.3 ms', '75 s', '30 µs')
    """
    if seconds is None or not math.isfinite(seconds):
        return "–"
    for power, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= power:
            return f"{number(seconds / power, 3)} {unit}"
    return f"{number(seconds, 3)} s"


def few_seeds(scores: Sequence[float | None]) -> str:
    """Return how many seeds a mean is of, where some failed: those that did not may be lucky."""
    known = sum(score is not None for score in scores)
    return f" ({known} of {len(scores)} seeds)" if known < len(scores) else ""


def _minus(text: str) -> str:
    return text.replace("-", "−", 1) if text.startswith("-") else text

"""Curves as a page holds them: points of the data, evenly spaced ones where there are too many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from altprop.lab.reporting.markup import finite

POINTS = 60_000
"""How many points all curves of a page have together, so that it stays small and draws fast."""


def most_points(curves: int) -> int:
    """Return how many points each of so many curves may have."""
    return min(2000, max(50, POINTS // max(1, curves)))


def thin(curve: Mapping[str, Sequence[Any]], most: int) -> dict[str, list[Any]]:
    """Return a curve's columns at no more than `most` of its points, the last always among them.

    What is not finite becomes None, where a drawn line has a gap.
    """
    count = len(curve["steps"])
    every = -(-count // most) if count else 1
    kept = range((count - 1) % every, count, every)
    return {
        name: [column[i] if name == "steps" else finite(column[i]) for i in kept]
        for name, column in curve.items()
    }


def average(curves: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the mean of curves at the steps that all of them have.

    A mean is None at a step where one of the curves has no number.
    """
    if not curves:
        return {"steps": [], "loss": [], "score": []}
    common = set(curves[0]["steps"]).intersection(*(c["steps"] for c in curves[1:]))
    steps = sorted(common)
    out: dict[str, list[Any]] = {"steps": steps}
    for name in ("loss", "score"):
        columns = [dict(zip(c["steps"], c[name], strict=True)) for c in curves]
        out[name] = [_mean([finite(column[step]) for column in columns]) for step in steps]
    return out


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if len(there) == len(values) else None

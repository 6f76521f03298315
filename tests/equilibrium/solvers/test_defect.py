"""Defect correction by a given inverse: one correction where it is exact, the best state always."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import altprop as ap
from altprop.equilibrium.solvers.defect import defect_correction
from systems import Force, randn, size, tensor, watched

R = ap.Result
RATES = tensor(0.5, 2.0)


def force(z: Tensor) -> Tensor:
    return RATES * (1 - z)


def corrected(
    factor: Tensor | float, start: Tensor, of: Force = force, max_steps: int = 50
) -> ap.Solution:
    """Correct by `factor` times the exact inverse, and check the count of evaluations."""
    wrapped, seen = watched(of)
    found = defect_correction(
        wrapped,
        lambda f: factor * f / RATES,
        start,
        tol=1e-10,
        max_steps=max_steps,
        scale=torch.ones(len(start), dtype=torch.float64),
    )
    assert found.evaluations == len(seen)
    return found


def test_a_linear_force_is_solved_in_one_correction() -> None:
    found = corrected(1.0, randn(3, 2))
    assert found.evaluations == 2 and found.result is R.CONVERGED
    torch.testing.assert_close(found.value, torch.ones(3, 2).double())


def test_it_stops_where_no_sample_gets_better_and_keeps_the_best_of_each() -> None:
    start = randn(3, 2) + 3
    found = corrected(-3.0, start)
    assert found.evaluations == 2 and found.result is R.MAX_STEPS
    assert torch.equal(found.value, start)
    found = corrected(tensor(0.6, 2.7, 0.8).view(3, 1), start)  # the second one overshoots
    assert torch.equal(found.value[1], start[1])
    assert float(found.residual[[0, 2]].max()) <= 1e-10 and found.result is R.MAX_STEPS
    torch.testing.assert_close(found.force, force(found.value))
    torch.testing.assert_close(found.residual, size(found.force))


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_it_keeps_its_limit(limit: int) -> None:
    found = corrected(0.1, randn(3, 2), max_steps=limit)
    assert found.evaluations == limit and found.result is R.MAX_STEPS


def test_a_lost_sample_is_told_and_costs_the_others_nothing() -> None:
    start = randn(3, 2)
    start[1] = 1.0

    def lost(z: Tensor) -> Tensor:
        f = force(z)
        return torch.stack([f[0], torch.full_like(f[1], math.nan), f[2]])

    alone, beside = corrected(0.7, start), corrected(0.7, start, lost)
    assert beside.evaluations == alone.evaluations and beside.result is R.NON_FINITE
    assert torch.equal(beside.value, alone.value)
    # one that is lost on the way keeps the state before, and is told all the same
    bounded = lambda z: torch.where(z > 1.5, math.nan, force(z))  # noqa: E731
    far = corrected(1.9, tensor(0.2, 0.2).view(1, 2), bounded)
    assert far.result is R.NON_FINITE and bool(far.residual.isfinite().all())
    assert far.value.flatten().tolist() == [0.2, 0.2]


def test_it_takes_the_scale_that_is_given() -> None:
    start, scale = randn(3, 2), tensor(1e4, 1.0, 1e-3)
    slow = lambda f: 0.9 * f / RATES  # noqa: E731
    found = defect_correction(force, slow, start, tol=1e-3, max_steps=50, scale=scale)
    torch.testing.assert_close(found.residual, size(force(found.value)) / scale)
    assert found.result is R.CONVERGED and torch.equal(found.value[0], start[0])

"""Relaxations in time: Euler's and a fixed point's steps, and adaptive ones with their error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import altprop as ap
from systems import contraction, randn, tensor, watched

R = ap.Result


def test_euler_makes_its_own_steps_and_no_others() -> None:
    plain, start = contraction(), randn(2, 8, seed=5)
    force, seen = watched(plain)
    found = ap.Euler(step=0.3, max_steps=7).solve(force, start, step=99.0)
    z = start
    for _ in range(7):
        z = z + 0.3 * plain(z)
    torch.testing.assert_close(found.value, z, rtol=1e-14, atol=0)
    assert found.evaluations == len(seen) == 8 and found.result is ap.Result.FIXED_TIME
    torch.testing.assert_close(ap.Euler(step=0.3, max_steps=7).unroll(plain, start, step=1.0), z)


def test_a_fixed_point_is_iterated_with_the_step_of_the_dynamics() -> None:
    plain, start = contraction(), randn(2, 8, seed=5)
    by_itself = ap.FixedPoint(tol=1e-6).solve(plain, start, step=0.7)
    as_euler = ap.Euler(step=0.7, tol=1e-6, max_steps=100).solve(plain, start, step=99.0)
    assert by_itself.result is ap.Result.CONVERGED
    assert torch.equal(by_itself.value, as_euler.value)
    assert by_itself.evaluations == as_euler.evaluations
    solver = ap.FixedPoint(tol=0, max_steps=7)
    unrolled = solver.unroll(plain, start, step=0.7)
    torch.testing.assert_close(unrolled, solver.solve(plain, start, step=0.7).value)
    assert solver.stride(0.7) == 0.7


def test_an_adaptive_step_is_of_third_order() -> None:
    a = torch.tensor([[-0.3, 2.0], [-1.0, -0.5]], dtype=torch.float64)
    z = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    errors = []
    for h in (0.2, 0.1, 0.05):
        solver = ap.Adaptive(tol=0, rtol=10.0, atol=10.0, max_steps=4)
        # a force that is small beside what is accepted: the first step is taken as it is
        *_, last = solver.trajectory(lambda s: s @ a.T, z, step=h)
        assert float(last.time) == h
        errors.append(float((last.value - z @ torch.linalg.matrix_exp(h * a).T).norm()))
    for large, small in zip(errors, errors[1:], strict=False):
        assert math.log2(large / small) == pytest.approx(4, abs=0.15)  # of one step: h⁴


def test_an_adaptive_step_is_taken_only_where_its_error_is_accepted() -> None:
    rates = torch.tensor([[-1.0], [-30.0]], dtype=torch.float64)
    solver = ap.Adaptive(tol=0, rtol=1e-4, max_steps=400)
    before = None
    for moment in solver.trajectory(lambda z: rates * z, torch.ones(2, 1).double(), step=0.2):
        exact = torch.exp(rates[:, 0] * moment.time)
        # the error of all steps together, relative to where it began
        assert float((moment.value[:, 0] - exact).abs().max()) < 1e-3
        if before is not None:
            stood = moment.time == before.time  # a rejected step repeats its last point
            assert torch.equal(moment.value[stood], before.value[stood])
            assert bool((moment.time >= before.time).all())
        torch.testing.assert_close(moment.force, rates * moment.value)
        before = moment
    assert before is not None and float(before.time[0]) > 5 * float(before.time[1])


def test_an_adaptive_relaxation_ends_where_a_sample_runs_away_in_finite_time() -> None:
    # ż = z² from 1 is infinite at the time 1, and ż = −z goes on beside it
    def force(z: Tensor) -> Tensor:
        return torch.stack([z[0] ** 2, 0 * z[1]])

    solver = ap.Adaptive(tol=1e-9, max_steps=30_000, rtol=1e-3)
    *_, last = solver.trajectory(force, torch.ones(2, 1).double(), step=0.1)
    assert last.evaluations < 20_000 and float(last.time[0]) == pytest.approx(1, abs=0.02)


def test_an_adaptive_step_grows_and_shrinks_with_its_error() -> None:
    # taken, and followed by one five times as long; or refused twice
    for first, times in ((1e-3, [0, 1e-3, 6e-3]), (50.0, [0, 0, 0])):
        solver = ap.Adaptive(tol=0, rtol=1e-3, max_steps=7)
        moments = solver.trajectory(lambda z: -z, torch.ones(1, 1).double(), step=first)
        assert [float(m.time) for m in moments] == pytest.approx(times)


def test_an_error_of_a_step_may_not_exceed_a_tenth_of_the_step() -> None:
    """Else the steps near an equilibrium grow until they are unstable, and the state hovers."""
    rates = tensor(1.0, 30.0).view(1, 2)
    force = lambda z: rates * (1 - z)  # noqa: E731
    found = ap.Adaptive(tol=1e-7, rtol=0.3, atol=1.0).solve(force, randn(1, 2), step=0.01)
    assert found.result is R.CONVERGED


def test_an_error_is_accepted_up_to_its_absolute_part() -> None:
    times = []
    for atol in (1e-9, 1e-2):
        solver = ap.Adaptive(tol=0, rtol=1e-9, atol=atol, max_steps=4)
        *_, last = solver.trajectory(lambda z: -z, torch.ones(1, 1).double(), step=0.2)
        times.append(float(last.time))
    assert times == [0.0, 0.2]


def test_a_relaxed_sample_has_no_more_time_and_a_step_out_of_the_domain_is_made_smaller() -> None:
    def force(z: Tensor) -> Tensor:
        f = tensor(5.0, 0.3).view(2, 1) * (1 - z)
        return torch.where(z > 1.2, math.nan, f)

    solver = ap.Adaptive(tol=1e-4, max_steps=900)
    before, stood = None, 0
    start = tensor(0.999, 0.0).view(2, 1)
    for moment in solver.trajectory(force, start, step=50.0):
        assert bool(moment.residual.isfinite().all())
        if before is not None and float(before.residual[0]) <= 1e-4:
            assert moment.time[0] == before.time[0] and moment.value[0] == before.value[0]
            stood += float(before.residual[1]) > 1e-4
        before = moment
    assert before is not None and float(before.residual.max()) <= 1e-4 and stood > 3

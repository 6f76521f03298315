"""Where solvers stop, what they keep, and how many products they spend: counted beforehand."""

from __future__ import annotations

import math

import pytest
import torch
from forces import Force, randn, size, tensor, watched
from torch import Tensor

import altprop as ap
from altprop.equilibrium.solvers.defect import defect_correction
from altprop.equilibrium.solvers.solver import AbstractSolver

R = ap.Result


# ------------------------------------------------------------------------------------- Anderson


def test_anderson_returns_the_best_state_that_it_met_and_not_the_last() -> None:
    turn = tensor(-1.0, -3.0, 3.0, -1.0).view(2, 2)
    plain = lambda z: z @ turn.T + 1  # noqa: E731
    chosen = set()
    for limit in range(3, 9):
        force, seen = watched(plain)
        solver = ap.Anderson(memory=1, ridge=0.5, tol=0, max_steps=limit)
        found = solver.solve(force, randn(3, 2, seed=limit), step=0.9)
        residuals = torch.stack([size(plain(z)) / size(z) for z in seen])
        best = residuals.argmin(0)
        chosen |= {limit - 1 - int(n) for n in best}
        torch.testing.assert_close(found.residual, residuals.amin(0))
        for i, n in enumerate(best.tolist()):
            assert torch.equal(found.value[i], seen[n][i])
        torch.testing.assert_close(found.force, plain(found.value))
    assert len(chosen) > 2  # it was the last one in some, and others in others


def test_a_sample_that_left_the_forces_domain_is_told_though_its_best_state_is_kept() -> None:
    force = lambda z: torch.where(z > 1.5, math.nan, 3 * (1 - z))  # noqa: E731
    found = ap.Anderson(tol=1e-12).solve(force, tensor(0.5).view(1, 1), step=1.0)
    assert found.result is R.NON_FINITE
    assert found.value.tolist() == [[0.5]] and found.residual.tolist() == [3.0]
    assert found.evaluations == 2  # and it makes no others


# ---------------------------------------------------------------------------- defect correction


def corrected(
    force: Force, inverse: Force, start: Tensor, tol: float = 1e-10, max_steps: int = 50
) -> tuple[ap.Solution, int]:
    wrapped, seen = watched(force)
    one = torch.ones(len(start), dtype=torch.float64)
    found = defect_correction(wrapped, inverse, start, tol=tol, max_steps=max_steps, scale=one)
    assert found.evaluations == len(seen)
    return found, len(seen)


class TestDefectCorrection:
    rates = tensor(0.5, 2.0)

    def force(self, z: Tensor) -> Tensor:
        return self.rates * (1 - z)

    def test_solves_a_linear_force_in_one_correction(self) -> None:
        found, calls = corrected(self.force, lambda f: f / self.rates, randn(3, 2))
        assert calls == 2 and found.result is R.CONVERGED
        torch.testing.assert_close(found.value, torch.ones(3, 2).double())

    def test_stops_where_no_sample_gets_better_and_keeps_the_best(self) -> None:
        start = randn(3, 2)
        found, calls = corrected(self.force, lambda f: -3 * f / self.rates, start)
        assert calls == 2 and found.result is R.MAX_STEPS and torch.equal(found.value, start)

    def test_keeps_of_each_sample_its_own_best(self) -> None:
        # one sample's corrections overshoot, the others' do not
        factor = tensor(0.6, 2.7, 0.8).view(3, 1)
        start = randn(3, 2) + 3
        found, _ = corrected(self.force, lambda f: factor * f / self.rates, start)
        assert torch.equal(found.value[1], start[1])
        assert float(found.residual[[0, 2]].max()) <= 1e-10 and found.result is R.MAX_STEPS
        torch.testing.assert_close(found.force, self.force(found.value))
        torch.testing.assert_close(found.residual, size(found.force))

    @pytest.mark.parametrize("limit", [1, 2, 5])
    def test_keeps_its_limit(self, limit: int) -> None:
        slow = lambda f: 0.1 * f / self.rates  # noqa: E731
        found, calls = corrected(self.force, slow, randn(3, 2), max_steps=limit)
        assert calls == limit and found.result is R.MAX_STEPS

    def test_tells_of_a_lost_sample_which_costs_the_others_nothing(self) -> None:
        start = randn(3, 2)
        start[1] = 1.0
        slow = lambda f: 0.7 * f / self.rates  # noqa: E731

        def lost(z: Tensor) -> Tensor:
            f = self.force(z)
            return torch.stack([f[0], torch.full_like(f[1], math.nan), f[2]])

        alone, calls = corrected(self.force, slow, start)
        beside, again = corrected(lost, slow, start)
        assert again == calls and beside.result is R.NON_FINITE
        assert torch.equal(beside.value, alone.value)
        # one that is lost on the way keeps the state before, and is told all the same
        bounded = lambda z: torch.where(z > 1.5, math.nan, self.force(z))  # noqa: E731
        far, _ = corrected(bounded, lambda f: 1.9 * f / self.rates, tensor(0.2, 0.2).view(1, 2))
        assert far.result is R.NON_FINITE
        assert far.value.flatten().tolist() == [0.2, 0.2] and bool(far.residual.isfinite().all())

    def test_takes_the_scale_that_is_given(self) -> None:
        start, scale = randn(3, 2), tensor(1e4, 1.0, 1e-3)
        slow = lambda f: 0.9 * f / self.rates  # noqa: E731
        found = defect_correction(self.force, slow, start, tol=1e-3, max_steps=50, scale=scale)
        torch.testing.assert_close(found.residual, size(self.force(found.value)) / scale)
        assert found.result is R.CONVERGED and torch.equal(found.value[0], start[0])


# ---------------------------------------------------------------------------------------- Krylov


def spread(n: int = 16, B: int = 2) -> tuple[Force, Tensor]:
    """Return a linear force whose eigenvalues are spread, so that residuals fall gradually."""
    q = torch.linalg.qr(randn(B, n, n, seed=1)).Q
    rates = torch.stack([torch.linspace(low, 2, n).double() for low in (0.2, 0.7)])[:B]
    a = -(q * rates[:, None]) @ q.mT
    b = randn(B, n, seed=2)
    return lambda z: torch.einsum("bij,bj->bi", a, z) + b, a


def columns_for(a: Tensor, right: Tensor, goal: float) -> int:
    """Return how many dimensions a Krylov space needs for `‖right − A x‖ ≤ goal`."""
    space: list[Tensor] = []
    v = right / right.norm()
    for count in range(1, len(right) + 1):
        space.append(v)
        Q = torch.stack(space, 1)
        y = torch.linalg.lstsq(a @ Q, right[:, None]).solution
        if float((right - (a @ Q @ y)[:, 0]).norm()) <= goal:
            return count
        v = a @ v
        for _ in range(2):
            for u in space:
                v = v - (u @ v) * u
        v = v / v.norm()
    return len(right)


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_gmres_makes_as_many_products_as_its_hardest_sample_needs(tol: float, scale: float) -> None:
    force, a = spread()
    start = torch.zeros(2, 16, dtype=torch.float64)
    f = force(start)
    needed = [columns_for(a[i], -f[i], tol * scale) for i in range(2)]
    assert needed[0] > needed[1]
    scales = torch.full((2,), scale, dtype=torch.float64)
    found = ap.GMRES(tol=tol).solve(force, start, step=1.0, scale=scales)
    assert found.evaluations == 1 + max(needed) + 1 and found.result is R.CONVERGED
    torch.testing.assert_close(found.residual, size(force(found.value)) / scale)
    # without a scale it is the state's own norm
    at = randn(2, 16, seed=3)
    f = force(at)
    needed = [columns_for(a[i], -f[i], tol * float(at[i].norm())) for i in range(2)]
    once = ap.GMRES(tol=tol, max_steps=3 + max(needed)).solve(force, at, step=1.0)
    assert once.evaluations == 2 + max(needed)


@pytest.mark.parametrize("forcing", [0.01, 0.1, 0.5, 0.99])
def test_a_newton_steps_products_are_those_of_its_forcing(forcing: float) -> None:
    force, a = spread()
    start = torch.zeros(2, 16, dtype=torch.float64)
    f = force(start)
    share = min(forcing, 0.9)  # some progress has to be made
    needed = max(columns_for(a[i], -f[i], share * float(f[i].norm())) for i in range(2))
    tight = ap.NewtonKrylov(tol=1e-9, forcing=forcing, max_steps=2 + needed + 1)
    wrapped, seen = watched(force)
    tight.solve(wrapped, start, step=1.0)
    near = [float(size(z - start).max()) < 1e-5 for z in seen]
    assert near[: needed + 2] == [True] * (needed + 1) + [False]


def test_newtons_last_step_aims_at_half_the_tolerance() -> None:
    force, a = spread()
    start = torch.zeros(2, 16, dtype=torch.float64)
    f = force(start)
    for scale in (1.0, 20.0):
        needed = max(columns_for(a[i], -f[i], 0.5 * 1e-2 * scale) for i in range(2))
        solver = ap.NewtonKrylov(tol=1e-2, forcing=1e-9)
        scales = torch.full((2,), scale, dtype=torch.float64)
        found = solver.solve(force, start, step=1.0, scale=scales)
        assert found.evaluations == 1 + needed + 1 and found.result is R.CONVERGED
        torch.testing.assert_close(found.residual, size(force(found.value)) / scale)


@pytest.mark.parametrize("solver", [ap.GMRES, ap.NewtonKrylov, ap.Adaptive, ap.Anderson])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 7, 12])
def test_a_limit_of_evaluations_is_kept(solver: type, limit: int) -> None:
    wrapped, seen = watched(spread()[0])
    start = randn(2, 16, seed=3)
    found = solver(tol=1e-13, max_steps=limit).solve(wrapped, start, step=0.3)
    assert len(seen) == found.evaluations <= limit and found.result is R.MAX_STEPS
    if issubclass(solver, (ap.GMRES, ap.NewtonKrylov)):  # what products cost is used for a step
        moved = bool((size(found.force) < size(spread()[0](start))).all())
        assert moved == (limit >= 3)


@pytest.mark.parametrize("limit", [2, 3, 4, 5])
def test_backtracking_keeps_the_limit_too(limit: int) -> None:
    wrapped, seen = watched(lambda z: -torch.atan(z))
    found = ap.NewtonKrylov(max_steps=limit).solve(wrapped, tensor(30.0).view(1, 1), step=1.0)
    assert len(seen) == found.evaluations <= limit and found.value.tolist() == [[30.0]]


def test_a_newton_step_makes_some_progress_however_loose_its_forcing() -> None:
    # one direction leaves 95 % of the force, two leave nothing
    sine = 0.95
    turn = tensor(math.sqrt(1 - sine**2), -sine, sine, math.sqrt(1 - sine**2)).view(2, 2)
    solver = ap.NewtonKrylov(tol=1e-3, forcing=0.99, max_steps=5)
    found = solver.solve(lambda z: z @ turn.T + 1, torch.zeros(1, 2).double(), step=1.0)
    assert found.evaluations == 1 + 2 + 1 and found.result is R.CONVERGED


def test_a_sample_that_is_done_early_is_foreseen_as_exactly_as_its_mates() -> None:
    force, a = spread()
    start = torch.zeros(2, 16, dtype=torch.float64)
    # the second sample is done where half of its force is left, the first goes on
    scale = torch.stack([torch.ones(()).double(), 0.6e2 * size(force(start))[1]])
    found = ap.GMRES(tol=1e-2).solve(force, start, step=1.0, scale=scale)
    assert found.result is R.CONVERGED  # and not refused as if the force were not linear
    left = size(force(found.value)) / size(force(start))
    assert 0.2 < float(left[1]) < 0.6 and float(left[0]) < 0.01


def test_a_sample_without_a_solution_ends_after_a_cycle_that_did_not_help() -> None:
    a = torch.zeros(2, 3, 3, dtype=torch.float64)
    a[1] = torch.diag(tensor(1.0, 2.0, 3.0))
    b = torch.ones(2, 3, dtype=torch.float64)
    force, seen = watched(lambda z: torch.einsum("bij,bj->bi", a, z) + b)
    found = ap.GMRES(tol=1e-10).solve(force, torch.ones(2, 3).double(), step=1.0)
    assert (found.residual <= 1e-10).tolist() == [False, True]
    assert len(seen) == 1 + 3 + 1 and torch.equal(found.value[0], torch.ones(3).double())


@pytest.mark.parametrize("turned", [False, True])
def test_where_the_triangle_is_singular_the_smaller_space_gives_what_it_has(turned: bool) -> None:
    """`A v` falls into the old space, so that the newest direction could have any length."""
    block = tensor(1.0, -1.0, 1.0, -1.0).view(2, 2)
    a = torch.block_diag(block, torch.eye(3, dtype=torch.float64))
    q = torch.linalg.qr(randn(5, 5, seed=4)).Q if turned else torch.eye(5, dtype=torch.float64)
    a, b = q @ a @ q.T, -q[:, 0]
    for scale in (None, torch.ones(1, dtype=torch.float64)):
        found = ap.GMRES(tol=1e-8).solve(
            lambda z: z @ a.T + b, torch.zeros(1, 5).double(), step=1.0, scale=scale
        )
        # the least that ‖A z + b‖ can be
        assert found.result is R.MAX_STEPS
        assert float(size(found.force)) == pytest.approx(math.sqrt(0.5))
        assert float(size(found.value)) < 2


def test_ill_conditioned_systems_are_solved_in_one_cycle_of_their_size() -> None:
    n = 24
    q, p = (torch.linalg.qr(randn(n, n, seed=s)).Q for s in (5, 6))
    a = (q * torch.logspace(0, -6, n, dtype=torch.float64)) @ p.T
    b = a @ randn(n, seed=7)
    found = ap.GMRES(tol=1e-11, max_steps=n + 3).solve(
        lambda z: z @ a.T - b,
        torch.zeros(1, n).double(),
        step=1.0,
        scale=torch.ones(1).double(),
    )
    assert found.result is R.CONVERGED and found.evaluations <= n + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gmres_tells_a_force_that_bends_from_one_that_rounds(dtype: torch.dtype) -> None:
    force, a = spread()
    a, b = a.to(dtype), randn(2, 16, seed=2).to(dtype)
    start = torch.ones(2, 16, dtype=dtype)
    linear = lambda z: torch.einsum("bij,bj->bi", a, z) + 1e3 * b  # noqa: E731
    tol = 1e-6 if dtype == torch.float32 else 1e-13
    found = ap.GMRES(tol=tol, restart=4, max_steps=500).solve(linear, start, step=1.0)
    assert float(found.residual.max()) <= 10 * tol
    with pytest.raises(ap.RuleError, match="not linear"):
        ap.GMRES().solve(lambda z: linear(z) + 0.5 * z.abs() * z, start, step=1.0)


@pytest.mark.parametrize("solver", [ap.GMRES(tol=1e-8), ap.NewtonKrylov(tol=1e-8)], ids=repr)
def test_a_sample_that_is_lost_in_its_first_product_does_no_harm(solver: AbstractSolver) -> None:
    rates = torch.linspace(0.5, 1.5, 4, dtype=torch.float64)
    start = randn(2, 4, seed=8)

    def force(z: Tensor) -> Tensor:
        f = rates * (1 - z)
        there = bool((z[1] == start[1]).all())
        return torch.stack([f[0], f[1] if there else torch.full_like(f[1], math.inf)])

    found = solver.solve(force, start, step=1.0)
    assert float(found.residual[0]) <= 1e-8 and torch.equal(found.value[1], start[1])
    assert found.result is R.MAX_STEPS and bool(torch.isfinite(found.residual).all())

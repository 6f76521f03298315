"""Krylov solvers against dense algebra: where they stop, what they keep, how many products."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import altprop as ap
from altprop.auditing.memory import peak_live_bytes
from altprop.equilibrium.solvers.solver import AbstractSolver
from systems import Force, contraction, linear, randn, size, tensor, watched

R = ap.Result


def spread(n: int = 16, B: int = 2) -> tuple[Force, Tensor]:
    """Return a linear force whose eigenvalues are spread, so that residuals fall gradually."""
    q = torch.linalg.qr(randn(B, n, n, seed=1)).Q
    rates = torch.stack([torch.linspace(low, 2, n).double() for low in (0.2, 0.7)])[:B]
    a = -(q * rates[:, None]) @ q.mT
    b = randn(B, n, seed=2)
    return lambda z: torch.einsum("bij,bj->bi", a, z) + b, a


def space(a: Tensor, right: Tensor, columns: int) -> tuple[Tensor, float]:
    """Return the `x` of the Krylov space with the least `‖right − A x‖`, and that norm."""
    basis = [right / right.norm()]
    for _ in range(columns - 1):
        v = a @ basis[-1]
        for _ in range(2):
            for u in basis:
                v = v - (u @ v) * u
        basis.append(v / v.norm())
    Q = torch.stack(basis, 1)
    x = Q @ torch.linalg.lstsq(a @ Q, right[:, None]).solution[:, 0]
    return x, float((right - a @ x).norm())


def columns_for(a: Tensor, right: Tensor, goal: float) -> int:
    """Return how many columns a Krylov space needs for `‖right − A x‖ ≤ goal`."""
    return next(n for n in range(1, len(right) + 1) if space(a, right, n)[1] <= goal)


def minimiser(a: Tensor, right: Tensor, columns: int) -> Tensor:
    return torch.stack([space(A, r, columns)[0] for A, r in zip(a, right, strict=True)])


@pytest.mark.parametrize("shift", [-1.5, 0.0, 1.5])
def test_gmres_solves_any_linear_force_whatever_its_stability(shift: float) -> None:
    force, a, b = linear(3, shift=shift)
    found = ap.GMRES(tol=1e-11).solve(force, torch.zeros(3, 12).double(), step=0.1)
    assert found.result is R.CONVERGED and found.evaluations <= 2 * (12 + 2)
    torch.testing.assert_close(found.value, torch.linalg.solve(a, -b), rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize("restart", [1, 3, 5])
def test_gmres_takes_the_best_of_a_krylov_space_of_its_restart_and_begins_anew(
    restart: int,
) -> None:
    force, a, _ = linear()
    z = start = randn(2, 12, seed=6)
    for cycles in (1, 2, 3):
        z = z + minimiser(a, -force(z), restart)
        limit = 2 + cycles * (restart + 1)
        found = ap.GMRES(restart=restart, tol=1e-12, max_steps=limit).solve(force, start, step=9.0)
        assert found.evaluations == limit - 1
        torch.testing.assert_close(found.value, z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("restart", [1, 3, 5])
def test_a_newton_step_is_the_best_of_a_krylov_space_of_its_restart(restart: int) -> None:
    force, a, _ = linear()
    start = randn(2, 12, seed=6)
    solver = ap.NewtonKrylov(restart=restart, forcing=1e-9, tol=1e-12, max_steps=restart + 3)
    wrapped, seen = watched(force)
    found = solver.solve(wrapped, start, step=9.0)
    assert found.evaluations == restart + 2
    wanted = start + minimiser(a, -force(start), restart)
    torch.testing.assert_close(found.value, wanted, rtol=1e-5, atol=1e-5)
    near = [float((z - start).norm()) < 1e-5 for z in seen]  # the state, and its differences
    assert near == [True] * (restart + 1) + [False]


@pytest.mark.parametrize("kind", [ap.GMRES, ap.NewtonKrylov])
def test_a_krylov_solver_keeps_no_more_vectors_than_its_restart(kind: type) -> None:
    n = 4000
    rates = torch.linspace(0.1, 3, n, dtype=torch.float64)
    start = torch.zeros(1, n, dtype=torch.float64)

    def vectors(restart: int, max_steps: int) -> float:
        solver = kind(restart=restart, tol=1e-12, max_steps=max_steps)
        force = lambda z: 1 - rates * z  # noqa: E731
        return peak_live_bytes(lambda: solver.solve(force, start, step=0.5)) / (8 * n)

    few, many = vectors(3, 30), vectors(13, 30)
    assert vectors(3, 16) == pytest.approx(few, abs=0.1)  # however long it runs
    assert 9.5 < many - few < 11.5  # ten vectors more, and nothing else
    assert few < 4 + 13  # a basis of four, and what a step holds beside it


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


def test_a_newton_step_makes_some_progress_however_loose_its_forcing() -> None:
    # one direction leaves 95 % of the force, two leave nothing
    sine = 0.95
    turn = tensor(math.sqrt(1 - sine**2), -sine, sine, math.sqrt(1 - sine**2)).view(2, 2)
    solver = ap.NewtonKrylov(tol=1e-3, forcing=0.99, max_steps=5)
    found = solver.solve(lambda z: z @ turn.T + 1, torch.zeros(1, 2).double(), step=1.0)
    assert found.evaluations == 1 + 2 + 1 and found.result is R.CONVERGED


def test_newton_lowers_the_force_at_every_step_and_squares_its_error_at_the_end() -> None:
    plain = contraction()
    force, seen = watched(lambda z: plain(z) - 0.5 * z**3)
    solver = ap.NewtonKrylov(tol=1e-13, forcing=1e-6)
    found = solver.solve(force, 3 * randn(2, 8, seed=11), step=0.5)
    assert found.result is ap.Result.CONVERGED
    # the products' states lie near a step's: what lies far from the one before is a step
    steps = [seen[0]]
    for z in seen[1:]:
        if float((z - steps[-1]).norm() / steps[-1].norm()) > 1e-6:
            steps.append(z)
    norms = [float(size(force(z)).max()) for z in steps]
    assert norms == sorted(norms, reverse=True) and len(norms) >= 4
    logs = [math.log(n) for n in norms if n > 1e-7]
    assert logs[-1] - logs[-2] < 1.5 * (logs[-2] - logs[-3])  # faster than any straight line


def test_newton_halves_a_step_that_does_not_lower_the_force() -> None:
    force, seen = watched(lambda z: -torch.atan(z))
    start = torch.tensor([[3.0]], dtype=torch.float64)  # a whole step leads to −9.5
    found = ap.NewtonKrylov(tol=1e-10).solve(force, start, step=1.0)
    assert found.result is ap.Result.CONVERGED and abs(float(found.value)) < 1e-9
    step = -math.atan(3.0) * (1 + 9.0)
    tried = [float(z) for z in seen if abs(float(z) - 3) > 1e-3][:2]
    assert tried == pytest.approx([3 + step, 3 + step / 2], rel=1e-5)
    # and gives up on one that never does, within its halvings
    flat, calls = watched(lambda z: torch.ones_like(z) + 0 * z)
    lost = ap.NewtonKrylov(halvings=3).solve(flat, start, step=1.0)
    assert lost.result is ap.Result.MAX_STEPS and torch.equal(lost.value, start)
    assert len(calls) <= 2 + 3


@pytest.mark.parametrize("limit", [2, 3, 4, 5])
def test_backtracking_keeps_the_limit_too(limit: int) -> None:
    wrapped, seen = watched(lambda z: -torch.atan(z))
    found = ap.NewtonKrylov(max_steps=limit).solve(wrapped, tensor(30.0).view(1, 1), step=1.0)
    assert len(seen) == found.evaluations <= limit and found.value.tolist() == [[30.0]]


def test_newton_finds_a_point_that_repels_the_relaxation() -> None:
    force = lambda z: z - z**3 / 3 - 0.1  # noqa: E731  unstable near 0.1, stable near ±√3
    z = torch.full((1, 1), 0.2, dtype=torch.float64)
    newton = ap.NewtonKrylov(tol=1e-12).solve(force, z, step=0.1)
    relaxed = ap.Adaptive(tol=1e-8).solve(force, z, step=0.1)
    assert newton.result and relaxed.result
    assert abs(float(newton.value) - 0.1) < 0.01
    assert float(relaxed.value) > 1


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

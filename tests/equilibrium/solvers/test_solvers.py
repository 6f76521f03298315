"""What every solver keeps beside its contract: outcomes, limits, lost and finished samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import altprop as ap
from altprop.equilibrium.solvers.defect import defect_correction
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    better_of,
    conclude,
    relative_residual,
    worst,
)
from systems import Force, linear, randn, size, tensor, watched

R = ap.Result
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("residuals", "tol", "result"),
    [
        ((0.1, 0.2), 0.2, R.CONVERGED),
        ((0.1, 0.21), 0.2, R.MAX_STEPS),
        ((0.0, 0.3), 0.2, R.MAX_STEPS),  # one sample is enough, whatever the mean
        ((0.0, 0.0), 0.2, R.CONVERGED),
        ((5.0, 0.0), 0.0, R.FIXED_TIME),
        ((0.1, NAN), 0.2, R.NON_FINITE),
        ((0.1, INF), 0.2, R.NON_FINITE),
        ((0.1, NAN), 0.0, R.NON_FINITE),
    ],
)
def test_a_solve_ends_as_its_worst_sample(
    residuals: tuple[float, ...], tol: float, result: ap.Result
) -> None:
    assert conclude(tensor(*residuals), tol) is result


def test_a_result_is_true_where_what_was_asked_for_was_done() -> None:
    order = (R.CONVERGED, R.FIXED_TIME, R.MAX_STEPS, R.NON_FINITE)
    assert [bool(r) for r in order] == [True, True, False, False]
    for i, a in enumerate(order):
        for j, b in enumerate(order):
            assert worst(a, b) is order[max(i, j)]


def test_a_residual_is_the_forces_norm_over_the_states_or_over_the_scale() -> None:
    force, state = tensor(3, 4, 0, 1e-9).view(2, 2), tensor(0, 2, 1e-8, 0).view(2, 2)
    assert relative_residual(force, state, None).tolist() == pytest.approx([2.5, 0.1])
    scale = tensor(10, 1e-9)
    assert relative_residual(force, state, scale).tolist() == pytest.approx([0.5, 1.0])
    # a state at zero is far from converged, which is not the same as lost
    at_zero = relative_residual(force, torch.zeros(2, 2).double(), None)
    assert bool(torch.isfinite(at_zero).all()) and float(at_zero.min()) > 1e20
    at_rest = relative_residual(torch.zeros(2, 2), torch.zeros(2, 2), None)
    assert at_rest.tolist() == [0.0, 0.0]


def test_the_better_of_two_is_taken_sample_by_sample_and_a_lost_one_never() -> None:
    def solution(values: Tensor, residual: Tensor, result: ap.Result, n: int) -> ap.Solution:
        return ap.Solution(values.view(5, 1), -values.view(5, 1), residual, n, result)

    old = solution(tensor(1, 2, 3, 4, 5), tensor(0.1, 0.3, NAN, NAN, INF), R.MAX_STEPS, 7)
    new = solution(tensor(10, 20, 30, 40, 50), tensor(0.2, 0.2, 9, NAN, 1), R.NON_FINITE, 4)
    both = better_of(old, new)
    assert both.value.flatten().tolist() == [1, 20, 30, 40, 50]
    assert torch.equal(both.force, -both.value)
    assert both.residual[[0, 1, 2, 4]].tolist() == [0.1, 0.2, 9.0, 1.0]
    assert both.evaluations == 11 and both.result is R.NON_FINITE
    assert better_of(new, old).value.flatten().tolist() == [1, 20, 30, 4, 50]


SOLVERS: list[ap.AbstractSolver] = [
    ap.Anderson(tol=1e-8),
    ap.Anderson(tol=1e-8, ridge=0.1, mixing=0.5, max_steps=300),
    ap.Euler(step=0.5, max_steps=400, tol=1e-8),
    ap.Adaptive(tol=1e-6, max_steps=3000),
    ap.NewtonKrylov(tol=1e-8),
    ap.Fallback(tol=1e-8),
    ap.Fallback(solvers=(ap.Anderson(max_steps=3), ap.NewtonKrylov()), tol=1e-8),
    ap.Scattered(tol=1e-8),
    ap.GMRES(tol=1e-8),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_size_of_a_samples_numbers_changes_nothing_but_their_scale(
    solver: ap.AbstractSolver,
) -> None:
    _, a, b = linear()
    start = randn(2, 12, seed=6)
    factors = torch.tensor([[1.0], [2.0**20]], dtype=torch.float64)  # exact in floating point

    def run(scale: Tensor) -> ap.Solution:
        # the same arithmetic in every sample, however it is batched
        force = lambda z: (a * z[:, None]).sum(2) + scale * b  # noqa: E731
        return solver.solve(force, scale * start, step=0.5)

    plain, scaled = run(torch.ones_like(factors)), run(factors)
    assert plain.result is ap.Result.CONVERGED and scaled.evaluations == plain.evaluations
    torch.testing.assert_close(scaled.value / factors, plain.value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scaled.residual, plain.residual, rtol=1e-6, atol=1e-14)


class Corrected(ap.AbstractSolver):
    """`defect_correction` in a solver's clothes, with an inverse that is only nearly one."""

    tol, max_steps = 1e-8, 100

    def __init__(self, rates: Tensor) -> None:
        self.rates = rates

    def solve(
        self, force: Force, start: Tensor, *, step: float, scale: Tensor | None = None
    ) -> ap.Solution:
        inverse = lambda f: 0.7 * f / self.rates  # noqa: E731
        how = {"tol": self.tol, "max_steps": self.max_steps, "scale": scale}
        return defect_correction(force, inverse, start, **how)


@pytest.mark.parametrize(
    "solver", [*SOLVERS, None], ids=lambda s: "defect_correction" if s is None else repr(s)
)
def test_an_arrived_sample_is_left_as_it_is_to_the_bit_while_its_mates_move(
    solver: ap.AbstractSolver | None,
) -> None:
    rates = torch.linspace(0.6, 1.4, 6, dtype=torch.float64)
    root = randn(3, 6, seed=7)
    nonlinear = not (solver is not None and solver.linear)

    def force(z: Tensor) -> Tensor:
        d = root - z
        return rates * d + (0.3 * d**3 / (1 + d**2) if nonlinear else 0)

    solver = Corrected(rates) if solver is None else solver
    near = root.clone()
    near[0, :2] += 0.01  # two directions, so that a Krylov space is soon enough too
    far = near.clone()
    far[1] = root[1] + 5 * randn(6, seed=9)
    far[2] = root[2] - 20 * randn(6, seed=10)
    still = near.clone()
    still[1:] = root[1:]  # these have nothing to do
    kept, moving = (solver.solve(force, start, step=0.5) for start in (still, far))
    assert kept.result is moving.result is ap.Result.CONVERGED
    assert moving.evaluations > kept.evaluations
    assert torch.equal(kept.value[1:], root[1:])
    for name in ("value", "force", "residual"):
        assert torch.equal(getattr(moving, name)[0], getattr(kept, name)[0]), name


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_start_at_the_root_costs_one_evaluation_and_stays(solver: ap.AbstractSolver) -> None:
    force, a, b = linear()
    root = torch.linalg.solve(a, -b)
    found = solver.solve(force, root, step=0.5)
    assert found.evaluations == 1 and torch.equal(found.value, root)


MATES: list[AbstractSolver] = [
    ap.Anderson(tol=1e-6),
    ap.Euler(step=0.5, max_steps=400, tol=1e-6),
    ap.Adaptive(tol=1e-4),
    ap.NewtonKrylov(tol=1e-6),
    ap.GMRES(tol=1e-6),
]


@pytest.mark.parametrize("solver", MATES, ids=repr)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_lost_sample_costs_its_mates_no_evaluation_and_not_a_bit(
    solver: AbstractSolver, value: float
) -> None:
    rates = torch.linspace(0.6, 1.4, 6, dtype=torch.float64)
    start = torch.randn(3, 6, dtype=torch.float64)
    start[1] = 1.0  # at its root, unless its force is lost

    def force(lost: bool) -> Force:
        def of(z: Tensor) -> Tensor:
            f = rates * (1 - z)
            return torch.stack([f[0], torch.full_like(f[1], value) if lost else f[1], f[2]])

        return of

    alone, beside = (solver.solve(force(lost), start, step=1.0) for lost in (False, True))
    assert alone.result is R.CONVERGED and beside.result is R.NON_FINITE
    assert beside.evaluations == alone.evaluations
    for i in (0, 2):
        assert torch.equal(beside.value[i], alone.value[i])
    assert torch.equal(beside.value[1], start[1])  # its best state is the only one it had


@pytest.mark.parametrize("solver", [ap.Anderson, ap.NewtonKrylov, ap.GMRES])
def test_a_sample_that_leaves_the_forces_domain_is_told_and_keeps_its_best_state(
    solver: type,
) -> None:
    force = lambda z: torch.where(z > 1.5, NAN, 3 * (1 - z))  # noqa: E731
    found = solver(tol=1e-12, max_steps=30).solve(force, tensor(0.5).view(1, 1), step=1.0)
    assert bool(found.value.isfinite().all() & found.residual.isfinite().all())
    if solver is ap.Anderson:  # whose first step leads out
        assert found.result is R.NON_FINITE and found.value.tolist() == [[0.5]]
        assert found.residual.tolist() == [3.0] and found.evaluations == 2  # and no others


@pytest.mark.parametrize(
    "solver", [ap.GMRES, ap.NewtonKrylov, ap.Adaptive, ap.Anderson, ap.Fallback]
)
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 7, 12])
def test_a_limit_of_evaluations_is_kept(solver: type, limit: int) -> None:
    plain, start = linear()[0], randn(2, 12, seed=3)
    force, seen = watched(plain)
    found = solver(tol=1e-13, max_steps=limit).solve(force, start, step=0.3)
    assert len(seen) == found.evaluations <= limit and found.result is R.MAX_STEPS
    if issubclass(solver, (ap.GMRES, ap.NewtonKrylov)):  # what products cost is used for a step
        moved = bool((size(found.force) < size(plain(start))).all())
        assert moved == (limit >= 3)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (ap.Euler, {"step": 0.0}),
        (ap.Euler, {"step": "0.1"}),
        (ap.Anderson, {"memory": 0}),
        (ap.Anderson, {"memory": 2.5}),
        (ap.Anderson, {"ridge": 0.0}),
        (ap.Anderson, {"ridge": None}),
        (ap.Anderson, {"mixing": NAN}),
        (ap.Anderson, {"tol": "1e-3"}),
        (ap.Anderson, {"max_steps": "60"}),
        (ap.Fallback, {"solvers": ()}),
        (ap.Fallback, {"solvers": (ap.Anderson,)}),
        (ap.GMRES, {"restart": 0}),
        (ap.NewtonKrylov, {"forcing": 2.0}),
        (ap.Adaptive, {"rtol": 0}),
        (ap.Adaptive, {"rtol": None}),
        (ap.Scattered, {"solver": ap.Anderson}),
        (ap.Scattered, {"starts": 0}),
        (ap.Scattered, {"spread": -1.0}),
        (ap.Scattered, {"spread": None}),
    ],
)
def test_a_field_that_no_solve_can_honour_is_refused_by_name(
    kind: type, wrong: dict[str, Any]
) -> None:
    (field,) = wrong
    with pytest.raises(ap.ConfigError, match=rf"{kind.__name__}.*{field}.*expected"):
        kind(**wrong)


DEFAULTS = [
    "Anderson(memory=5, tol=0.0007, max_steps=100, ridge=1e-08, mixing=1.0)",
    "Euler(step=0.1, max_steps=120, tol=0.0)",
    "FixedPoint(tol=0.001, max_steps=100)",
    "Adaptive(tol=0.0007, max_steps=600, rtol=0.001, atol=1e-09)",
    "NewtonKrylov(tol=0.0007, max_steps=300, restart=30, forcing=0.1, halvings=12)",
    "GMRES(restart=30, tol=0.001, max_steps=100)",
    "Scattered(solver=NewtonKrylov(tol=0.0007, max_steps=300, restart=30, "
    "forcing=0.1, halvings=12), starts=40, spread=16.0, seed=0, tol=0.0007, max_steps=10000)",
]


@pytest.mark.parametrize("text", DEFAULTS)
def test_defaults_are_those_of_the_pages(text: str) -> None:
    assert repr(getattr(ap, text.partition("(")[0])()) == text

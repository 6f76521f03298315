"""What is said of a solve, and where a module lands: every outcome by hand.

Shapes: states are `(B, n)`; a force that is `c − z` per sample makes residuals easy to place.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from instances import system
from torch import Tensor

import altprop as ap
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Force,
    Landing,
    better_of,
    conclude,
    land,
    relative_residual,
    worst,
)

R = ap.Result
NAN, INF = math.nan, math.inf


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


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
    assert [bool(r) for r in (R.CONVERGED, R.FIXED_TIME, R.MAX_STEPS, R.NON_FINITE)] == [
        True,
        True,
        False,
        False,
    ]
    order = (R.CONVERGED, R.FIXED_TIME, R.MAX_STEPS, R.NON_FINITE)
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


def solution(value: Tensor, residual: Tensor, result: ap.Result, n: int) -> ap.Solution:
    return ap.Solution(value, -value, residual, n, result)


def test_the_better_of_two_is_taken_sample_by_sample_and_a_lost_one_never() -> None:
    old = solution(
        tensor(1, 2, 3, 4, 5).view(5, 1), tensor(0.1, 0.3, NAN, NAN, INF), R.MAX_STEPS, 7
    )
    new = solution(
        tensor(10, 20, 30, 40, 50).view(5, 1), tensor(0.2, 0.2, 9.0, NAN, 1.0), R.NON_FINITE, 4
    )
    both = better_of(old, new)
    assert both.value.flatten().tolist() == [1, 20, 30, 40, 50]
    assert both.force.flatten().tolist() == [-1, -20, -30, -40, -50]
    assert both.residual[:3].tolist() == [0.1, 0.2, 9.0] and float(both.residual[4]) == 1.0
    assert both.evaluations == 11 and both.result is R.NON_FINITE
    kept = better_of(new, old)
    assert kept.value.flatten().tolist() == [1, 20, 30, 4, 50]


# ------------------------------------------------------------------------------------- landing


@dataclass(frozen=True)
class Scripted(ap.AbstractSolver):
    """A solver that answers its first call as told, and any other by `resume`."""

    told: ap.Solution
    resume: Callable[[ap.AbstractSolver, Tensor], ap.Solution]
    tol: float
    max_steps: int

    def solve(self, force: Force, start: Tensor, **how: Any) -> ap.Solution:
        return self.told if start is self.told.value else self.resume(self, start)

    def stride(self, step: float) -> float:
        return step


class Land:
    """Land on states that are given, and keep what was evaluated and resumed."""

    root = 1.0

    def __init__(
        self,
        value: tuple[float, ...],
        ahead: tuple[float, ...],
        tol: float,
        *,
        lost: Callable[[Tensor], Tensor] = lambda z: z > 1e9,
        result: ap.Result = R.CONVERGED,
        again: float | None = None,
        limit: int = 20,
    ) -> None:
        self.resumed: list[list[float]] = []
        self.evaluated = 0
        start, next_ = tensor(*value).view(-1, 1), tensor(*ahead).view(-1, 1)
        residual = relative_residual(torch.where(lost(start), NAN, self.root - start), start, None)
        # one step of size one goes to the given states
        first = ap.Solution(start, next_ - start, residual, 5, result)

        def force(z: Tensor) -> Tensor:
            self.evaluated += 1
            return torch.where(lost(z), NAN, self.root - z)

        def resume(own: ap.AbstractSolver, z: Tensor) -> ap.Solution:
            assert own.max_steps == limit - 5 and own.tol == tol
            self.resumed.append(rounded(z))
            end = torch.full_like(z, self.root if again is None else again)
            residual = relative_residual(self.root - end, end, None)
            told = R.CONVERGED if again is None else R.NON_FINITE
            return ap.Solution(end, self.root - end, residual, 3, told)

        self.found: Landing = land(Scripted(first, resume, tol, limit), force, start, step=1.0)
        self.state = rounded(self.found.state)


def rounded(z: Tensor) -> list[float]:
    return [round(number, 9) for number in z.flatten().tolist()]


def test_where_the_next_state_is_solved_it_is_taken_as_it_is() -> None:
    done = Land((1.1, 0.8), (1.001, 1.0), 1e-2)
    assert not done.resumed and done.found.evaluations == 6 and done.evaluated == 1
    assert done.state == [1.001, 1.0]
    assert done.found.residual.tolist() == pytest.approx([0.001 / 1.001, 0.0])
    assert done.found.reached.tolist() == pytest.approx([0.001 / 1.001, 0.0])
    assert done.found.result is R.CONVERGED


def test_where_the_state_before_was_solved_the_next_one_is_taken_without_another_attempt() -> None:
    done = Land((1.005,), (1.1,), 1e-2)
    assert not done.resumed and done.state == [1.1]
    assert done.found.residual.tolist() == pytest.approx([0.1 / 1.1])
    assert done.found.reached.tolist() == pytest.approx([0.005 / 1.005])
    assert done.found.result is R.CONVERGED


def test_what_falls_short_goes_on_from_the_nearer_state_and_what_arrived_stays() -> None:
    done = Land((1.5, 1.2, 1.001), (1.2, 1.5, 1.3), 1e-2)
    assert done.resumed == [[1.2, 1.2, 1.001]]
    assert done.state == [1.0, 1.0, 1.3]
    assert done.found.evaluations == 5 + 1 + 3 + 1 and done.evaluated == 2
    # the third sample's own certificate is not the second attempt's business
    assert done.found.residual.tolist() == pytest.approx([0, 0, 0.3 / 1.3])
    assert done.found.result is R.CONVERGED


def test_a_next_state_that_is_lost_is_taken_back() -> None:
    done = Land((1.5,), (50.0,), 1e-2, lost=lambda z: z > 10)
    assert done.resumed == [[1.5]] and done.found.result is R.CONVERGED
    # even where the state before had been solved: what is returned is not
    near = Land((1.001,), (50.0,), 1e-2, lost=lambda z: z > 10)
    assert near.resumed == [[1.001]] and near.found.result is R.CONVERGED


def test_a_sample_that_was_lost_before_is_told_and_costs_its_mates_nothing() -> None:
    done = Land((1.001, 50.0), (1.0, 50.0), 1e-2, lost=lambda z: z > 10, result=R.NON_FINITE)
    assert not done.resumed and done.found.result is R.NON_FINITE
    # beside a mate that needs a second attempt it still is
    both = Land((1.5, 50.0), (1.3, 50.0), 1e-2, lost=lambda z: z > 10, result=R.NON_FINITE)
    assert len(both.resumed) == 1


def test_a_second_attempt_that_ran_away_is_told_though_its_best_state_is_not_lost() -> None:
    done = Land((1.5,), (1.4,), 1e-2, again=1.3)
    assert done.resumed == [[1.4]] and done.state == [1.3]
    assert done.found.result is R.NON_FINITE and bool(done.found.residual.isfinite().all())


def test_two_attempts_together_keep_to_the_limit() -> None:
    assert Land((1.5,), (1.2,), 1e-2, limit=6).resumed == [[1.2]]
    spent = Land((1.5,), (1.2,), 1e-2, limit=5)
    assert not spent.resumed and spent.found.evaluations == 6
    assert spent.found.result is R.MAX_STEPS and spent.state == [1.2]


def test_a_fixed_time_has_no_second_attempt() -> None:
    done = Land((5.0,), (4.0,), 0.0, result=R.FIXED_TIME)
    assert not done.resumed and done.found.result is R.FIXED_TIME
    assert done.state == [4.0]


@pytest.mark.parametrize(
    ("solver", "stride"),
    [
        (ap.Euler(step=0.3, max_steps=3), 0.3),
        (ap.Anderson(max_steps=4, tol=0), 0.7),
        (ap.Anderson(max_steps=4, tol=0, mixing=0.5), 0.35),
        (ap.NewtonKrylov(), 0.0),
        (ap.GMRES(), 0.0),
        (ap.Adaptive(), 0.0),
        (ap.Fallback(), 0.7),
        (ap.Fallback((ap.NewtonKrylov(), ap.Anderson())), 0.0),
        (ap.Scattered(), 0.0),
    ],
    ids=repr,
)
def test_a_relaxing_solver_goes_on_by_its_own_step_and_another_stays(
    solver: AbstractSolver, stride: float
) -> None:
    assert solver.stride(0.7) == pytest.approx(stride)


def test_a_failure_to_arrive_is_told() -> None:
    s = system("gated", seed=3)
    block = ap.Equilibrium(s.dynamics, ap.Anderson(tol=1e-9, max_steps=4), on_failure="accept")
    block(s.x)
    seen = block.certificate
    assert seen is not None and seen.result is ap.Result.MAX_STEPS
    assert seen.free_evaluations == 4 + 1  # the limit, and what is recorded
    with pytest.raises(ap.ConvergenceError, match="free phase"):
        ap.Equilibrium(s.dynamics, ap.Anderson(tol=1e-9, max_steps=4))(s.x)


@pytest.mark.parametrize("own", [True, False])
def test_what_no_plain_step_solves_gets_none(own: bool) -> None:
    """`Implicit`'s residual is that of what it returns, where the solver needs no stable step."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    J = -(q * torch.linspace(5, 100, 24, dtype=torch.float64)) @ q.T
    dynamics = ap.from_function(lambda z, x: z @ J.T + x)
    x, w = torch.randn(2, 3, 24, dtype=torch.float64)
    x.requires_grad_()
    solver = ap.GMRES() if own else None
    block = ap.Equilibrium(dynamics, ap.NewtonKrylov(tol=1e-10), ap.Implicit(solver=solver))
    (block(x) * w).sum().backward()
    assert x.grad is not None and block.certificate is not None
    residual = (x.grad @ J + w).norm(dim=1) / w.norm(dim=1)
    assert block.certificate.adjoint_residual is not None
    assert torch.allclose(residual, block.certificate.adjoint_residual, rtol=1e-6)


@pytest.mark.parametrize("kind", ["damped", "gated"])
def test_the_value_is_one_natural_step_past_the_state_that_is_certified(kind: str) -> None:
    s = system(kind, seed=1)
    block = ap.Equilibrium(s.dynamics, ap.Anderson(tol=1e-2))
    with torch.no_grad():
        z, state = block(s.x), block.certificate.state
        ahead = state + s.dynamics.step * s.dynamics(state, s.x)
    assert torch.allclose(z, ahead, rtol=1e-12) and not torch.allclose(z, state, rtol=1e-6)


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

    def force(lost: bool) -> Callable[[Tensor], Tensor]:
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
def test_a_sample_that_is_lost_on_the_way_keeps_its_best_state(solver: type) -> None:
    # the first step leads out of the force's domain
    force = lambda z: torch.where(z > 2, NAN, 3 * (1 - z))  # noqa: E731
    start = tensor(0.5).view(1, 1)
    found = solver(tol=1e-12, max_steps=2 if solver is ap.Anderson else 30).solve(
        force, start, step=1.0
    )
    assert bool(torch.isfinite(found.value).all() & torch.isfinite(found.residual).all())


DEFAULTS = {
    ap.Anderson: {"memory": 5, "tol": 7e-4, "max_steps": 100, "ridge": 1e-8, "mixing": 1.0},
    ap.Euler: {"step": 0.1, "max_steps": 120, "tol": 0.0},
    ap.FixedPoint: {"tol": 1e-3, "max_steps": 100},
    ap.Adaptive: {"tol": 7e-4, "max_steps": 600, "rtol": 1e-3, "atol": 1e-9},
    ap.NewtonKrylov: {
        "tol": 7e-4,
        "max_steps": 300,
        "restart": 30,
        "forcing": 0.1,
        "halvings": 12,
    },
    ap.GMRES: {"restart": 30, "tol": 1e-3, "max_steps": 100},
    ap.Scattered: {
        "solver": ap.NewtonKrylov(),
        "starts": 40,
        "spread": 16.0,
        "seed": 0,
        "tol": 7e-4,
        "max_steps": 10_000,
    },
    ap.OneStep: {"k": 1, "certify": False},
    ap.Implicit: {"tol": 2.5e-3, "max_steps": 100, "solver": None},
    ap.DyadicEP: {"tol": 1e-3, "max_steps": 100, "nudge": "linear", "solver": None},
    ap.PublishedEP: {"step": 0.1, "steps": 20, "beta": 0.02, "nudge": "cost"},
    ap.PublishedAEP: {"step": 0.1, "steps": 20, "beta": 0.02, "nudge": "cost", "clip": True},
}


@pytest.mark.parametrize("kind", DEFAULTS, ids=lambda k: k.__name__)
def test_defaults_are_those_of_the_pages(kind: type) -> None:
    found = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    assert found == DEFAULTS[kind]


@pytest.mark.parametrize("kind", [k for k in DEFAULTS if issubclass(k, AbstractSolver)])
@pytest.mark.parametrize("tol", [-1e-9, NAN, INF])
def test_a_tolerance_below_zero_or_none_at_all_is_refused(kind: type, tol: float) -> None:
    with pytest.raises(ap.ConfigError, match="tol is .*, expected a number ≥ 0"):
        kind(tol=tol)

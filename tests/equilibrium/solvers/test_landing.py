"""Where a module lands: a state to go on to, and a second attempt where that falls short."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import altprop as ap
from altprop.equilibrium.solvers.landing import Landing, land
from altprop.equilibrium.solvers.solver import AbstractSolver, Force, relative_residual
from systems import tensor

R = ap.Result
NAN = math.nan


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
        record: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.resumed: list[list[float]] = []
        self.evaluated = 0
        start, next_ = tensor(*value).view(-1, 1), tensor(*ahead).view(-1, 1)
        residual = relative_residual(torch.where(lost(start), NAN, self.root - start), start, None)
        # one step of size one goes to the given states
        first = ap.Solution(start, next_ - start, residual, 5, result)

        def force(z: Tensor) -> Tensor:
            self.evaluated += 1
            return torch.where(lost(z), NAN, self.root - z) if record is None else record(z)

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


@pytest.mark.parametrize("ahead", [1.1, 0.5, 50.0])
def test_a_step_that_leads_out_of_the_tolerance_is_undone_at_one_evaluation(ahead: float) -> None:
    done = Land((1.005, 0.8), (ahead, 1.001), 1e-2, lost=lambda z: z > 10)
    assert not done.resumed and done.state == [1.005, 1.001]
    assert done.evaluated == 2 and done.found.evaluations == 5 + 2
    residual = pytest.approx([0.005 / 1.005, 0.001 / 1.001])
    assert done.found.residual.tolist() == done.found.reached.tolist() == residual
    assert done.found.result is R.CONVERGED
    # what is given out is another step on, but not where the last one was too long
    assert rounded(done.found.value()) == [1.005, 1.0]


def test_what_no_further_attempt_is_left_for_keeps_the_nearer_state() -> None:
    done = Land((1.2, 1.2), (1.5, 1.1), 1e-2, limit=5)
    assert not done.resumed and done.state == [1.2, 1.1]
    assert done.found.result is R.MAX_STEPS and done.evaluated == 2


def test_a_step_that_grows_within_the_tolerance_is_not_followed_by_one_that_leads_out() -> None:
    done = Land((1.001, 1.001, 1.0), (1.0025, 1.005, 1.0), 1e-2)
    assert done.evaluated == 1 and done.state == [1.0025, 1.005, 1.0]
    assert rounded(done.found.value()) == [1.0, 1.005, 1.0]  # 0.0025 · 2.5 is within, 0.005 · 5 not


@pytest.mark.parametrize("ahead", [1.001, 1.3])
def test_a_force_that_is_another_one_when_it_is_recorded_has_not_converged(ahead: float) -> None:
    apart = Land((1.001,), (ahead,), 1e-2, record=lambda z: 1.2 - z)
    assert apart.found.apart and apart.found.result is R.MAX_STEPS
    assert float(apart.found.reached) == pytest.approx(0.199 / 1.001)
    rounded_otherwise = Land((1.0099,), (1.5,), 1e-2, record=lambda z: 0.9995 - z)
    assert not rounded_otherwise.found.apart and rounded_otherwise.found.result is R.CONVERGED


def test_what_falls_short_goes_on_from_the_nearer_state_and_what_arrived_stays() -> None:
    done = Land((1.5, 1.2, 1.001), (1.2, 1.5, 1.3), 1e-2)
    assert done.resumed == [[1.2, 1.2, 1.001]]
    assert done.state == [1.0, 1.0, 1.001]
    assert done.found.evaluations == 5 + 1 + 3 + 1 and done.evaluated == 2
    # the third sample's own certificate is not the second attempt's business
    assert done.found.residual.tolist() == pytest.approx([0, 0, 0.001 / 1.001])
    assert done.found.result is R.CONVERGED


def test_a_next_state_that_is_lost_is_taken_back() -> None:
    done = Land((1.5,), (50.0,), 1e-2, lost=lambda z: z > 10)
    assert done.resumed == [[1.5]] and done.found.result is R.CONVERGED


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


def test_a_chain_steps_on_by_the_solver_that_each_sample_was_solved_by() -> None:
    rates = tensor(0.8, 0.1, 30.0)  # contracts, needs many steps, and throws plain steps far off
    force = lambda z: rates[:, None] * (1 - z)  # noqa: E731
    start = torch.full((3, 1), 2.0, dtype=torch.float64)
    slow = ap.Euler(step=0.5, max_steps=200)
    chain = ap.Fallback((ap.FixedPoint(max_steps=8), slow, ap.NewtonKrylov()), tol=1e-4)
    found = chain.solve(force, start, step=1.0)
    assert found.stride is not None and found.stride.tolist() == [1.0, 0.5, 0.0]
    for i, rate in enumerate(rates):  # and no batch-mate changes it
        alone = chain.solve(lambda z, rate=rate: rate * (1 - z), start[[i]], step=1.0)
        assert alone.stride is not None and float(alone.stride) == float(found.stride[i])

"""EP is the contrast of equilibria, and an estimator's own solver is asked for what it says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from dense import B, Case, N, randn, size
from torch import Tensor

import altprop as ap
from altprop.equilibrium.dynamics.products import AutogradLinearisation

# ------------------------------------------------------------------------------------------- EP


@pytest.mark.parametrize("nudge", ["linear", "cost"])
@pytest.mark.parametrize("sides", [1, 2, 4])
def test_ep_contrasts_the_nudged_equilibria(sides: int, nudge: str) -> None:
    case, beta = Case(scale=3.0), 0.1
    run = case.run(ap.EP(beta=beta, tol=1e-11, sides=sides, nudge=nudge))  # type: ignore[arg-type]
    z, unit = run.said.state, run.g / size(run.g)[:, None]

    def equilibrium(b: float) -> Tensor:
        """Return the zero of `F(z) − b g`, the nudge being in units of a cotangent of norm 1."""
        m, eye = z, torch.eye(N, dtype=torch.float64)
        # the loss is three times the cost, whose gradient at z* is the cotangent's direction
        per = 1 / size(run.g / 3.0)[:, None]
        for _ in range(40):
            own = unit if nudge == "linear" else per * (randn(B, N, seed=3) + m**2)
            slope = 0.0 if nudge == "linear" else (per * 2 * m)[:, :, None] * eye
            drive = case.force(m, run.x) - b * own
            m = m - torch.linalg.solve(case.jacobian(m) - b * slope, drive)
        return m

    pair = (equilibrium(-beta) - equilibrium(beta)) / (2 * beta)
    half = (equilibrium(-beta / 2) - equilibrium(beta / 2)) / beta
    a = {1: (z - equilibrium(beta)) / beta, 2: pair, 4: (4 * half - pair) / 3}[sides]
    torch.testing.assert_close(run.a, a * size(run.g)[:, None], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(run.said.beta, torch.full((B,), beta, dtype=torch.float64))
    # far from the gradient, which it is where the Jacobian is symmetric
    exact = -torch.linalg.solve(run.J.transpose(1, 2), run.g)
    assert float((run.a - exact).norm() / exact.norm()) > 0.1


@pytest.mark.parametrize("response", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("rate", [0.05, 40.0])
def test_ep_finds_the_nudge_of_its_response_where_the_first_guess_is_far_off(
    rate: float, response: float
) -> None:
    # one step of the natural map is a twentieth of what the equilibrium answers, or 20 times it
    dynamics = ap.from_function(lambda z, x: x - rate * z - 0.1 * rate * z**3, step=0.5)
    x = randn(B, N, seed=2).requires_grad_()
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    block = ap.Equilibrium(dynamics, ap.NewtonKrylov(tol=1e-12), ap.EP(response=response, tol=1e-6))
    z = block(x)
    hook = dynamics.register_forward_hook(count)
    z.sum().backward()
    hook.remove()
    said = block.certificate
    assert said is not None and said.response is not None and said.beta is not None
    assert bool(((said.response > response / 4) & (said.response < 4 * response)).all())
    assert said.adjoint_evaluations == calls[0]
    # and it is the measured one: the response to the nudge that is reported
    state, g = said.state, torch.ones(B, N, dtype=torch.float64) / math.sqrt(N)
    ends = []
    for sign in (1, -1):
        m = state
        for _ in range(60):
            drive = x.detach() - rate * m - 0.1 * rate * m**3 - sign * said.beta[:, None] * g
            m = m + drive / (rate + 0.3 * rate * m**2)
        ends.append(size(m - state) / size(state))
    torch.testing.assert_close(said.response, torch.maximum(*ends), rtol=1e-3, atol=0)


@pytest.mark.parametrize("response", [1e-4, 1e-3, 1e-2])
def test_ep_begins_with_the_answer_of_one_step_which_is_all_that_a_plain_decay_needs(
    response: float,
) -> None:
    decay = ap.from_function(lambda z, x: 2.0 * (x - z), step=0.5)
    block = ap.Equilibrium(decay, estimator=ap.EP(response=response, tol=1e-9))
    x = randn(B, N, seed=2).requires_grad_()
    block(x).square().sum().backward()
    said = block.certificate
    assert said is not None and said.response is not None and x.grad is not None
    assert said.adjoint_evaluations == 2  # and the first guess of the nudge holds
    torch.testing.assert_close(said.response, torch.full((B,), response).double())
    torch.testing.assert_close(x.grad, 2 * x.detach())


# ------------------------------------------------------------------------------------ own solvers


@dataclass(frozen=True)
class Heard(ap.AbstractSolver):
    """A solver that keeps what it was asked and what it found."""

    tol: float = 1e-3
    max_steps: int = 200

    asked: ClassVar[list[tuple[float, int, Tensor, ap.Solution]]] = []

    def solve(self, force: Any, start: Tensor, **how: Any) -> ap.Solution:
        own = ap.NewtonKrylov(tol=self.tol, max_steps=self.max_steps)
        found = own.solve(force, start, **how)
        self.asked.append((self.tol, self.max_steps, start, found))
        return found


@pytest.mark.parametrize(
    ("make", "tol", "phases", "per"),
    [
        (ap.Implicit, 0.4, 1, 1),  # held to 0.4 of the tolerance, for no step follows
        (ap.DyadicEP, 1.0, 1, 3),  # a force, a linearisation and a product each
        (ap.EP, 1.0, 2, 1),
        (partial(ap.EP, sides=1), 1.0, 1, 1),
    ],
    ids=["Implicit", "DyadicEP", "EP", "EP, one side"],
)
def test_an_estimators_own_solver_gets_its_tolerance_and_limit_and_its_work_is_counted(
    make: Any, tol: float, phases: int, per: int
) -> None:
    Heard.asked.clear()
    run = Case().run(make(tol=1e-5, max_steps=77, solver=Heard()))
    assert len(Heard.asked) == phases
    for asked, limit, _, found in Heard.asked:
        assert asked == pytest.approx(tol * 1e-5) and limit == 77
        assert found.result is ap.Result.CONVERGED
    work = per * sum(found.evaluations for *_, found in Heard.asked)
    linearised = make is ap.Implicit or make is ap.DyadicEP
    assert run.said.adjoint_evaluations == work + linearised


def test_a_second_guess_of_the_nudge_goes_on_from_the_first_answer() -> None:
    Heard.asked.clear()
    dynamics = ap.from_function(lambda z, x: x - 0.05 * z, step=0.5)
    block = ap.Equilibrium(dynamics, ap.NewtonKrylov(tol=1e-12), ap.EP(tol=1e-6, solver=Heard()))
    block(randn(B, N, seed=2).requires_grad_()).sum().backward()
    (*_, first), (_, _, start, second), (_, _, mirrored, _) = Heard.asked
    assert torch.equal(start, first.value) and torch.equal(mirrored, -second.value)


class Nearly(ap.AbstractDynamics):
    """`F = x − z + z Aᵀ`, whose linearisation offers an inverse that is a tenth too small."""

    step = 0.8

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x - z + z @ Case().matrix.T

    def linearise(self, z: Tensor, x: Tensor) -> AutogradLinearisation:
        J = Case().matrix - torch.eye(N, dtype=torch.float64)

        class WithInverse(AutogradLinearisation):
            def inverse(self, *, transposed: bool) -> Any:
                return lambda r: -0.9 * torch.linalg.solve(J.T if transposed else J, r.T).T

        return WithInverse(lambda state: self(state, x), z)


@pytest.mark.parametrize("solver", [None, ap.Euler(step=0.5)], ids=repr)
def test_implicit_corrects_by_an_inverse_alone_and_relaxes_by_a_solver_that_is_given(
    solver: ap.AbstractSolver | None,
) -> None:
    tol = 0.05
    block = ap.Equilibrium(Nearly(), ap.Anderson(tol=1e-12), ap.Implicit(tol=tol, solver=solver))
    x = randn(B, N, seed=2).requires_grad_()
    z = block(x)
    g = randn(B, N, seed=3)
    z.backward(g)
    said = block.certificate
    assert said is not None and said.adjoint_remainder is not None and x.grad is not None
    J = Case().matrix - torch.eye(N, dtype=torch.float64)
    left = (x.grad @ J + g) / size(g)[:, None]
    r = said.adjoint_remainder
    after = r if solver is None else r + 0.5 * r @ J
    torch.testing.assert_close(left, after, rtol=1e-9, atol=1e-13)
    assert float(size(r).max()) <= (0.4 * tol if solver is None else tol)
    if solver is None:  # each correction leaves a tenth
        torch.testing.assert_close(said.adjoint_residual, size(left))


def test_dyadic_corrects_each_half_of_the_pair_by_its_own_inverse() -> None:
    block = ap.Equilibrium(Nearly(), ap.Anderson(tol=1e-2), ap.DyadicEP(tol=1e-9))
    x = randn(B, N, seed=2).requires_grad_()
    g = randn(B, N, seed=3)
    block(x).backward(g)
    said = block.certificate
    assert said is not None and said.adjoint_result is ap.Result.CONVERGED
    # a tenth is left by each correction, and every evaluation is a force, a Jacobian, a product
    assert said.adjoint_evaluations <= 3 * 12 + 1

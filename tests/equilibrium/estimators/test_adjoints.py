"""What estimators report beside the adjoint, against dense Jacobians and loops written out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import altprop as ap
from altprop.equilibrium.dynamics.products import AutogradLinearisation
from systems import B, Case, N, randn, size

# Implicit


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
@pytest.mark.parametrize("solver", [ap.GMRES(), ap.GMRES(restart=2), ap.NewtonKrylov()], ids=repr)
@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
def test_implicits_residual_is_the_true_one_of_what_it_returns_where_no_step_follows(
    tol: float, solver: ap.AbstractSolver, scale: float
) -> None:
    run = Case(scale=scale).run(ap.Implicit(tol=tol, solver=solver))
    torch.testing.assert_close(run.said.adjoint_remainder, run.left(), rtol=1e-5, atol=1e-13)
    torch.testing.assert_close(run.said.adjoint_residual, size(run.left()), rtol=1e-5, atol=1e-13)
    assert float(size(run.left()).max()) <= 0.4 * tol  # for the error of one step more
    assert run.said.adjoint_result is ap.Result.CONVERGED


@pytest.mark.parametrize("solver", [None, ap.Euler(step=0.5), ap.Anderson(mixing=0.6)], ids=repr)
def test_implicits_residual_is_that_before_its_last_step_where_one_follows(
    solver: ap.AbstractSolver | None,
) -> None:
    run = Case().run(ap.Implicit(tol=1e-3, solver=solver))
    r = run.said.adjoint_remainder
    torch.testing.assert_close(run.said.adjoint_residual, size(r))
    assert float(size(r).max()) <= 1e-3
    stride = {None: 0.8, ap.Euler(step=0.5): 0.5, ap.Anderson(mixing=0.6): 0.8 * 0.6}[solver]
    after = r + stride * torch.einsum("bji,bj->bi", run.J, r)
    torch.testing.assert_close(run.left(), after, rtol=1e-9, atol=1e-14)
    assert bool((size(after) < size(r)).all())


def test_an_adjoint_that_is_not_solved_is_told_and_its_residual_is_true() -> None:
    run = Case().run(ap.Implicit(tol=1e-9, max_steps=4, solver=ap.GMRES()))
    assert run.said.adjoint_result is ap.Result.MAX_STEPS
    torch.testing.assert_close(run.said.adjoint_residual, size(run.left()))
    assert float(run.said.adjoint_residual.min()) > 1e-9


@pytest.mark.parametrize("own", [ap.GMRES(), None], ids=repr)
def test_what_no_plain_step_solves_gets_none(own: ap.AbstractSolver | None) -> None:
    q = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    J = -(q * torch.linspace(5, 100, 24, dtype=torch.float64)) @ q.T
    dynamics = ap.from_function(lambda z, x: z @ J.T + x)
    x, w = torch.randn(2, 3, 24, dtype=torch.float64)
    block = ap.Equilibrium(dynamics, ap.NewtonKrylov(tol=1e-10), ap.Implicit(solver=own))
    (block(x.requires_grad_()) * w).sum().backward()
    left = size(x.grad @ J + w) / size(w)
    torch.testing.assert_close(block.certificate.adjoint_residual, left, rtol=1e-6, atol=0)


class Nearly(ap.AbstractDynamics):
    """`F = x − z + z Aᵀ`, whose linearisation offers an inverse that is a tenth too small."""

    step = 0.8

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x - z + z @ Case().matrix.T

    def linearise(self, z: Tensor, x: Tensor) -> AutogradLinearisation:
        class WithInverse(AutogradLinearisation):
            def inverse(self, *, transposed: bool) -> Any:
                return lambda r: (
                    -0.9 * torch.linalg.solve(NEARLY.T if transposed else NEARLY, r.T).T
                )

        return WithInverse(lambda state: self(state, x), z)


NEARLY = Case().matrix - torch.eye(N, dtype=torch.float64)


@pytest.mark.parametrize("solver", [None, ap.Euler(step=0.5)], ids=repr)
def test_implicit_corrects_by_an_inverse_alone_and_relaxes_by_a_solver_that_is_given(
    solver: ap.AbstractSolver | None,
) -> None:
    tol = 0.05
    block = ap.Equilibrium(Nearly(), ap.Anderson(tol=1e-12), ap.Implicit(tol=tol, solver=solver))
    x, g = randn(B, N, seed=2).requires_grad_(), randn(B, N, seed=3)
    block(x).backward(g)
    said = block.certificate
    left = (x.grad @ NEARLY + g) / size(g)[:, None]
    r = said.adjoint_remainder
    after = r if solver is None else r + 0.5 * r @ NEARLY
    torch.testing.assert_close(left, after, rtol=1e-9, atol=1e-13)
    assert float(size(r).max()) <= (0.4 * tol if solver is None else tol)
    if solver is None:  # each correction leaves a tenth
        torch.testing.assert_close(said.adjoint_residual, size(left))


# DyadicEP


@pytest.mark.parametrize("loose", [1e-2, 1e-4])
def test_dyadic_reports_how_far_its_midpoint_went_from_the_free_state(loose: float) -> None:
    case = Case()
    run = case.run(ap.DyadicEP(tol=1e-11), ap.Anderson(tol=loose))
    z, m = run.said.state, case.root(run.x, run.said.state)
    wanted = size(m - z) / size(z)
    torch.testing.assert_close(run.said.response, wanted, rtol=1e-5, atol=0)
    assert 0 < float(wanted.min()) <= float(wanted.max()) <= 3 * loose
    # and the adjoint is that of the midpoint, not of the state where the free phase stopped
    assert float(size(run.left(m)).max()) < 1e-9 < float(size(run.left()).min())


def test_a_dyadic_cost_nudge_follows_the_costs_gradient_to_the_midpoint() -> None:
    case = Case()
    run = case.run(ap.DyadicEP(tol=1e-11, nudge="cost"), ap.Anderson(tol=1e-3))
    m = case.root(run.x, run.said.state)
    # the loss's own at the free state, and what the cost's gradient changes from there
    pull = run.g + m**2 - run.said.state**2
    left = torch.einsum("bji,bj->bi", case.jacobian(m), run.a) + pull
    assert float((size(left) / size(run.g)).max()) < 1e-9


def test_dyadic_begins_at_the_free_state_and_one_step_of_the_cotangent() -> None:
    case = Case()
    run = case.run(ap.DyadicEP(max_steps=1, solver=ap.Anderson()), ap.Anderson(tol=1e-2))
    z = run.said.state
    midpoint, difference = run.said.nudged_residuals
    # the one is relative to the state's norm, the other to the nudge
    torch.testing.assert_close(midpoint, size(case.force(z, run.x)) / size(z))
    torch.testing.assert_close(run.a, case.step * run.g)
    torch.testing.assert_close(difference, size(run.left()))
    assert not run.said.response.any() and run.said.adjoint_result is ap.Result.MAX_STEPS


def test_dyadic_reports_the_residuals_of_its_midpoint_and_of_its_difference() -> None:
    case = Case(scale=100.0)
    run = case.run(ap.DyadicEP(tol=1e-3), ap.Euler(step=0.8, max_steps=100, tol=1e-2))
    midpoint, difference = run.said.nudged_residuals
    both = (midpoint**2 + difference**2).sqrt()
    torch.testing.assert_close(run.said.adjoint_residual, both, rtol=1e-9, atol=0)
    assert float(both.max()) <= 1e-3
    torch.testing.assert_close(difference, size(run.said.adjoint_remainder))
    # the midpoint is within the free phase's tolerance of z*, and J taken there
    assert bool((size(run.left(case.root(run.x, run.said.state))) < difference + 3e-3).all())


def test_dyadic_corrects_each_half_of_the_pair_by_its_own_inverse() -> None:
    block = ap.Equilibrium(Nearly(), ap.Anderson(tol=1e-2), ap.DyadicEP(tol=1e-9))
    block(randn(B, N, seed=2).requires_grad_()).backward(randn(B, N, seed=3))
    assert block.certificate.adjoint_result is ap.Result.CONVERGED
    # a tenth is left by each correction, and every evaluation is a force, a Jacobian, a product
    assert block.certificate.adjoint_evaluations <= 3 * 12 + 1


# OneStep and BPTT


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("certify", [False, True])
def test_one_step_is_k_terms_of_its_series_and_reports_the_last_or_what_they_leave(
    k: int, certify: bool
) -> None:
    case = Case()
    run = case.run(ap.OneStep(k=k, certify=certify))
    pulled = torch.eye(N, dtype=torch.float64) + case.step * run.J.mT
    terms = [run.g[:, :, None]]
    for _ in range(k):
        terms.append(pulled @ terms[-1])
    torch.testing.assert_close(run.a, case.step * sum(terms[:k])[:, :, 0])
    remainder = terms[k if certify else k - 1][:, :, 0] / size(run.g)[:, None]
    torch.testing.assert_close(run.said.adjoint_remainder, remainder)
    if certify:
        torch.testing.assert_close(remainder, run.left())
        torch.testing.assert_close(run.said.adjoint_residual, size(remainder))
    else:
        assert run.said.adjoint_residual is None
    # the products, and one linearisation where there is any
    products = k - 1 + certify
    assert run.said.adjoint_evaluations == (products + 1 if products else 0)


@pytest.mark.parametrize("tol", [0.0, 1e-1])
def test_bptt_differentiates_every_step_and_counts_them(tol: float) -> None:
    case = Case()
    run = case.run(ap.BPTT(), ap.Euler(step=0.3, max_steps=5, tol=tol))
    x = run.x.clone().requires_grad_()
    z = x
    for _ in range(5):
        z = z + 0.3 * case.force(z, x)
    z.backward(run.g)
    torch.testing.assert_close(run.a, x.grad)
    torch.testing.assert_close(run.said.state, z.detach())
    free = size(case.force(z, x)) / size(z)
    torch.testing.assert_close(run.said.free_residual, free.detach())
    assert (run.said.free_evaluations, run.said.adjoint_evaluations) == (6, 5)
    assert run.said.result is ap.Result.FIXED_TIME


def test_a_relaxation_that_runs_away_is_no_reference() -> None:
    away = ap.from_function(lambda z, x: x + 50 * z)
    block = ap.Equilibrium(away, ap.Euler(step=1.0, max_steps=300), ap.BPTT())
    with pytest.raises(ap.ConvergenceError, match="free phase: the state became infinite or NaN"):
        block(randn(B, N, seed=2))


@pytest.mark.parametrize(
    "estimator", [ap.OneStep(k=3), ap.PublishedEP(), ap.PublishedAEP()], ids=repr
)
def test_what_has_no_tolerance_ends_by_its_stated_time(estimator: ap.AbstractEstimator) -> None:
    assert Case().run(estimator).said.adjoint_result is ap.Result.FIXED_TIME
    assert estimator.tolerance() == math.inf


# EP: the contrast of the nudged equilibria


@pytest.mark.parametrize("nudge", ["linear", "cost"])
@pytest.mark.parametrize("sides", [1, 2, 4])
def test_ep_contrasts_the_nudged_equilibria(sides: int, nudge: str) -> None:
    case, beta = Case(scale=3.0), 0.1
    run = case.run(ap.EP(beta=beta, tol=1e-11, sides=sides, nudge=nudge))
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
    assert said.adjoint_evaluations == 2  # and the first guess of the nudge holds
    torch.testing.assert_close(said.response, torch.full((B,), response).double())
    torch.testing.assert_close(x.grad, 2 * x.detach())


# an estimator's own solver


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


class Slow(ap.AbstractDynamics):
    """`F = x − (1 − λ) z` with a gain `λ`, `(B, 1)`, of each sample."""

    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x - (1 - self.gain) * z


@pytest.mark.parametrize("kind", [ap.Implicit, ap.AEP])
def test_what_the_free_phase_has_left_is_amplified_to_the_distance_that_it_is_from_the_end(
    kind: type[ap.Implicit | ap.AEP],
) -> None:
    estimator = kind(tol=1e-9, solver=ap.GMRES())
    gain = torch.tensor([[0.0], [0.5], [0.9], [0.99]], dtype=torch.float64)
    block = ap.Equilibrium(
        Slow(gain), ap.FixedPoint(tol=1e-2, max_steps=1000), estimator, on_failure="accept"
    )
    x = torch.full((4, 1), 0.3, dtype=torch.float64, requires_grad=True)
    z = block(x)
    z[:3].sum().backward()
    seen = block.certificate
    away = (seen.state - x.detach() / (1 - gain)).abs() / seen.state.abs()
    assert float(away[2]) > 5 * float(seen.free_residual[2]) > 0  # as the residual does not say
    torch.testing.assert_close(seen.state_error[:3], away[:3, 0], rtol=1e-6, atol=1e-12)
    assert float(seen.state_error[3]) == 0  # nothing was asked of it

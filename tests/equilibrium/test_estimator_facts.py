"""What estimators report beside the adjoint, against dense Jacobians and loops written out."""

from __future__ import annotations

import math

import pytest
import torch
from dense import B, Case, N, randn, root, size

import altprop as ap


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
@pytest.mark.parametrize("solver", [ap.GMRES(), ap.GMRES(restart=2), ap.NewtonKrylov()], ids=repr)
@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
def test_implicits_residual_is_the_true_one_of_what_it_returns_where_no_step_follows(
    tol: float, solver: ap.AbstractSolver, scale: float
) -> None:
    run = Case(scale=scale).run(ap.Implicit(tol=tol, solver=solver))
    assert run.said.adjoint_residual is not None and run.said.adjoint_remainder is not None
    true = size(run.left) / size(run.g)
    torch.testing.assert_close(run.said.adjoint_residual, true, rtol=1e-5, atol=1e-13)
    torch.testing.assert_close(
        run.said.adjoint_remainder, run.left / size(run.g)[:, None], rtol=1e-5, atol=1e-13
    )
    assert float(true.max()) <= 0.4 * tol  # for the error of a relaxation that takes one step more
    assert run.said.adjoint_result is ap.Result.CONVERGED


@pytest.mark.parametrize("solver", [None, ap.Euler(step=0.5), ap.Anderson(mixing=0.6)], ids=repr)
def test_implicits_residual_is_that_before_its_last_step_where_one_follows(
    solver: ap.AbstractSolver | None,
) -> None:
    case = Case()
    run = case.run(ap.Implicit(tol=1e-3, solver=solver))
    assert run.said.adjoint_residual is not None and run.said.adjoint_remainder is not None
    r = run.said.adjoint_remainder
    torch.testing.assert_close(run.said.adjoint_residual, size(r))
    assert float(size(r).max()) <= 1e-3
    stride = {None: 0.8, ap.Euler(step=0.5): 0.5, ap.Anderson(mixing=0.6): 0.8 * 0.6}[solver]
    after = r + stride * torch.einsum("bji,bj->bi", run.J, r)
    torch.testing.assert_close(run.left / size(run.g)[:, None], after, rtol=1e-9, atol=1e-14)
    assert bool((size(after) < size(r)).all())


def test_an_adjoint_that_is_not_solved_is_told_and_its_residual_is_true() -> None:
    run = Case().run(ap.Implicit(tol=1e-9, max_steps=4, solver=ap.GMRES()))
    assert run.said.adjoint_result is ap.Result.MAX_STEPS and run.said.adjoint_residual is not None
    torch.testing.assert_close(run.said.adjoint_residual, size(run.left) / size(run.g))
    assert float(run.said.adjoint_residual.min()) > 1e-9


@pytest.mark.parametrize("loose", [1e-2, 1e-4])
def test_dyadic_reports_how_far_its_midpoint_went_from_the_free_state(loose: float) -> None:
    case = Case()
    run = case.run(ap.DyadicEP(tol=1e-11), ap.Anderson(tol=loose))
    z = run.said.state
    wanted = size(root(case, run.x, z) - z) / size(z)
    assert run.said.response is not None
    torch.testing.assert_close(run.said.response, wanted, rtol=1e-5, atol=0)
    assert 0 < float(wanted.min()) <= float(wanted.max()) <= 3 * loose
    # and the adjoint is that of the midpoint, not of the state where the free phase stopped
    m = root(case, run.x, z)
    left = torch.einsum("bji,bj->bi", case.jacobian(m), run.a) + run.g
    assert float((size(left) / size(run.g)).max()) < 1e-9 < float(size(run.left).min())


def test_a_dyadic_cost_nudge_is_the_costs_gradient_at_the_midpoint() -> None:
    case = Case()
    run = case.run(ap.DyadicEP(tol=1e-11, nudge="cost"), ap.Anderson(tol=1e-3))
    m = root(case, run.x, run.said.state)
    own, at_state = (randn(B, N, seed=3) + z**2 for z in (m, run.said.state))
    # in the cotangent's units: the multiple of the cost's gradient at z* that the cotangent is
    factor = ((run.g * at_state).sum(1) / (at_state**2).sum(1))[:, None]
    left = torch.einsum("bji,bj->bi", case.jacobian(m), run.a) + factor * own
    assert float((size(left) / size(run.g)).max()) < 1e-9


def test_dyadic_begins_at_the_free_state_and_one_step_of_the_cotangent() -> None:
    case = Case()
    run = case.run(ap.DyadicEP(max_steps=1, solver=ap.Anderson()), ap.Anderson(tol=1e-2))
    z = run.said.state
    assert run.said.nudged_residuals is not None and run.said.response is not None
    midpoint, difference = run.said.nudged_residuals
    # the one is relative to the state's norm, the other to the nudge
    torch.testing.assert_close(midpoint, size(case.force(z, run.x)) / size(z))
    torch.testing.assert_close(run.a, case.step * run.g)
    torch.testing.assert_close(difference, size(run.left) / size(run.g))
    assert not run.said.response.any() and run.said.adjoint_result is ap.Result.MAX_STEPS


def test_dyadic_reports_the_residuals_of_its_midpoint_and_of_its_difference() -> None:
    case = Case(scale=100.0)
    run = case.run(ap.DyadicEP(tol=1e-3), ap.Euler(step=0.8, max_steps=100, tol=1e-2))
    assert run.said.nudged_residuals is not None and run.said.response is not None
    midpoint, difference = run.said.nudged_residuals
    torch.testing.assert_close(
        run.said.adjoint_residual, (midpoint**2 + difference**2).sqrt(), rtol=1e-9, atol=0
    )
    assert float(run.said.adjoint_residual.max()) <= 1e-3
    assert run.said.adjoint_remainder is not None
    torch.testing.assert_close(difference, size(run.said.adjoint_remainder))
    # the midpoint is within the free phase's tolerance of z*, and J taken there
    m = root(case, run.x, run.said.state)
    left = torch.einsum("bji,bj->bi", case.jacobian(m), run.a) + run.g
    assert bool((size(left) / size(run.g) < difference + 3e-3).all())


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("certify", [False, True])
def test_one_step_reports_its_last_term_or_what_its_series_leaves(k: int, certify: bool) -> None:
    case = Case()
    run = case.run(ap.OneStep(k=k, certify=certify))
    pulled = torch.eye(N, dtype=torch.float64) + case.step * run.J.transpose(1, 2)
    term = (run.g / size(run.g)[:, None])[:, :, None]
    for _ in range(k if certify else k - 1):
        term = pulled @ term
    assert run.said.adjoint_remainder is not None
    torch.testing.assert_close(run.said.adjoint_remainder, term[:, :, 0])
    if certify:
        torch.testing.assert_close(run.said.adjoint_remainder, run.left / size(run.g)[:, None])
        torch.testing.assert_close(run.said.adjoint_residual, size(run.left) / size(run.g))
    else:
        assert run.said.adjoint_residual is None
    # the products, and one linearisation where there is any
    products = k - 1 + certify
    assert run.said.adjoint_evaluations == (products + 1 if products else 0)


@pytest.mark.parametrize("nudge", ["linear", "cost"])
@pytest.mark.parametrize("clip", [None, False, True])
def test_the_published_forms_make_the_published_steps(clip: bool | None, nudge: str) -> None:
    case = Case(scale=2.0)
    beta, steps, eps = 0.05, 7, 0.3
    options = {"step": eps, "steps": steps, "beta": beta, "nudge": nudge}
    if clip is None:
        run = case.run(ap.PublishedEP(**options))  # type: ignore[arg-type]
    else:
        run = case.run(ap.PublishedAEP(**options, clip=clip))  # type: ignore[arg-type]
    still, J = run.said.state, run.J
    # a linear nudge is the loss's cotangent; a cost's is the cost's own, and the loss is twice it
    factor = 1.0 if nudge == "linear" else 2.0
    ends, drives = [], []
    for sign in (1, -1):
        z = still
        for _ in range(steps):
            pull = run.g if nudge == "linear" else randn(B, N, seed=3) + z**2
            drive = case.force(z, run.x) - sign * beta * pull
            if clip is not None:
                d = z - still
                correction = torch.einsum("bij,bj->bi", J - J.transpose(1, 2), d)
                if clip and correction.norm() > drive.norm():
                    correction = correction * (drive.norm() / correction.norm())
                drive = drive - correction
            z = z + eps * drive
        ends.append(z)
        drives.append(drive)
    torch.testing.assert_close(
        run.a, factor * (ends[1] - ends[0]) / (2 * beta), rtol=1e-8, atol=1e-10
    )
    moved = torch.maximum(size(ends[0] - still), size(ends[1] - still)) / size(still)
    torch.testing.assert_close(run.said.response, moved, rtol=1e-8, atol=0)
    own = size(run.g) / factor
    last = torch.maximum(size(drives[0]), size(drives[1])) / (beta * own)
    torch.testing.assert_close(run.said.adjoint_residual, last, rtol=1e-6, atol=0)
    torch.testing.assert_close(run.said.beta, torch.full((B,), beta, dtype=torch.float64))
    torch.testing.assert_close(run.said.adjoint_remainder, (drives[1] - drives[0]) / 2)
    products = 1 if clip is None else 3
    assert run.said.adjoint_evaluations == 2 * steps * products + (clip is not None)


@pytest.mark.parametrize(
    "estimator",
    [
        ap.EP(nudge="cost", tol=1e-9),
        ap.AEP(nudge="cost", tol=1e-9),
        ap.DyadicEP(nudge="cost", tol=1e-9),
        ap.PublishedEP(),
        ap.PublishedAEP(clip=False),
        ap.EP(tol=1e-9),
        ap.DyadicEP(tol=1e-9),
        ap.Implicit(tol=1e-9),
    ],
    ids=repr,
)
def test_a_weight_of_a_samples_loss_weighs_its_adjoint_and_no_others(
    estimator: ap.AbstractEstimator,
) -> None:
    weights = torch.tensor([[-0.5], [4.0]], dtype=torch.float64)
    plain, weighted = Case().run(estimator), Case().run(estimator, weights=weights)
    assert float((size(plain.a) / size(plain.g)).min()) > 0.2
    torch.testing.assert_close(weighted.a, weights * plain.a, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "estimator", [ap.EP(nudge="cost"), ap.DyadicEP(nudge="cost"), ap.PublishedEP()], ids=repr
)
def test_a_cost_may_differ_from_the_loss_by_rounding_and_not_by_a_fifth(
    estimator: ap.AbstractEstimator,
) -> None:
    block = ap.Equilibrium(ap.from_function(Case().force), ap.Anderson(tol=1e-9), estimator)
    other = randn(B, N, seed=5)
    for share, refused in ((0.0, False), (0.01, False), (0.2, True)):
        x = randn(B, N, seed=2).requires_grad_()
        z = block(x, cost=lambda z, share=share: (z**2 / 2).sum() + share * (other * z).sum())
        if refused:
            with pytest.raises(ap.RuleError, match="not the loss that was differentiated"):
                (z**2 / 2).sum().backward()
        else:
            (z**2 / 2).sum().backward()
            assert x.grad is not None and bool(x.grad.isfinite().all())


@pytest.mark.parametrize(
    "estimator", [ap.EP(nudge="cost"), ap.DyadicEP(nudge="cost"), ap.PublishedAEP()], ids=repr
)
def test_a_sample_that_the_cost_does_not_read_gets_nothing(
    estimator: ap.AbstractEstimator,
) -> None:
    block = ap.Equilibrium(ap.from_function(Case().force), ap.Anderson(tol=1e-9), estimator)
    x = randn(B, N, seed=2).requires_grad_()
    cost = lambda z: (z[1] ** 2 / 2).sum()  # noqa: E731
    cost(block(x, cost=cost)).backward()
    assert x.grad is not None and not x.grad[0].any() and float(x.grad[1].norm()) > 0.1


@pytest.mark.parametrize(
    "estimator", [ap.OneStep(k=3), ap.PublishedEP(), ap.PublishedAEP()], ids=repr
)
def test_what_has_no_tolerance_ends_by_its_stated_time(estimator: ap.AbstractEstimator) -> None:
    assert Case().run(estimator).said.adjoint_result is ap.Result.FIXED_TIME
    assert estimator.tolerance() == math.inf


def test_a_relaxation_that_runs_away_is_no_reference() -> None:
    block = ap.Equilibrium(
        ap.from_function(lambda z, x: x + 50 * z), ap.Euler(step=1.0, max_steps=300), ap.BPTT()
    )
    with pytest.raises(ap.ConvergenceError, match="free phase: the state became infinite or NaN"):
        block(randn(B, N, seed=2))


@pytest.mark.parametrize("tol", [0.0, 1e-1])
def test_bptt_differentiates_every_step_and_counts_them(tol: float) -> None:
    case = Case()
    run = case.run(ap.BPTT(), ap.Euler(step=0.3, max_steps=5, tol=tol))
    x = run.x.clone().requires_grad_()
    z = x
    for _ in range(5):
        z = z + 0.3 * case.force(z, x)
    z.backward(run.g)
    assert x.grad is not None
    torch.testing.assert_close(run.a, x.grad)
    torch.testing.assert_close(run.said.state, z.detach())
    free = size(case.force(z, x)) / size(z)
    torch.testing.assert_close(run.said.free_residual, free.detach())
    assert (run.said.free_evaluations, run.said.adjoint_evaluations) == (6, 5)
    assert run.said.result is ap.Result.FIXED_TIME

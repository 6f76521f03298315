"""Sides, nudges and what is refused: the options of the contrastive estimators."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from instances import error, exact, gradient, system

import altprop as ap


@pytest.mark.parametrize("kind", ["damped", "gated"])
def test_cost_and_linear_nudges_agree_to_first_order_and_differ_at_a_finite_nudge(
    kind: str,
) -> None:
    s = system(kind, seed=0)
    gap = []
    for beta in (1e-1, 1e-3):
        cost, _ = gradient(s, ap.AEP(beta=beta, tol=1e-10, nudge="cost"))
        linear, _ = gradient(s, ap.AEP(beta=beta, tol=1e-10))
        gap.append(error(cost, linear))
    assert gap[0] > 1e-4
    assert gap[1] < 1e-3 * gap[0]


@pytest.mark.parametrize(
    "estimator",
    [
        ap.EP(nudge="cost", beta=1e-3),
        ap.AEP(nudge="cost", beta=1e-3),
        ap.DyadicEP(nudge="cost"),
        ap.PublishedEP(),
        ap.PublishedAEP(),
    ],
    ids=repr,
)
def test_a_loss_that_is_a_multiple_of_the_cost_gives_that_multiple_of_the_gradient(
    estimator: ap.AbstractEstimator,
) -> None:
    s = system("damped", seed=1)
    block = ap.Equilibrium(s.dynamics, ap.Anderson(tol=1e-12, max_steps=300), estimator)
    out = []
    for factor in (1.0, 1024.0):  # a power of two, as a loss scale is
        x = s.x.clone().requires_grad_()
        out.append(torch.autograd.grad(factor * s.cost(block(x, cost=s.cost)), x)[0])
    torch.testing.assert_close(out[1], 1024 * out[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "estimator", [ap.EP(nudge="cost"), ap.AEP(nudge="cost"), ap.DyadicEP(nudge="cost")], ids=repr
)
def test_a_cost_nudge_without_its_cost_is_refused(estimator: ap.AbstractEstimator) -> None:
    s = system("damped", seed=1)
    block = ap.Equilibrium(s.dynamics, estimator=estimator)
    z = block(s.x.clone().requires_grad_())
    with pytest.raises(ap.RuleError, match="block\\(x, cost="):
        z.sum().backward()
    z = block(s.x.clone().requires_grad_(), cost=lambda z: (z**4).sum())
    with pytest.raises(ap.RuleError, match="not the loss"):
        z.sum().backward()


def test_one_side_costs_less_than_two() -> None:
    s = system("damped", seed=2)
    single = type(s)(s.dynamics.float(), s.x.float(), s.w.float())
    for kind in (ap.EP(beta=1e-2, tol=1e-4), ap.AEP()):
        one, two, four = (
            gradient(single, replace(kind, sides=sides), ap.Anderson(tol=1e-6))[1]
            for sides in (1, 2, 4)
        )
        assert one.adjoint_evaluations < two.adjoint_evaluations < four.adjoint_evaluations


class Plain(ap.AbstractDynamics):
    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x - z + 0.1 * torch.relu(z)


def test_holomorphic_refuses_a_dynamics_that_is_not_analytic_and_says_why() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    z = ap.Equilibrium(Plain(), estimator=ap.HolomorphicEP())(x)
    with pytest.raises(ap.RuleError, match="Plain has no analytic force.*relu"):
        z.sum().backward()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda: ap.EP(sides=3), "sides is 3, expected 1 .*, 2 .* or 4"),  # type: ignore[arg-type]
        (lambda: ap.AEP(sides="4"), "AEP: sides is '4'"),  # type: ignore[arg-type]
        (lambda: ap.AEP(nudge="loss"), "nudge is 'loss'"),  # type: ignore[arg-type]
        (lambda: ap.AEP(linearise="mean"), "linearise is 'mean'"),  # type: ignore[arg-type]
        (lambda: ap.AEP(linearise="tracking", sides=1), "sides=2"),
        (lambda: ap.Implicit(solver=ap.GMRES), "solver is"),  # type: ignore[arg-type]
        (lambda: ap.OneStep(k=0), "k is 0"),
        (lambda: ap.DyadicEP(tol=0), "tol is 0"),
        (lambda: ap.HolomorphicEP(points=3), "points is 3"),
        (lambda: ap.HolomorphicEP(radius=-1), "radius is -1"),
    ],
)
def test_wrong_options_are_refused_by_name(wrong: object, named: str) -> None:
    with pytest.raises(ap.ConfigError, match=named):
        wrong()  # type: ignore[operator]


def test_automatic_nudges_reach_their_response_and_their_gradient() -> None:
    s = system("gated", seed=3)
    finest = ap.AEP()
    for estimator in (
        ap.EP(),
        replace(finest, response=1e-3),
        replace(finest, response=1e-3, linearise="tracking"),
        replace(finest, response=1e-3, nudge="cost"),
    ):
        _, certificate = gradient(s, estimator)
        assert certificate.response is not None
        assert 2.5e-4 < float(certificate.response.min()) <= float(certificate.response.max())
        assert float(certificate.response.max()) < 4e-3
    _, certificate = gradient(s, finest)
    assert certificate.response is not None
    torch.testing.assert_close(
        certificate.response, torch.full((2,), 1e-6, dtype=torch.float64), rtol=0.01, atol=0
    )
    _, certificate = gradient(s, ap.HolomorphicEP(response=0.05))
    assert certificate.response is not None
    torch.testing.assert_close(
        certificate.response, torch.full((2,), 0.05, dtype=torch.float64), rtol=0.2, atol=0
    )


@pytest.mark.parametrize("points", [4, 8])
def test_in_float32_a_large_holomorphic_nudge_beats_the_centred_pair(points: int) -> None:
    s = system("damped", seed=4)
    reference = exact(s)
    single = type(s)(s.dynamics.float(), s.x.float(), s.w.float())
    solver = ap.Anderson(tol=1e-6, max_steps=300)
    circle, _ = gradient(single, ap.HolomorphicEP(points=points, response=0.05, tol=1e-5), solver)
    pair, _ = gradient(single, ap.AEP(response=0.05, tol=1e-5), solver)
    assert error(circle.double(), reference) < 0.2 * error(pair.double(), reference)


@pytest.mark.parametrize("kind", ["damped", "gated"])
@pytest.mark.parametrize(
    "estimator",
    [ap.AEP, lambda **k: ap.AEP(linearise="tracking", **k), ap.DyadicEP, ap.HolomorphicEP],
    ids=["AEP", "tracking", "DyadicEP", "HolomorphicEP"],
)
def test_a_longer_phase_never_makes_a_gradient_worse(kind: str, estimator: object) -> None:
    s = system(kind, seed=6)
    reference = exact(s)
    errors = [error(gradient(s, estimator(max_steps=n))[0], reference) for n in (30, 100, 1000)]  # type: ignore[operator]
    assert errors[0] == errors[1] == errors[2] < 2e-3


def test_what_the_free_phase_left_is_no_signal_of_one_sided_phases() -> None:
    s = system("gated", seed=0)
    free = ap.Anderson(tol=1e-3)
    one, _ = gradient(s, ap.AEP(beta=1e-4, tol=1e-7, sides=1, solver=ap.Anderson()), free)
    two, _ = gradient(s, ap.Implicit(tol=1e-8, solver=ap.Anderson()), free)
    assert error(one, two) < 1e-3

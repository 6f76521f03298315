"""Every exact estimator gives the gradient; every inexact one its own closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import altprop as ap
from altprop.equilibrium.estimators import aep
from systems import (
    KINDS,
    NEAR,
    SymmetricMemory,
    System,
    cosine,
    damped,
    dense,
    error,
    exact,
    from_adjoint,
    gated,
    gradient,
    reference_problem,
    system,
    systems,
    task,
)

FEW = settings(max_examples=6, deadline=None)
EXACT = [
    ap.Implicit(tol=1e-9, solver=ap.GMRES()),
    ap.AEP(beta=1e-4, tol=1e-8),
    ap.AEP(beta=1e-4, tol=1e-8, start="zero"),
    ap.AEP(beta=1e-4, tol=1e-8, solver=ap.GMRES()),
    ap.AEP(beta=1e-4, tol=1e-8, linearise="tracking"),
    ap.AEP(beta=1e-4, tol=1e-8, nudge="cost"),
    ap.AEP(beta=1e-6, tol=1e-8, sides=1),
    ap.AEP(beta=1e-2, tol=1e-8, sides=4),
    ap.DyadicEP(tol=1e-9),
    ap.DyadicEP(tol=1e-9, nudge="cost"),
    ap.HolomorphicEP(tol=1e-9),
]


@pytest.mark.parametrize("estimator", EXACT, ids=repr)
@FEW
@given(s=systems())
def test_exact_estimators_equal_implicit(estimator: ap.AbstractEstimator, s: System) -> None:
    assert error(gradient(s, estimator)[0], exact(s)) < 1e-5


ON_LAYERS = [
    ap.Implicit(tol=1e-9),
    ap.AEP(beta=1e-4, tol=1e-7),
    ap.AEP(beta=1e-4, tol=1e-7, linearise="tracking"),
    ap.AEP(beta=1e-6, tol=1e-6, sides=1),
    ap.AEP(beta=1e-2, tol=1e-7, sides=4),
    ap.AEP(beta=1e-4, tol=1e-7, nudge="cost"),
    ap.AEP(beta=1e-4, tol=1e-7, solver=ap.GMRES()),
    ap.DyadicEP(tol=1e-9),
    ap.OneStep(k=4),  # the Jacobian of four layers is nilpotent beside −1: the series ends
]


def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)).double()


@pytest.mark.parametrize("phases", ["sweep", "synchronous"])
@pytest.mark.parametrize("estimator", ON_LAYERS, ids=repr)
def test_exact_estimators_are_backprop_on_layers(
    estimator: ap.AbstractEstimator, phases: str
) -> None:
    x, w = torch.randn(2, 2, 3, 6, dtype=torch.float64)
    layered = ap.Layered(layers(), phases=phases)
    s = System(layered, x, lambda z: (w * z + z**2).sum(), ap.Anderson(tol=1e-10))
    leaf = x.clone().requires_grad_()
    s.cost(nn.Sequential(*layered.blocks)(leaf)).backward()
    wanted = [leaf.grad, *(p.grad.clone() for p in layered.parameters())]
    for found, own in zip(s.gradients(estimator).values(), wanted, strict=True):
        assert error(found, own) < 1e-6


@pytest.mark.parametrize("transposed", [False, True])
def test_one_sweep_is_the_inverse_of_the_jacobian_or_of_its_transpose(transposed: bool) -> None:
    layered, x = ap.Layered(layers()), torch.randn(2, 6, dtype=torch.float64)
    products = layered.linearise(layered.start(x), x)
    sweep = products.inverse(transposed=transposed)
    r = torch.randn(2, 24, dtype=torch.float64)
    back = products.vjp(sweep(r)) if transposed else products.jvp(sweep(r))
    assert torch.allclose(back, -r, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({}, 2),
        ({"linearise": "tracking"}, 2),
        ({"nudge": "cost"}, 2),
        ({"sides": 1}, 1),
        ({"sides": 1, "nudge": "cost"}, 1),
        ({"sides": 4}, 4),
        ({"sides": 4, "start": "zero"}, 4),
        ({"sides": 4, "linearise": "tracking"}, 4),
        ({"sides": 4, "nudge": "cost"}, 4),
    ],
    ids=str,
)
def test_the_bias_falls_with_the_order_that_is_stated(
    kind: str, options: dict[str, Any], order: int
) -> None:
    nudges, tolerance = ((0.1, 0.05), 0.25) if order == 4 else ((1e-2, 1e-3), 0.1)
    for seed in range(3):
        s = system(kind, seed)
        large, small = (
            error(gradient(s, ap.AEP(beta=beta, tol=1e-12, **options))[0], exact(s))
            for beta in nudges
        )
        found = math.log(large / small) / math.log(nudges[0] / nudges[1])
        # below 1e-9 the error is the tolerance of the phases and of the reference
        assert small < 1e-9 or found == pytest.approx(order, abs=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_two_pairs_are_the_extrapolation_of_each_by_itself(kind: str) -> None:
    s = system(kind, seed=3)
    far, near = (gradient(s, ap.AEP(beta=beta, tol=1e-12)) for beta in (0.1, 0.05))
    both, certificate = gradient(s, ap.AEP(beta=0.1, tol=1e-12, sides=4))
    assert error(both, (4 * near[0] - far[0]) / 3) < 1e-10
    for name in ("beta", "response"):
        torch.testing.assert_close(getattr(certificate, name), getattr(far[1], name))
    apart = far[1].adjoint_evaluations + near[1].adjoint_evaluations
    assert far[1].adjoint_evaluations < certificate.adjoint_evaluations < apart
    # the contrast of either pair is within the tolerance that says "converged"
    assert certificate.nudged_residuals.shape == (4, 2)
    assert float(certificate.adjoint_residual.max()) <= 1e-12


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("estimator", [ap.AEP(), ap.Implicit()])
def test_float32_defaults_are_exact_on_the_reference_problem(
    seed: int, estimator: ap.AbstractEstimator
) -> None:
    this = reference_problem(seed)
    got = this.gradients(estimator)
    this.dynamics.double()
    this.x = this.x.double()
    wanted = this.gradients(ap.Implicit(tol=1e-11), solver=ap.Anderson(tol=1e-11, max_steps=500))
    for name, g in wanted.items():
        assert cosine(got[name], g) >= 0.9999, name
        assert abs(float(got[name].double().norm() / g.norm()) - 1) <= 1e-3, name


@pytest.mark.parametrize(
    "estimator",
    [
        ap.AEP(),
        ap.AEP(start="zero"),
        ap.AEP(linearise="tracking"),
        ap.EP(),
        ap.Implicit(),
        ap.DyadicEP(),
        ap.HolomorphicEP(),
    ],
    ids=repr,
)
def test_a_phase_that_may_last_ten_times_longer_ends_the_same(
    estimator: ap.AbstractEstimator,
) -> None:
    for this in (damped(), gated(), reference_problem(0, T=16, C=32)):
        longer = replace(estimator, max_steps=10 * estimator.max_steps)
        for name, g in this.gradients(estimator).items():
            assert torch.equal(g, this.gradients(longer)[name])


# AEP starts from the linear solution, and stays AEP: the phases' states decide, not the start


@pytest.mark.parametrize("kind", KINDS)
def test_warm_and_cold_phases_settle_at_one_gradient(kind: str) -> None:
    s = system(kind, seed=3)
    warm, cold = (
        gradient(s, ap.AEP(beta=0.05, tol=1e-9, start=start))[0] for start in ("adjoint", "zero")
    )
    assert error(warm, cold) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_that_is_off_by_a_tenth_is_corrected_by_the_phases(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = system(kind, seed=4)
    solve = aep.solve_adjoint

    def corrupted(problem: Any, products: Any, g: Tensor, *rest: Any) -> Any:
        found = solve(problem, products, g, *rest)
        noise = torch.randn(g.shape, generator=torch.Generator().manual_seed(0), dtype=g.dtype)
        value = found.value + 0.1 * noise * found.value.norm() / noise.norm()
        return replace(found, value=value, force=products.vjp(value) + g)

    estimator = ap.AEP(tol=1e-6, response=1e-4)
    honest, plain = gradient(s, estimator)
    monkeypatch.setattr(aep, "solve_adjoint", corrupted)
    found, certificate = gradient(s, estimator)
    assert float(certificate.adjoint_residual.max()) <= 1e-6
    assert certificate.adjoint_evaluations > plain.adjoint_evaluations + 4
    assert error(honest, exact(s)) < 1e-5 and error(found, exact(s)) < 1e-5
    # so does the nudge that is chosen, whose linear solution the phases first only confirm
    assert error(gradient(s, ap.AEP())[0], exact(s)) <= 2e-3
    # a tolerance that accepts such a start leaves the error visible
    assert error(gradient(s, ap.AEP(tol=1.0))[0], exact(s)) >= 1e-3


# what certificates say of a contrast


@pytest.mark.parametrize("kind", KINDS)
def test_certificates_measure_the_antisymmetry_of_the_jacobian(kind: str) -> None:
    s = system(kind, seed=3)
    _, jacobian, g = dense(s)
    a = -torch.linalg.solve(jacobian.T, g)
    forward, transposed = (jacobian @ a).reshape(2, -1), (jacobian.T @ a).reshape(2, -1)
    expected = (forward - transposed).norm(dim=1) / forward.norm(dim=1)
    for estimator in (
        ap.AEP(beta=1e-5, tol=1e-8),
        ap.AEP(beta=1e-5, tol=1e-8, start="zero"),
        ap.AEP(beta=1e-5, tol=1e-8, linearise="tracking"),
        ap.HolomorphicEP(radius=1e-3, tol=1e-8),
    ):
        _, certificate = gradient(s, estimator)
        torch.testing.assert_close(certificate.antisymmetry, expected, rtol=1e-3, atol=0)
    assert gradient(s, ap.EP())[1].antisymmetry is None  # it has no product of the Jacobian


@pytest.mark.parametrize(
    ("estimator", "phases"),
    [
        (ap.EP(), 2),
        (ap.EP(sides=1), 1),
        (ap.EP(sides=4), 4),
        (ap.AEP(), 2),
        (ap.AEP(sides=1), 1),
        (ap.AEP(sides=4), 4),
        (ap.AEP(linearise="tracking"), 2),
        (ap.AEP(linearise="tracking", sides=4), 4),
        (ap.HolomorphicEP(points=8), 5),  # the others are their conjugates
        (ap.DyadicEP(), 2),  # its midpoint and its difference
    ],
    ids=repr,
)
def test_certificates_carry_every_phase_within_its_tolerance(
    estimator: ap.AbstractEstimator, phases: int
) -> None:
    s = system("damped", seed=4)
    _, certificate = gradient(s, estimator)
    assert certificate.nudged_residuals.shape == (phases, 2)
    assert float(certificate.nudged_residuals.max()) <= estimator.tolerance() * math.sqrt(2)
    assert float(certificate.adjoint_residual.max()) <= estimator.tolerance()
    assert certificate.adjoint_evaluations >= phases
    assert certificate.adjoint_result is ap.Result.CONVERGED


# EP has no correction


@pytest.mark.parametrize("kind", KINDS)
def test_naive_ep_gives_the_inverse_and_not_the_transposed_inverse(kind: str) -> None:
    s = system(kind, seed=1)
    z, jacobian, g = dense(s)
    wrong = from_adjoint(s, z, -torch.linalg.solve(jacobian, g))
    for nudge in ("linear", "cost"):
        found, _ = gradient(s, ap.EP(beta=1e-4, tol=1e-9, nudge=nudge))
        assert error(found, wrong) < 1e-5 and error(found, exact(s)) > 0.02


def test_naive_ep_is_exact_where_the_jacobian_is_symmetric() -> None:
    s = task(SymmetricMemory(6, 3), B=2, T=3)
    assert error(gradient(s, ap.EP(**NEAR))[0], exact(s)) < 1e-5
    two, four = (
        error(gradient(s, ap.EP(beta=0.01, tol=1e-11, sides=n))[0], exact(s)) for n in (2, 4)
    )
    assert four < 1e-2 * two
    _, certificate = gradient(s, ap.AEP())
    assert float(certificate.antisymmetry.max()) < 1e-9

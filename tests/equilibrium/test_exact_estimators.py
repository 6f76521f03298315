"""Every exact estimator gives the gradient; every inexact one its own closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import (
    System,
    cotangent,
    dense,
    error,
    exact,
    from_adjoint,
    gradient,
    system,
    systems,
)

import altprop as ap

FEW = settings(max_examples=6, deadline=None)
KINDS = ["damped", "gated"]
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


@FEW
@given(s=systems(), seed=st.integers(0, 999))
def test_implicit_equals_finite_differences_of_the_equilibrium(s: System, seed: int) -> None:
    found, _ = gradient(s, ap.Implicit(tol=1e-12, max_steps=300))
    generator = torch.Generator().manual_seed(seed)
    shifts = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in s.places()]

    def moved(h: float) -> float:
        with torch.no_grad():
            for p, d in zip(s.dynamics.parameters(), shifts[1:], strict=True):
                p.add_(h * d)
            z = ap.Equilibrium(s.dynamics, ap.Anderson(tol=1e-13, max_steps=300))(
                s.x + h * shifts[0]
            )
            for p, d in zip(s.dynamics.parameters(), shifts[1:], strict=True):
                p.sub_(h * d)
        return float(s.cost(z))

    h = 1e-5
    slope = (moved(h) - moved(-h)) / (2 * h)
    flat = torch.cat([d.flatten() for d in shifts])
    assert abs(float(found @ flat) - slope) < 1e-5 * float(found.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("estimator", "order"),
    [
        (ap.AEP, 2),
        (lambda **k: ap.AEP(linearise="tracking", **k), 2),
        (lambda **k: ap.AEP(nudge="cost", **k), 2),
        (lambda **k: ap.AEP(sides=1, **k), 1),
        (lambda **k: ap.AEP(sides=1, nudge="cost", **k), 1),
    ],
    ids=["centred", "tracking", "cost", "one-sided", "one-sided cost"],
)
def test_the_bias_falls_with_the_order_that_is_stated(
    kind: str, estimator: object, order: int
) -> None:
    for seed in range(3):
        s = system(kind, seed)
        reference = exact(s)
        large, small = (
            error(gradient(s, estimator(beta=beta, tol=1e-11))[0], reference)  # type: ignore[operator]
            for beta in (1e-2, 1e-3)
        )
        assert math.log10(large / small) == pytest.approx(order, abs=0.1)


@FEW
@given(s=systems())
@pytest.mark.parametrize(
    "estimator",
    [
        lambda **k: ap.AEP(sides=4, **k),
        lambda **k: ap.AEP(sides=4, start="zero", **k),
        lambda **k: ap.AEP(sides=4, linearise="tracking", **k),
        lambda **k: ap.AEP(sides=4, nudge="cost", **k),
    ],
    ids=["free", "zero", "tracking", "cost"],
)
def test_two_pairs_leave_a_bias_of_fourth_order(estimator: object, s: System) -> None:
    reference = exact(s)
    large, small = (
        error(gradient(s, estimator(beta=beta, tol=1e-12))[0], reference)  # type: ignore[operator]
        for beta in (0.1, 0.05)
    )
    # below 1e-9 the error is the tolerance of the phases and of the reference
    assert small < 1e-9 or math.log2(large / small) == pytest.approx(4, abs=0.25)


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
    assert certificate.nudged_residuals is not None and certificate.adjoint_residual is not None
    # the contrast of either pair is within the tolerance that says "converged"
    assert certificate.nudged_residuals.shape == (4, 2)
    assert float(certificate.adjoint_residual.max()) <= 1e-12


@FEW
@given(s=systems())
def test_eight_holomorphic_points_leave_less_than_1e_7_at_a_nudge_where_two_do_not(
    s: System,
) -> None:
    reference = exact(s)
    eight, two = (
        error(gradient(s, ap.HolomorphicEP(points=n, radius=0.05, tol=1e-10))[0], reference)
        for n in (8, 2)
    )
    assert eight < 1e-7
    assert eight < 1e-2 * two


@FEW
@given(s=systems())
def test_two_holomorphic_points_are_the_centred_pair_and_one_is_its_one_side(s: System) -> None:
    for points, sides in ((2, 2), (1, 1)):
        complex_pair, _ = gradient(s, ap.HolomorphicEP(points=points, radius=0.02, tol=1e-12))
        real_pair, _ = gradient(s, ap.AEP(beta=0.02, tol=1e-12, sides=sides))  # type: ignore[arg-type]
        assert error(complex_pair, real_pair) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_naive_ep_gives_the_inverse_and_not_the_transposed_inverse(kind: str) -> None:
    s = system(kind, seed=1)
    z, jacobian = dense(s)
    g = cotangent(s, z).flatten()
    wrong = from_adjoint(s, z, -torch.linalg.solve(jacobian, g))
    for estimator in (ap.EP(beta=1e-4, tol=1e-9), ap.EP(beta=1e-4, tol=1e-9, nudge="cost")):
        found, _ = gradient(s, estimator)
        assert error(found, wrong) < 1e-5
        assert error(found, exact(s)) > 0.02


class Symmetric(ap.AbstractDynamics):
    """`F = x − z + W tanh(Wᵀ z)`, the gradient of an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(0.3 * torch.randn(4, 6, dtype=torch.float64))

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x - z + torch.tanh(z @ self.weight) @ self.weight.T


def test_naive_ep_is_exact_where_the_jacobian_is_symmetric() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    s = System(Symmetric(), x, torch.randn_like(x))
    assert error(gradient(s, ap.EP(beta=1e-4, tol=1e-9))[0], exact(s)) < 1e-6
    two, four = (
        error(gradient(s, ap.EP(beta=0.01, tol=1e-11, sides=n))[0], exact(s))  # type: ignore[arg-type]
        for n in (2, 4)
    )
    assert four < 1e-2 * two
    _, certificate = gradient(s, ap.AEP())
    assert certificate.antisymmetry is not None
    assert float(certificate.antisymmetry.max()) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_one_step_is_backprop_through_k_steps_at_the_equilibrium(kind: str, k: int) -> None:
    s = system(kind, seed=2)
    z, jacobian = dense(s)
    step = s.dynamics.step
    g = cotangent(s, z).flatten()
    pulled = torch.eye(len(g), dtype=g.dtype) + step * jacobian.T
    a = step * sum(torch.linalg.matrix_power(pulled, i) @ g for i in range(k))
    found, certificate = gradient(s, ap.OneStep(k=k, certify=True))
    assert error(found, from_adjoint(s, z, a)) < 1e-9
    samples = (jacobian.T @ a + g).reshape(2, -1).norm(dim=1) / g.reshape(2, -1).norm(dim=1)
    assert certificate.adjoint_residual is not None
    torch.testing.assert_close(certificate.adjoint_residual, samples)
    assert error(found, exact(s)) > 1e-3 or k == 5
    assert gradient(s, ap.OneStep(k=k))[1].adjoint_residual is None


def test_one_step_approaches_the_gradient_as_its_terms_grow() -> None:
    s = system("damped", seed=0)
    errors = [error(gradient(s, ap.OneStep(k=k))[0], exact(s)) for k in (1, 4, 16, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_certificates_measure_the_antisymmetry_of_the_jacobian(kind: str) -> None:
    s = system(kind, seed=3)
    z, jacobian = dense(s)
    a = -torch.linalg.solve(jacobian.T, cotangent(s, z).flatten())
    forward, transposed = (jacobian @ a).reshape(2, -1), (jacobian.T @ a).reshape(2, -1)
    expected = (forward - transposed).norm(dim=1) / forward.norm(dim=1)
    for estimator in (
        ap.AEP(beta=1e-5, tol=1e-8),
        ap.AEP(beta=1e-5, tol=1e-8, start="zero"),
        ap.AEP(beta=1e-5, tol=1e-8, linearise="tracking"),
        ap.HolomorphicEP(radius=1e-3, tol=1e-8),
    ):
        _, certificate = gradient(s, estimator)
        assert certificate.antisymmetry is not None
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
    assert certificate.nudged_residuals is not None and certificate.adjoint_residual is not None
    assert certificate.nudged_residuals.shape == (phases, 2)
    assert float(certificate.nudged_residuals.max()) <= estimator.tolerance() * math.sqrt(2)
    assert float(certificate.adjoint_residual.max()) <= estimator.tolerance()
    assert certificate.adjoint_evaluations >= phases
    assert certificate.adjoint_result is ap.Result.CONVERGED


@pytest.mark.parametrize("estimator", EXACT, ids=repr)
def test_a_sample_without_a_cotangent_gets_no_gradient_and_changes_no_other(
    estimator: ap.AbstractEstimator,
) -> None:
    s = system("damped", seed=5)

    def run(x: torch.Tensor) -> torch.Tensor:
        block = ap.Equilibrium(s.dynamics, ap.Anderson(tol=1e-12, max_steps=300), estimator)
        x = x.clone().requires_grad_()
        first = lambda z: (s.w[:1] * z[:1] + z[:1] ** 3 / 3).sum()  # noqa: E731
        return torch.autograd.grad(first(block(x, cost=first)), x)[0]

    both, alone = run(s.x), run(s.x[:1])
    assert float(both[1].abs().max()) == 0
    torch.testing.assert_close(both[:1], alone, rtol=1e-6, atol=1e-9)

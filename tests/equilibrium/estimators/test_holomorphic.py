"""HolomorphicEP: circles of nudges, samples at zero, without a cotangent, or lost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import altprop as ap
from altprop.equilibrium.dynamics.analytic import erf
from systems import EXACT, TIGHT, System, error, exact, gradient, system, systems

FEW = settings(max_examples=6, deadline=None)
WIDE = ap.HolomorphicEP(tol=1e-8, max_steps=300)
GIVEN = ap.HolomorphicEP(radius=0.02, tol=1e-8, max_steps=300)


@FEW
@given(s=systems())
def test_eight_points_leave_less_than_1e_7_at_a_nudge_where_two_do_not(s: System) -> None:
    eight, two = (
        error(gradient(s, ap.HolomorphicEP(points=n, radius=0.05, tol=1e-10))[0], exact(s))
        for n in (8, 2)
    )
    assert eight < 1e-7 and eight < 1e-2 * two


@FEW
@given(s=systems())
def test_two_points_are_the_centred_pair_and_one_is_its_one_side(s: System) -> None:
    for points, sides in ((2, 2), (1, 1)):
        circle, _ = gradient(s, ap.HolomorphicEP(points=points, radius=0.02, tol=1e-12))
        pair, _ = gradient(s, ap.AEP(beta=0.02, tol=1e-12, sides=sides))
        assert error(circle, pair) < 1e-10


@pytest.mark.parametrize("points", [4, 8])
def test_in_float32_a_large_nudge_beats_the_centred_pair(points: int) -> None:
    s = system("damped", seed=4)
    reference = exact(s)
    single = System(s.dynamics.float(), s.x.float(), s.cost)
    solver = ap.Anderson(tol=1e-6, max_steps=300)
    circle, _ = gradient(single, ap.HolomorphicEP(points=points, response=0.05, tol=1e-5), solver)
    pair, _ = gradient(single, ap.AEP(response=0.05, tol=1e-5), solver)
    assert error(circle.double(), reference) < 0.2 * error(pair.double(), reference)


def test_a_dynamics_that_is_not_analytic_is_refused_with_the_reason() -> None:
    class Plain(ap.AbstractDynamics):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return x - z + 0.1 * torch.relu(z)

    for dynamics in (Plain(), ap.Layered([torch.nn.Linear(3, 3)])):
        z = ap.Equilibrium(dynamics, estimator=ap.HolomorphicEP())(
            torch.randn(2, 3).requires_grad_()
        )
        with pytest.raises(ap.RuleError, match="has no analytic force"):
            z.sum().backward()


def rows(
    estimator: ap.AbstractEstimator, x: Tensor, weight: Tensor, **settings: Any
) -> tuple[Tensor, ap.Certificate]:
    """Return the gradient by the input of `Σ weight · (z + z²)`, `(B, T, C)`."""
    solver = TIGHT if x.dtype is torch.float64 else ap.Anderson(tol=1e-5)
    dynamics = system("damped", seed=2).dynamics.to(x.dtype)
    block = ap.Equilibrium(dynamics, solver, estimator, **settings)
    leaf = x.clone().requires_grad_()
    z = block(leaf)
    (weight.view(-1, 1, 1) * (z + z.square())).sum().backward()
    return leaf.grad, block.certificate


def inputs() -> Tensor:
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    x[0] = 0  # padding: its equilibrium is zero
    return x


@pytest.mark.parametrize(
    ("estimator", "dtype", "bound"),
    [
        (WIDE, torch.float64, 1e-6),
        (GIVEN, torch.float64, 1e-6),
        (ap.HolomorphicEP(), torch.float32, 2e-3),
    ],
    ids=["chosen", "given", "single precision"],
)
def test_a_sample_at_zero_has_its_exact_gradient(
    estimator: ap.AbstractEstimator, dtype: torch.dtype, bound: float
) -> None:
    x, ones = inputs(), torch.ones(3, dtype=torch.float64)
    got, seen = rows(estimator, x.to(dtype), ones.to(dtype))
    wanted, _ = rows(EXACT, x, ones)
    assert not seen.state[0].any() and float(seen.adjoint_residual.max()) <= estimator.tol
    assert all(error(own, reference) <= bound for own, reference in zip(got, wanted, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_beside_norms_whose_disc_is_small_at_zero_it_has_too(seed: int) -> None:
    torch.manual_seed(seed)
    dynamics = ap.ThickBlock(8, heads=2, damping=0.5).double()
    x = torch.cat([torch.zeros(1, 5, 8), torch.randn(1, 5, 8)]).double()
    s = System(dynamics, x, lambda z: (torch.linspace(0, 1, z.numel()).view(z.shape) * z).sum())
    found, wanted = (s.gradients(estimator)["x"] for estimator in (ap.HolomorphicEP(), EXACT))
    assert all(error(own, reference) <= 2e-2 for own, reference in zip(found, wanted, strict=True))


@pytest.mark.parametrize("estimator", [WIDE, GIVEN], ids=["chosen", "given"])
@pytest.mark.parametrize("value", [0.0, math.nan])
@pytest.mark.parametrize("where", [0, 1])
def test_a_cotangent_of_zero_or_nan_stays_in_its_sample(
    estimator: ap.AbstractEstimator, value: float, where: int
) -> None:
    x, weight = inputs(), torch.ones(3, dtype=torch.float64)
    whole, _ = rows(estimator, x, weight)
    weight[where] = value
    got, seen = rows(estimator, x, weight)
    assert bool(seen.adjoint_residual.isfinite().all())
    for i in range(3):
        if i != where:
            assert torch.allclose(got[i], whole[i], rtol=1e-7, atol=1e-12)
    assert not got[where].any() if value == 0 else got[where].isnan().all()


def test_a_lost_sample_leaves_its_batch_mates_alone() -> None:
    x, ones = inputs(), torch.ones(3, dtype=torch.float64)
    whole, _ = rows(WIDE, x, ones)
    x[1] = math.nan
    got, seen = rows(WIDE, x, ones, on_failure="accept")
    assert seen.adjoint_residual.isnan().tolist() == [False, True, False]
    for i in (0, 2):
        assert torch.allclose(got[i], whole[i], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_lost_number_takes_no_terms_from_the_error_functions_of_others(lost: float) -> None:
    z = torch.complex(torch.linspace(0.1, 1, 5), torch.linspace(2, 6, 5)).to(torch.complex128)
    beside = torch.cat([z, torch.complex(z.real[:1], torch.full_like(z.real[:1], lost))])
    assert torch.equal(erf(beside)[:5], erf(z))

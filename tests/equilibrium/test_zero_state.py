"""Samples at zero, without a cotangent, or lost, beside others that have all of these."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from instances import TIGHT, system
from torch import Tensor

import altprop as ap
from altprop.equilibrium.dynamics.analytic import erf

WIDE = ap.HolomorphicEP(tol=1e-8, max_steps=300)
GIVEN = ap.HolomorphicEP(radius=0.02, tol=1e-8, max_steps=300)
REFERENCE = ap.Implicit(tol=1e-10, max_steps=300)


def rows(
    estimator: ap.AbstractEstimator, x: Tensor, weight: Tensor, **settings: Any
) -> tuple[Tensor, ap.Certificate]:
    """Return the gradient by the input of `Σ weight · (z + z²)`, `(B, T, C)`."""
    s = system("damped", seed=2)
    block = ap.Equilibrium(s.dynamics.to(x.dtype), TIGHT, estimator, **settings)
    if x.dtype is torch.float32:
        block.solver = ap.Anderson(tol=1e-5)
    leaf = x.clone().requires_grad_()
    z = block(leaf)
    (weight.view(-1, 1, 1) * (z + z.square())).sum().backward()
    return leaf.grad, block.certificate


def inputs() -> Tensor:
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    x[0] = 0  # padding: its equilibrium is zero
    return x


@pytest.mark.parametrize("estimator", [WIDE, GIVEN], ids=["chosen", "given"])
def test_a_sample_at_zero_has_its_exact_gradient(estimator: ap.AbstractEstimator) -> None:
    x, ones = inputs(), torch.ones(3, dtype=torch.float64)
    got, seen = rows(estimator, x, ones)
    wanted, _ = rows(REFERENCE, x, ones)
    assert not seen.state[0].any() and float(seen.adjoint_residual.max()) <= 1e-8
    for own, exact in zip(got, wanted, strict=True):
        assert (own - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("seed", range(6))
def test_beside_norms_whose_disc_is_small_at_zero_it_has_too(seed: int) -> None:
    torch.manual_seed(seed)
    dynamics = ap.ThickBlock(8, heads=2, damping=0.5).double()
    x = torch.cat([torch.zeros(1, 5, 8), torch.randn(1, 5, 8)]).double()
    found = []
    for estimator in (ap.HolomorphicEP(), REFERENCE):
        leaf = x.clone().requires_grad_()
        z = ap.Equilibrium(dynamics, TIGHT, estimator)(leaf)
        (torch.linspace(0, 1, z.numel()).view(z.shape) * z).sum().backward()
        found.append(leaf.grad)
    for own, exact in zip(*found, strict=True):
        assert (own - exact).norm() <= 2e-2 * exact.norm()


def test_it_has_in_single_precision_too() -> None:
    x, ones = inputs().float(), torch.ones(3)
    got, _ = rows(ap.HolomorphicEP(), x, ones)
    wanted, _ = rows(REFERENCE, x.double(), ones.double())
    for own, exact in zip(got.double(), wanted, strict=True):
        assert (own - exact).norm() <= 2e-3 * exact.norm()


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

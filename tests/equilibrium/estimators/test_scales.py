"""No scale of the loss matters: neither to the gradient nor to what its certificate says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import altprop as ap
from altprop.equilibrium.solvers.solver import sample_norm, scaled_norm
from systems import system

ESTIMATORS = [
    ap.AEP(),
    ap.AEP(nudge="cost"),
    ap.EP(),
    ap.Implicit(),
    ap.OneStep(certify=True),
    ap.DyadicEP(),
    ap.HolomorphicEP(),
]


@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_the_gradient_is_as_large_as_the_loss(
    estimator: ap.AbstractEstimator, precision: torch.dtype
) -> None:
    s, found = system("damped", seed=1), {}
    solver = ap.Anderson(tol=1e-5)
    block = ap.Equilibrium(s.dynamics.to(precision), solver, estimator, on_failure="accept")
    furthest = 100 if precision is torch.float32 else 900  # squares of these are out of range
    for power in (0, 20, -20, -furthest, furthest):
        x = s.x.to(precision, copy=True).requires_grad_()
        block.zero_grad()

        def cost(z: Tensor, scale: float = 2.0**power) -> Tensor:
            return (scale * (z.sin() + z)).sum()

        cost(block(x, cost=cost)).backward()
        found[power] = [g / 2.0**power for g in (x.grad, *(p.grad for p in block.parameters()))]
        found[power] += [block.certificate.state_error, block.certificate.adjoint_residual]
    for power, told in found.items():
        for own, wanted in zip(told, found[0], strict=True):
            assert wanted.any()
            assert torch.equal(own, wanted) or abs(power) == furthest
            torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-6 * float(wanted.max()))


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-38, 1e-25, 1e-15, 1.0, 1e15, 1e25, 1e37])
def test_a_norm_is_that_of_float64_at_any_scale(scale: float) -> None:
    z = scale * torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    z[2] = 0
    wanted = sample_norm(z.double())
    torch.testing.assert_close(scaled_norm(z).double(), wanted, rtol=1e-6, atol=1e-45)
    z[1, 0, 0] = torch.inf
    z[3, 0, 0] = torch.nan
    odd = scaled_norm(z)
    assert odd[1].isinf() and odd[3].isnan()
    torch.testing.assert_close(odd[::2].double(), wanted[::2], rtol=1e-6, atol=1e-45)
    assert scaled_norm(z[:0]).shape == (0,) and not scaled_norm(z[:, :0]).any()

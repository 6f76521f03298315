"""Every exact estimator is backprop on a layered dynamics, whichever way its phases are solved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import altprop as ap

EXACT = [
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


def blocks() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)).double()


def run(estimator: ap.AbstractEstimator | None, phases: str) -> list[Tensor]:
    stack = blocks()
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    cost = lambda z: (w * z + z**2).sum()  # noqa: E731
    if estimator is None:
        z = x
        for block in stack:
            z = block(z)
    else:
        solver = ap.Anderson(tol=1e-10, max_steps=200)
        z = ap.Equilibrium(ap.Layered(stack, phases=phases), solver, estimator)(x, cost=cost)  # type: ignore[arg-type]
    return list(torch.autograd.grad(cost(z), [x, *stack.parameters()]))


@pytest.mark.parametrize("phases", ["sweep", "synchronous"])
@pytest.mark.parametrize("estimator", EXACT, ids=repr)
def test_exact_estimators_are_backprop_on_layers(
    estimator: ap.AbstractEstimator, phases: str
) -> None:
    for found, wanted in zip(run(estimator, phases), run(None, phases), strict=True):
        assert float((found - wanted).norm()) < 1e-6 * float(wanted.norm())


def test_holomorphic_refuses_layers_with_the_reason() -> None:
    with pytest.raises(ap.RuleError, match="no analytic force"):
        run(ap.HolomorphicEP(), "sweep")


@pytest.mark.parametrize("transposed", [False, True])
def test_one_sweep_is_the_inverse_of_the_jacobian_or_of_its_transpose(transposed: bool) -> None:
    layered, x = ap.Layered(blocks()), torch.randn(2, 6, dtype=torch.float64)
    products = layered.linearise(layered.start(x), x)
    sweep = products.inverse(transposed=transposed)
    assert sweep is not None
    r = torch.randn(2, 24, dtype=torch.float64)
    back = products.vjp(sweep(r)) if transposed else products.jvp(sweep(r))
    assert torch.allclose(back, -r, rtol=1e-12)

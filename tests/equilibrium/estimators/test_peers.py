"""Implicit gradients of torchdeq and xitorch agree with ours, where these are installed."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import altprop as ap
from systems import KINDS, System, error, exact, flat, system


def by(s: System, x: Tensor, z: Tensor) -> Tensor:
    return flat(torch.autograd.grad(s.cost(z), [x, *s.dynamics.parameters()]))


@pytest.mark.parametrize("kind", KINDS)
def test_torchdeq_with_implicit_differentiation_agrees_with_implicit(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchdeq = pytest.importorskip("torchdeq")
    s = system(kind, seed=0)
    solvers = {"f_solver": "anderson", "b_solver": "anderson", "f_max_iter": 200}
    deq = torchdeq.get_deq(ift=True, **solvers, b_max_iter=200, f_tol=1e-11, b_tol=1e-11)
    x, step = s.x.clone().requires_grad_(), s.dynamics.step
    out, _ = deq(lambda z: z + step * s.dynamics(z, x), x.detach().clone())
    assert error(by(s, x, out[-1]), exact(s)) < 1e-5


class Root(torch.nn.Module):
    """The force as xitorch wants it: a method of a state, and tensors that it may differentiate."""

    def __init__(self, dynamics: ap.AbstractDynamics, names: list[str]) -> None:
        super().__init__()
        self.dynamics, self.names = dynamics, names

    def forward(self, z: torch.Tensor, x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self.names, values, strict=True))
        return torch.func.functional_call(self.dynamics, named, (z, x))


@pytest.mark.parametrize("kind", KINDS)
def test_xitorch_agrees_with_implicit(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimize = pytest.importorskip("xitorch.optimize")
        s = system(kind, seed=0)
        names, values = zip(*s.dynamics.named_parameters(), strict=True)
        root = Root(s.dynamics, list(names))
        x = s.x.clone().requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            z = optimize.rootfinder(
                lambda z, *rest: root(z, *rest),
                x.detach().clone(),
                params=(x, *values),
                method="broyden1",
                f_tol=1e-12,
                maxiter=500,
                bck_options={"method": "exactsolve"},
            )
            found = by(s, x, z)
    assert error(found, exact(s)) < 1e-5

"""A certificate counts all that a backward pass evaluates: forces, products, linearisations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import altprop as ap
from altprop.equilibrium.dynamics.products import AbstractLinearisation
from systems import tensor


class Counted(AbstractLinearisation):
    """`J = −I`, whose products are counted."""

    def __init__(self, dynamics: Walled) -> None:
        self._dynamics = dynamics

    def vjp(self, a: Tensor) -> Tensor:
        self._dynamics.made += 1
        return -a

    def jvp(self, v: Tensor) -> Tensor:
        return self.vjp(v)


class Walled(ap.AbstractDynamics):
    """`F = x − z` as far as `width` from the equilibrium at 1, and nothing beyond."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width, self.made = width, 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.made += 1
        return torch.where((z - 1).abs() > self.width, torch.nan, x - z)

    def linearise(self, z: Tensor, x: Tensor) -> AbstractLinearisation:
        self.made += 1
        return Counted(self)


@pytest.mark.parametrize("sides", [1, 2, 4])
@pytest.mark.parametrize("width", [1.0, 1e-7, 1e-8, 1e-13])
def test_looks_count_whether_they_are_enough_or_the_phases_are_solved(
    width: float, sides: int
) -> None:
    dynamics = Walled(width)
    estimator = ap.AEP(sides=sides)
    block = ap.Equilibrium(dynamics, ap.Anderson(), estimator, on_failure="accept")
    x = tensor(1.0, 1.0).reshape(2, 1).requires_grad_()
    z = block(x)
    dynamics.made = 0
    z.sum().backward()
    said = block.certificate
    assert said.adjoint_evaluations == dynamics.made
    assert (said.adjoint_result is ap.Result.CONVERGED) == (width > 1e-13)

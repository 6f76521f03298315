"""Digits through a continuous system whose coupling is skew-symmetric, where naive EP goes wrong.

`F(z; x) = −z + K tanh z + U x` with `K = scale · (A − Aᵀ)`: its Jacobian is as far from symmetric
as can be, so that `J⁻¹ g` and `J⁻ᵀ g` differ by the sign of the coupling. Since the eigenvalues of
`K D` are imaginary for every diagonal `D ≥ 0`, the state is stable whatever `K`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from altprop import GMRES, Equilibrium, Implicit, NewtonKrylov, from_function
from altprop.lab.settings import TrainConfig
from altprop.lab.tasks.digits import digits
from altprop.lab.tasks.task import AbstractClassification, plain_adamw


@dataclass(frozen=True)
class Skew(AbstractClassification):
    """Classify digits by the equilibrium of a skew-coupled system; estimators are its rules.

    **Arguments:** `states`, of the system; `coupling`, the norm that `K` starts with.
    """

    states: int = 32
    coupling: float = 3.0

    name: ClassVar[str] = "skew"
    hidden: ClassVar[tuple[str, ...]] = ("system.*",)

    @property
    def source(self) -> str:
        return "scikit-learn's digits, 1797 images of 8 × 8 pixels in [0, 1]"

    @property
    def recipe(self) -> TrainConfig:
        return plain_adamw(steps=570, batch=32, lr=3e-3)

    @cached_property
    def data(self) -> dict[str, tuple[Tensor, Tensor]]:
        return digits()

    def network(self) -> nn.Module:
        return SkewNetwork(self.states, self.coupling)


class SkewForce(nn.Module):
    """`F(z; x) = −z + (A − Aᵀ) tanh z + U x`."""

    def __init__(self, states: int, coupling: float) -> None:
        super().__init__()
        drawn = torch.randn(states, states)
        size = float(torch.linalg.matrix_norm(drawn - drawn.T, 2))
        self.A = nn.Parameter(drawn * (coupling / size))
        self.U = nn.Linear(64, states)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.U(x) - z + z.tanh() @ (self.A.T - self.A)


class SkewNetwork(nn.Module):
    """The system's equilibrium under an image, and a linear head."""

    def __init__(self, states: int, coupling: float) -> None:
        super().__init__()
        force = SkewForce(states, coupling)
        dynamics = from_function(
            force, step=1 / (1 + coupling**2), start=lambda x: x.new_zeros(len(x), states)
        )
        # at a coupling of 10 neither plain steps nor Anderson's reach the state or its adjoint
        solver, exact = NewtonKrylov(tol=1e-5), Implicit(tol=1e-5, solver=GMRES())
        self.system = Equilibrium(dynamics, solver, exact, on_failure="accept")
        self.head = nn.Linear(states, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.system(x))

"""One dynamics whose adjoint state can be read off, with its Jacobian as a dense matrix.

Shapes: a state is `(B, n)`. The force is `x − z + tanh(z Aᵀ)`, so that the input's gradient is the
adjoint state itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import altprop as ap

B, N = 2, 6


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Case:
    """A dynamics, an input and a cotangent that is as large as it is told."""

    gain: float = 0.7
    step: float = 0.8
    scale: float = 1.0

    @property
    def matrix(self) -> Tensor:
        return self.gain * randn(N, N, seed=1) / math.sqrt(N)  # nowhere near symmetric

    def force(self, z: Tensor, x: Tensor) -> Tensor:
        return x - z + torch.tanh(z @ self.matrix.T)

    def jacobian(self, z: Tensor) -> Tensor:
        """Return `∂F/∂z` of each sample, `(B, n, n)`."""
        slope = 1 - torch.tanh(z @ self.matrix.T) ** 2
        return slope[:, :, None] * self.matrix - torch.eye(N, dtype=z.dtype)

    def run(
        self,
        estimator: ap.AbstractEstimator,
        solver: ap.AbstractSolver | None = None,
        weights: Tensor | None = None,
    ) -> Run:
        x = randn(B, N, seed=2).requires_grad_()
        dynamics = ap.from_function(self.force, step=self.step)
        solver = ap.Anderson(tol=1e-12, max_steps=300) if solver is None else solver
        block = ap.Equilibrium(dynamics, solver, estimator, on_failure="accept")
        w = torch.ones(B, 1, dtype=torch.float64) if weights is None else weights

        def costs(z: Tensor) -> Tensor:
            return (z * randn(B, N, seed=3) + z**3 / 3).sum(1, keepdim=True)

        z = block(x, cost=lambda z: costs(z).sum())
        z.retain_grad()
        (self.scale * w * costs(z)).sum().backward()
        assert x.grad is not None and z.grad is not None and block.certificate is not None
        return Run(self, x.detach(), z.grad, x.grad, block.certificate)


@dataclass
class Run:
    """The input, the cotangent and the adjoint of one backward pass, and its certificate."""

    case: Case
    x: Tensor
    g: Tensor
    a: Tensor
    said: ap.Certificate

    @property
    def J(self) -> Tensor:
        return self.case.jacobian(self.said.state)

    @property
    def left(self) -> Tensor:
        """What the adjoint equation leaves, `Jᵀa + g`, `(B, n)`."""
        return torch.einsum("bji,bj->bi", self.J, self.a) + self.g


def size(z: Tensor) -> Tensor:
    return (z**2).sum(1).sqrt()


def root(case: Case, x: Tensor, near: Tensor) -> Tensor:
    """Return the equilibrium by Newton's method with the dense Jacobian."""
    z = near
    for _ in range(30):
        z = z - torch.linalg.solve(case.jacobian(z), case.force(z, x))
    return z

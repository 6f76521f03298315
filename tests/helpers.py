"""Tiny equilibria and the exact oracles that tests compare them with.

Shapes: `B` samples, `T` tokens, `C` channels, `H` heads; states and inputs are `(B, T, C)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

import altprop as ap

Gradients = dict[str, Tensor]
TIGHT = ap.Anderson(tol=1e-12, max_steps=500)
EXACT = ap.Implicit(tol=1e-11, max_steps=500)


@dataclass
class Task:
    """A dynamics with an input and a smooth cost of its equilibrium."""

    dynamics: ap.AbstractDynamics
    x: Tensor
    cost: Callable[[Tensor], Tensor]
    solver: ap.AbstractSolver = TIGHT

    def block(self, estimator: ap.AbstractEstimator = EXACT, **changes: Any) -> ap.Equilibrium:
        return ap.Equilibrium(
            self.dynamics, **{"solver": self.solver, **changes, "estimator": estimator}
        )

    def gradients(self, estimator: ap.AbstractEstimator = EXACT, **changes: Any) -> Gradients:
        """Return the gradients of the parameters and of the input `x` by `estimator`."""
        return gradients(self.block(estimator, **changes), self.x, self.cost)

    @torch.no_grad()
    def loss(self) -> float:
        return float(self.cost(self.block()(self.x)))

    def named(self) -> dict[str, Tensor]:
        return {"x": self.x, **{k: p.data for k, p in self.block().named_parameters()}}


def gradients(block: nn.Module, x: Tensor, cost: Callable[[Tensor], Tensor]) -> Gradients:
    """Return what one backward pass of `cost` writes into the parameters and into the input."""
    leaf = x.detach().clone().requires_grad_()
    block.zero_grad()
    cost(block(leaf, cost=cost)).backward()
    named = {"x": leaf, **dict(block.named_parameters())}
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


def task(dynamics: ap.AbstractDynamics, B: int, T: int, seed: int = 0) -> Task:
    """Return a float64 task on `dynamics`, whose cost reads every entry of the state."""
    C = next(p for p in dynamics.parameters()).shape[-1]
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(B, T, C, generator=generator).double() for _ in range(2))
    read = torch.randn(C, C, generator=generator).double() / C**0.5
    return Task(dynamics.double(), x, lambda z: (weight * torch.tanh(z @ read)).sum())


def damped(
    B: int = 2, T: int = 5, C: int = 8, H: int = 2, seed: int = 0, **settings: float
) -> Task:
    torch.manual_seed(seed)
    return task(ap.DampedAttention(C, H, **settings), B, T, seed)


def gated(B: int = 2, T: int = 5, C: int = 8, H: int = 2, seed: int = 0, gate: float = 0.4) -> Task:
    torch.manual_seed(seed)
    return task(open_gate(ap.GatedBlock(C, H, expansion=2, init_std=0.3), gate), B, T, seed)


def open_gate(block: ap.GatedBlock, gate: float) -> ap.GatedBlock:
    """Return `block` with no parameter at a special point."""
    nn.init.uniform_(block.alpha, -gate, gate)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 0, 0.2)
    for layer in (block.up, block.down):
        nn.init.normal_(layer.bias, 0, 0.2)
    return block


def reference_problem(seed: int, B: int = 4, T: int = 64, C: int = 128, H: int = 4) -> Task:
    """Return the reference problem in float32: small embeddings, fixed head, mean cross-entropy."""
    torch.manual_seed(seed)
    dynamics, V = ap.DampedAttention(C, H), 65
    x, head = 0.02 * torch.randn(B, T, C), torch.randn(V, C) / C**0.5
    y = torch.randint(0, V, (B, T))

    def cost(z: Tensor) -> Tensor:
        return nnf.cross_entropy((z @ head.to(z).T).flatten(0, 1), y.flatten())

    return Task(dynamics, x, cost, solver=ap.Anderson())


class SymmetricMemory(ap.AbstractDynamics):
    """`F = x − z + tanh(zW) Wᵀ / 2`, minus the gradient of an energy: its Jacobian is symmetric.

    (One memory per direction at most, with `‖W‖ = 1`, so that it contracts.)
    """

    def __init__(self, C: int, memories: int) -> None:
        super().__init__()
        W = torch.randn(memories, C)
        self.W = nn.Parameter(W / torch.linalg.matrix_norm(W, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x - z + torch.tanh(z @ self.W.T) @ self.W / 2


def jacobian(dynamics: ap.AbstractDynamics, z: Tensor, x: Tensor) -> Tensor:
    """Return `∂F/∂z` as a matrix, `(n, n)` with `n` the number of entries of `z`."""
    whole = torch.autograd.functional.jacobian(lambda s: dynamics(s, x), z)
    return whole.reshape(z.numel(), z.numel())


def relative_errors(got: Gradients, wanted: Gradients) -> dict[str, float]:
    """Return `‖got − wanted‖ / ‖wanted‖` by name."""
    assert got.keys() == wanted.keys()
    return {k: float((got[k].to(w) - w).norm() / w.norm()) for k, w in wanted.items()}


def worst(got: Gradients, wanted: Gradients) -> float:
    return max(relative_errors(got, wanted).values())


def flat(gradients: Gradients) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))

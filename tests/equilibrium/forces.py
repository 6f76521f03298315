"""Small forces in float64 for the solvers' tests, and what watches them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Force = Callable[[Tensor], Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def contraction(B: int = 2, n: int = 8) -> Force:
    q = torch.linalg.qr(randn(n, n, seed=1)).Q
    b = randn(B, n, seed=2)
    return lambda z: 0.8 * torch.tanh(z @ q) + b - z


def watched(force: Force) -> tuple[Force, list[Tensor]]:
    """Return a force that keeps every state it is asked for."""
    seen: list[Tensor] = []

    def wrapped(z: Tensor) -> Tensor:
        seen.append(z.clone())
        return force(z)

    return wrapped, seen


def size(z: Tensor) -> Tensor:
    return (z.flatten(1) ** 2).sum(1).sqrt()

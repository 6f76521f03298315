"""Small models with samples and tokens in any order, and their gradients written by hand.

Shapes: N samples, T tokens, C features, V outputs; `x` is (N, T, C) wherever it is not said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap

N, C, V = 3, 4, 5
Run = Callable[[Tensor], Tensor]
SHAPES = pytest.mark.parametrize("T", [N, N + 2], ids=["square", "oblong"])


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def same(h: Tensor) -> Tensor:
    return h


def mean_of_first(h: Tensor) -> Tensor:
    return h.mean(0)


class Net(nn.Module):
    """Two linear blocks with tanh, then `reads`, then a head: the blocks see what is given."""

    def __init__(self, reads: Run = same, between: Run = same) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(C, C, dtype=torch.float64), nn.Tanh()) for _ in range(2)
        )
        self.head = nn.Linear(C, V, dtype=torch.float64)
        self.reads, self.between = reads, between
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for block in self.blocks:
            x = block(self.between(x))
        return self.head(self.reads(x))


def convert(model: Net, granularity: str = "block", **options: Any) -> Net:
    rule = ap.DirectFeedback(granularity, feedback="independent", std=0.5)
    return ap.convert(model, rule, output="head", **options)


def errors(model: nn.Module, x: Tensor) -> Tensor:
    """Run one backward pass and return the error at the logits."""
    logits = model(x)
    logits.retain_grad()
    logits.cos().mul(torch.linspace(0.5, 2, logits.numel()).view(logits.shape)).sum().backward()
    return logits.grad


def check_blocks(model: Net, x: Tensor, place: Run) -> None:
    """Compare with `Σ (e Bᵀ ⊙ (1 − h²)) x`, where `place` says how `e` lies on (N, T)."""
    e = place(errors(model, x))
    for block in model.blocks:
        linear = block[0]
        x = model.between(x)
        with torch.no_grad():
            h = torch.tanh(linear(x))
        signal = (e @ getattr(block, "B_dfa", getattr(linear, "B_dfa", None)).T).expand(h.shape)
        if hasattr(block, "B_dfa"):
            signal = signal * (1 - h**2)
        want = signal.flatten(0, -2).T @ x.flatten(0, -2)
        assert torch.allclose(linear.weight.grad, want, rtol=1e-10, atol=1e-12)
        x = h


BOTH = pytest.mark.parametrize("granularity", ["block", "matmul"])

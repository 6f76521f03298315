"""A small model on widths that all differ, and its passes written out, for formulas of rules.

Shapes: N samples, T tokens; a feedback `B` is (features, k), an error `e` is (N, T, k).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N, T = 3, 2
WIDTHS = (5, 7, 6)  # input, first block, second block
K = 4  # logits


class Uneven(nn.Module):
    """head(f₂(f₁(x))) with `fᵢ(x) = tanh(x Wᵢᵀ + bᵢ)`; no two widths are equal."""

    def __init__(self, mixed: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b, dtype=torch.float64), nn.Tanh())
            for a, b in zip(WIDTHS, WIDTHS[1:], strict=False)
        )
        self.drop = nn.Dropout(dropout)
        self.mixed = mixed
        self.head = nn.Linear(WIDTHS[-1], K, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks[0](x)
        return self.above(h)

    def above(self, h: Tensor) -> Tensor:
        if self.mixed:  # a token hears those before it
            h = h.cumsum(1)
        return self.head(self.drop(self.blocks[1](self.drop(h))))


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, T, WIDTHS[0], generator=generator, dtype=torch.float64)
    return x.requires_grad_(), torch.randint(K, (N, T), generator=generator)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def close(got: Tensor | None, want: Tensor, tolerance: float = 1e-12) -> None:
    assert got is not None and got.shape == want.shape
    got, want = got.detach(), want.detach()
    assert float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


def outer(signal: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("nto,nti->oi", signal, x)


class Exact:
    """The states, errors and backprop gradients of a model before it is converted."""

    def __init__(self, model: Uneven, scale: float = 1.0) -> None:
        x, targets = inputs()
        h = [x, *(torch.empty(0),) * 2]
        for i, block in enumerate(model.blocks):
            h[i + 1] = block(h[i])
        logits = model.head(h[2])
        self.loss = scale * loss_of(logits, targets)
        parts = [logits, h[1], h[2], x, *model.parameters()]
        e, *rest = torch.autograd.grad(self.loss, parts)
        self.e = e
        self.above = rest[:2]
        self.to_x = rest[2]
        self.parameters = rest[3:]
        self.h = [s.detach() for s in h]


def trained(model: nn.Module, scale: float = 1.0) -> Tensor:
    """Run one backward pass, and return what the input received."""
    x, targets = inputs()
    model.zero_grad()
    (scale * loss_of(model(x), targets)).backward()
    assert x.grad is not None
    return x.grad


def feedback_of(model: Uneven, shared: bool) -> list[Tensor]:
    """Return each block's feedback: its first rows of the one there is, or its own."""
    if shared:
        (whole,) = [b for n, b in model.named_buffers() if "B_dfa_shared" in n]
        assert whole.shape[0] == max(WIDTHS[1:])
        return [whole[:7], whole[:6]]
    return [b for n, b in model.named_buffers() if n.endswith("B_dfa")]


class Residual(nn.Module):
    """`x + tanh(x Uᵀ) Dᵀ`, whose output is the summed residual."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=False, dtype=torch.float64)
        self.down = nn.Linear(inner, width, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class TwoParts(nn.Module):
    sublayer_outputs = ("first", "second")

    def __init__(self) -> None:
        super().__init__()
        self.first = Residual(5, 8)
        self.second = Residual(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoParts() for _ in range(2))
        self.head = nn.Linear(5, K, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)

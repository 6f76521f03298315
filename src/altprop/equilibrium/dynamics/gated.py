"""A transformer block whose fed-back part passes through a learned gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from altprop.equilibrium.dynamics import analytic
from altprop.equilibrium.dynamics.attention import (
    PARTS,
    AbstractAttentive,
    CausalAttention,
    feed_forward,
)
from altprop.equilibrium.dynamics.linearised import LinearisedFeedForward, linearise_norm, summed
from altprop.equilibrium.dynamics.plain import consists_of
from altprop.equilibrium.dynamics.products import AbstractEvaluation, Gradients
from altprop.errors import ConfigError


class GatedBlock(AbstractAttentive):
    """A pre-norm transformer block whose fed-back part passes through a learned gate.

    `w = x + α ⊙ (z − x)`, `u = x + Attn(LN₁ w)`, `g(z) = u + FFN(LN₂ u)`, `F = g(z) − z`. At its
    initialisation `α = 0` it is exactly the ordinary feed-forward block; learning raises the gate
    as far as feedback pays, so train it with `JacobianHinge`, or the fixed point gets lost.

    **Arguments:** `d_model`, the width `C`; `heads`; `expansion`, the width of the feed-forward
    part in multiples of `C`; `init_std`, of every weight. **Input and state:** `(B, T, C)`.
    """

    def __init__(
        self, d_model: int, heads: int, expansion: int = 4, init_std: float = 0.02
    ) -> None:
        super().__init__()
        if expansion < 1:
            raise ConfigError(f"expansion is {expansion}, expected at least 1")
        self.alpha = nn.Parameter(torch.zeros(d_model))
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = CausalAttention(d_model, heads, init_std)
        self.norm2 = nn.LayerNorm(d_model)
        self.up, self.down = feed_forward_maps(d_model, expansion, init_std)

    @property
    def gate(self) -> nn.Parameter:
        return self.alpha

    def attended(self, z: Tensor, x: Tensor) -> Tensor:
        return self.norm1(x + self.alpha * (z - x))

    def combine(self, z: Tensor, x: Tensor, mixed: Tensor) -> Tensor:
        u = x + mixed
        return u + feed_forward(self.norm2(u), self.up, self.down) - z

    def evaluate(self, z: Tensor, x: Tensor) -> AbstractEvaluation | None:
        return _GatedEvaluation(self, z, x) if consists_of(self, PARTS) else None

    def analytic(self, z: Tensor, x: Tensor) -> Tensor:
        w = x + self.alpha * (z - x)
        u = x + self.attention.analytic(analytic.apply_norm(self.norm1, w))
        normed = analytic.apply_norm(self.norm2, u)
        return u + analytic.feed_forward(normed, self.up, self.down) - z


def feed_forward_maps(d_model: int, expansion: int, std: float) -> tuple[nn.Linear, nn.Linear]:
    """Return the two maps of a feed-forward part, weights from `N(0, std²)` and biases at 0."""
    maps = nn.Linear(d_model, expansion * d_model), nn.Linear(expansion * d_model, d_model)
    for layer in maps:
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return maps


class LinearisedBlock:
    """`u = r + Attn(LN₁ h)`, `u + FFN(LN₂ u)`, linearised at `h` and the residual stream `r`.

    `value`: the output, `(B, T, C)`. `sources`: the parameters of its parts. Products take and give
    what belongs to `r` and what belongs to `h` apart from each other.

    **Arguments:** `block`, a module with `norm1`, `attention`, `norm2`, `up` and `down`; `h`, `r`,
    `(B, T, C)`.
    """

    def __init__(self, block: Any, h: Tensor, r: Tensor) -> None:
        self._norm1 = norm1 = linearise_norm(block.norm1, h)
        self._attention = block.attention.linearise(lambda: norm1.value)
        self._u = r + self._attention.value
        self._norm2 = norm2 = linearise_norm(block.norm2, self._u)
        self._feed_forward = LinearisedFeedForward(lambda: norm2.value, block.up, block.down)
        parts = self._norm1, self._attention, self._norm2, self._feed_forward
        self.sources = tuple(s for part in parts for s in part.sources)

    @property
    def value(self) -> Tensor:
        return self._u + self._feed_forward.value

    def vjp(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cotangents of `r` and of `h`."""
        du = self._to_middle(a)
        return du, self._norm1.vjp(self._attention.vjp(du))

    def own_vjp(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return what of them goes from a token to the same token."""
        du = self._to_middle(a)
        return du, self._norm1.vjp(self._attention.own_vjp(du))

    def _to_middle(self, a: Tensor) -> Tensor:
        return a + self._norm2.vjp(self._feed_forward.vjp(a))

    def jvp(self, dh: Tensor, dr: Tensor | None = None) -> Tensor:
        """Return the tangent of the output for those of `h` and, if it moves, of `r`."""
        du = self._attention.jvp(self._norm1.jvp(dh))
        du = du if dr is None else du + dr
        return du + self._feed_forward.jvp(self._norm2.jvp(du))

    def pull(self, a: Tensor) -> tuple[Tensor, Tensor, Gradients]:
        """Return the cotangents of `r` and `h`, and the gradients of the sources."""
        carried, feed_forward = self._feed_forward.pull(a)
        carried, norm2 = self._norm2.pull(carried)
        du = a + carried
        carried, attention = self._attention.pull(du)
        dh, norm1 = self._norm1.pull(carried)
        return du, dh, (*norm1, *attention, *norm2, *feed_forward)


class _GatedEvaluation(AbstractEvaluation):
    """`J = (I + E N₂) A N₁ diag(α) − I`, by the parts' own Jacobians."""

    tells_tokens = True

    @torch.no_grad()
    def __init__(self, block: GatedBlock, z: Tensor, x: Tensor) -> None:
        self._z, self._x, self._alpha = z, x.detach(), block.alpha.detach()
        w = self._x + self._alpha * (z - self._x)
        self._block = LinearisedBlock(block, w, self._x)
        self.sources = (x, block.alpha, *self._block.sources)

    @torch.no_grad()
    def force(self) -> Tensor:
        return self._block.value - self._z

    @torch.no_grad()
    def vjp(self, a: Tensor) -> Tensor:
        return self._alpha * self._block.vjp(a)[1] - a

    @torch.no_grad()
    def own_vjp(self, a: Tensor) -> Tensor:
        return self._alpha * self._block.own_vjp(a)[1] - a

    @torch.no_grad()
    def jvp(self, v: Tensor) -> Tensor:
        return self._block.jvp(self._alpha * v) - v

    def pull(self, a: Tensor) -> Gradients:
        du, dw, gradients = self._block.pull(a)
        to_x = du + (1 - self._alpha) * dw
        return to_x, summed(dw * (self._z - self._x)), *gradients

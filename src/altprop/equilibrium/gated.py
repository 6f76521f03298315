"""A transformer block whose fed-back part passes through a learned gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from altprop.equilibrium import analytic
from altprop.equilibrium.attention import (
    PARTS,
    AbstractAttentive,
    CausalAttention,
    feed_forward,
)
from altprop.equilibrium.linearised import LinearisedFeedForward, linearise_norm, summed
from altprop.equilibrium.plain import consists_of
from altprop.equilibrium.products import AbstractEvaluation, Gradients
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
        self.up = nn.Linear(d_model, expansion * d_model)
        self.down = nn.Linear(expansion * d_model, d_model)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=init_std)
            nn.init.zeros_(layer.bias)

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


class _GatedEvaluation(AbstractEvaluation):
    """`J = (I + E N₂) A N₁ diag(α) − I`, by the parts' own Jacobians."""

    tells_tokens = True

    @torch.no_grad()
    def __init__(self, block: GatedBlock, z: Tensor, x: Tensor) -> None:
        self._z, self._x, self._alpha = z, x.detach(), block.alpha.detach()
        w = self._x + self._alpha * (z - self._x)
        self._norm1 = norm1 = linearise_norm(block.norm1, w)
        self._attention = block.attention.linearise(lambda: norm1.value)
        self._u = self._x + self._attention.value
        self._norm2 = norm2 = linearise_norm(block.norm2, self._u)
        self._feed_forward = LinearisedFeedForward(lambda: norm2.value, block.up, block.down)
        parts = self._norm1, self._attention, self._norm2, self._feed_forward
        self.sources = (x, block.alpha, *(s for part in parts for s in part.sources))

    @torch.no_grad()
    def force(self) -> Tensor:
        return self._u + self._feed_forward.value - self._z

    @torch.no_grad()
    def vjp(self, a: Tensor) -> Tensor:
        du = a + self._norm2.vjp(self._feed_forward.vjp(a))
        return self._alpha * self._norm1.vjp(self._attention.vjp(du)) - a

    @torch.no_grad()
    def own_vjp(self, a: Tensor) -> Tensor:
        du = a + self._norm2.vjp(self._feed_forward.vjp(a))
        return self._alpha * self._norm1.vjp(self._attention.own_vjp(du)) - a

    @torch.no_grad()
    def jvp(self, v: Tensor) -> Tensor:
        du = self._attention.jvp(self._norm1.jvp(self._alpha * v))
        return du + self._feed_forward.jvp(self._norm2.jvp(du)) - v

    def pull(self, a: Tensor) -> Gradients:
        carried, feed_forward = self._feed_forward.pull(a)
        carried, norm2 = self._norm2.pull(carried)
        du = a + carried
        carried, attention = self._attention.pull(du)
        dw, norm1 = self._norm1.pull(carried)
        to_x = du + (1 - self._alpha) * dw
        to_alpha = summed(dw * (self._z - self._x))
        return to_x, to_alpha, *norm1, *attention, *norm2, *feed_forward

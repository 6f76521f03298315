"""The literature's equilibrium transformer: attention and feed-forward side by side, damped."""

from __future__ import annotations

from typing import Literal, get_args

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

Norm = Literal["layer", "rms"]


class ThickBlock(AbstractAttentive):
    """A parallel transformer block, `F = −(z − x) + s(Attn(LN₁ z) + FFN(LN₂ z)) − c z`.

    With norms in front the body does not see the scale of `z`, so the damping `c` alone is a mere
    rescaling and stabilises nothing. To train a language model prefer `GatedBlock`: measured with
    exact gradients, this block loses its fixed point without a stabiliser.

    **Arguments:** `d_model`, the width `C`; `heads`; `scale`, `s`; `damping`, `c`; `norm`,
    `"layer"` or `"rms"`; `qk_norm`, norm queries and keys per head; `channel_gain`, learn one `s`
    per channel, from `scale` on; `expansion`, the width of the feed-forward part in multiples of
    `C`; `init_std`, of every weight. **Input and state:** `(B, T, C)`.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        scale: float = 1.0,
        damping: float = 0.0,
        norm: Norm = "layer",
        qk_norm: bool = False,
        channel_gain: bool = False,
        expansion: int = 4,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if not damping > -1:
            raise ConfigError(
                f"damping is {damping}: 1 + damping must be positive, or nothing pulls the state "
                "back"
            )
        if norm not in get_args(Norm):
            raise ConfigError(f"norm is {norm!r}, expected 'layer' or 'rms'")
        if expansion < 1:
            raise ConfigError(f"expansion is {expansion}, expected at least 1")
        self.damping = damping
        self.step = 1 / (1 + damping)
        self.scale: float | nn.Parameter = scale
        if channel_gain:
            self.scale = nn.Parameter(torch.full((d_model,), float(scale)))
        self.norm1, self.norm2 = (
            nn.LayerNorm(d_model) if norm == "layer" else nn.RMSNorm(d_model, eps=1e-6)
            for _ in range(2)
        )
        self.attention = CausalAttention(d_model, heads, init_std, qk_norm)
        self.up = nn.Linear(d_model, expansion * d_model)
        self.down = nn.Linear(expansion * d_model, d_model)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=init_std)
            nn.init.zeros_(layer.bias)

    def attended(self, z: Tensor, x: Tensor) -> Tensor:
        return self.norm1(z)

    def combine(self, z: Tensor, x: Tensor, mixed: Tensor) -> Tensor:
        body = mixed + feed_forward(self.norm2(z), self.up, self.down)
        return x - (1 + self.damping) * z + self.scale * body

    def evaluate(self, z: Tensor, x: Tensor) -> AbstractEvaluation | None:
        return _ThickEvaluation(self, z, x) if consists_of(self, PARTS) else None

    def analytic(self, z: Tensor, x: Tensor) -> Tensor:
        body = self.attention.analytic(analytic.apply_norm(self.norm1, z))
        normed = analytic.apply_norm(self.norm2, z)
        body = body + analytic.feed_forward(normed, self.up, self.down)
        return x - (1 + self.damping) * z + self.scale * body

    def extra_repr(self) -> str:
        scale = self.scale if isinstance(self.scale, float | int) else "per channel"
        return f"scale={scale}, damping={self.damping}"


class _ThickEvaluation(AbstractEvaluation):
    """`J = diag(s)(A N₁ + E N₂) − (1 + c) I`, by the parts' own Jacobians."""

    tells_tokens = True

    @torch.no_grad()
    def __init__(self, block: ThickBlock, z: Tensor, x: Tensor) -> None:
        self._z, self._x, self._leak = z, x.detach(), 1 + block.damping
        learned = (block.scale,) if isinstance(block.scale, Tensor) else ()
        self._scale = block.scale.detach() if isinstance(block.scale, Tensor) else block.scale
        self._norm1 = norm1 = linearise_norm(block.norm1, z)
        self._norm2 = norm2 = linearise_norm(block.norm2, z)
        self._attention = block.attention.linearise(lambda: norm1.value)
        self._feed_forward = LinearisedFeedForward(lambda: norm2.value, block.up, block.down)
        parts = self._norm1, self._attention, self._norm2, self._feed_forward
        self.sources = (x, *learned, *(s for part in parts for s in part.sources))

    @torch.no_grad()
    def force(self) -> Tensor:
        return self._x - self._leak * self._z + self._scale * self._body()

    def _body(self) -> Tensor:
        return self._attention.value + self._feed_forward.value

    @torch.no_grad()
    def vjp(self, a: Tensor) -> Tensor:
        out = self._scale * a
        pulled = self._norm1.vjp(self._attention.vjp(out))
        return pulled + self._norm2.vjp(self._feed_forward.vjp(out)) - self._leak * a

    @torch.no_grad()
    def own_vjp(self, a: Tensor) -> Tensor:
        out = self._scale * a
        pulled = self._norm1.vjp(self._attention.own_vjp(out))
        return pulled + self._norm2.vjp(self._feed_forward.vjp(out)) - self._leak * a

    @torch.no_grad()
    def jvp(self, v: Tensor) -> Tensor:
        pushed = self._attention.jvp(self._norm1.jvp(v))
        pushed = pushed + self._feed_forward.jvp(self._norm2.jvp(v))
        return self._scale * pushed - self._leak * v

    def pull(self, a: Tensor) -> Gradients:
        scale = (summed(a * self._body()),) if isinstance(self._scale, Tensor) else ()
        out = self._scale * a
        carried, attention = self._attention.pull(out)
        norm1 = self._norm1.pull(carried)[1]
        carried, feed_forward = self._feed_forward.pull(out)
        norm2 = self._norm2.pull(carried)[1]
        return a, *scale, *norm1, *attention, *norm2, *feed_forward

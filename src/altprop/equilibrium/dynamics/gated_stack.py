"""Several transformer blocks as one equilibrium: gated feedback from the last to the first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from altprop.equilibrium.dynamics import analytic
from altprop.equilibrium.dynamics.attention import PARTS, CausalAttention, KeyValues, feed_forward
from altprop.equilibrium.dynamics.dynamics import AbstractDynamics
from altprop.equilibrium.dynamics.gated import GatedBlock, LinearisedBlock, feed_forward_maps
from altprop.equilibrium.dynamics.plain import consists_of
from altprop.equilibrium.dynamics.products import AbstractEvaluation, Gradients
from altprop.equilibrium.dynamics.system import Extension
from altprop.errors import ConfigError


class PreNormBlock(nn.Module):
    """An ordinary pre-norm transformer block, `u = h + Attn(LN₁ h)`, `h ↦ u + FFN(LN₂ u)`.

    **Arguments:** those of `GatedBlock`. **Input and output:** `(B, T, C)`.
    """

    def __init__(
        self, d_model: int, heads: int, expansion: int = 4, init_std: float = 0.02
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = CausalAttention(d_model, heads, init_std)
        self.norm2 = nn.LayerNorm(d_model)
        self.up, self.down = feed_forward_maps(d_model, expansion, init_std)

    def forward(self, h: Tensor, cache: KeyValues | None = None) -> Tensor:
        """Return the block's output, beside a cache of earlier tokens if there is one."""
        u = h + self.attention.extend(self.norm1(h), cache)
        return u + feed_forward(self.norm2(u), self.up, self.down)

    def remember(self, h: Tensor, cache: KeyValues | None) -> KeyValues:
        """Return the cache with the keys and values of new tokens, `(B, t, C)`, at its end."""
        return self.attention.remember(self.norm1(h), cache)

    def analytic(self, h: Tensor) -> Tensor:
        """Return the block's output at a complex input."""
        u = h + self.attention.analytic(analytic.apply_norm(self.norm1, h))
        return u + analytic.feed_forward(analytic.apply_norm(self.norm2, u), self.up, self.down)


class GatedStack(AbstractDynamics):
    """`L` transformer blocks as one equilibrium, whose gated feedback reaches the first.

    `g(z) = f_L ∘ … ∘ f_2 ∘ g₁(z)`, `F = g(z) − z`, with the `g₁` of `GatedBlock` (which is this
    with one layer): the residual stream is the input's, and only what the first attention reads is
    fed back. At its initialisation `α = 0` it is exactly `L` ordinary feed-forward blocks.

    **Arguments:** `d_model`, the width `C`; `heads`, of attention, which must divide it; `layers`,
    `L`; `expansion`, the width of the feed-forward parts over `C`; `init_std`, of the weights'
    normal initialisation. **Input and state:** `(B, T, C)`.
    **Raises:** `ConfigError` for fewer layers than one, or heads that do not divide the width.
    """

    def __init__(
        self, d_model: int, heads: int, layers: int, expansion: int = 4, init_std: float = 0.02
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ConfigError(f"layers is {layers}, expected at least 1")
        self.first = GatedBlock(d_model, heads, expansion, init_std)
        self.rest = nn.ModuleList(
            PreNormBlock(d_model, heads, expansion, init_std) for _ in range(layers - 1)
        )

    @property
    def gate(self) -> nn.Parameter:
        return self.first.alpha

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        h = self.first(z, x) + z
        for block in self.rest:
            h = block(h)
        return h - z

    def extend(self, cache: tuple[KeyValues | None, ...] | None, x: Tensor) -> Extension:
        caches = cache or (None,) * (1 + len(self.rest))
        first = self.first.extend(caches[0], x)

        def each(
            z: Tensor, act: Callable[[PreNormBlock, Tensor, KeyValues | None], None]
        ) -> Tensor:
            h = first.force(z) + z
            for block, own in zip(self.rest, caches[1:], strict=True):
                act(cast(PreNormBlock, block), h, own)
                h = block(h, own)
            return h - z

        def remember(z: Tensor) -> tuple[KeyValues, ...]:
            grown = [first.remember(z)]
            each(z, lambda block, h, own: grown.append(block.remember(h, own)))
            return tuple(grown)

        return Extension(partial(each, act=lambda block, h, own: None), remember)

    def evaluate(self, z: Tensor, x: Tensor) -> AbstractEvaluation | None:
        blocks = {str(i): (PreNormBlock,) for i in range(len(self.rest))}
        kinds = {**PARTS, **blocks, "first": (GatedBlock,), "rest": (nn.ModuleList,)}
        return _StackEvaluation(self, z, x) if consists_of(self, kinds) else None

    def analytic(self, z: Tensor, x: Tensor) -> Tensor:
        h = self.first.analytic(z, x) + z
        for block in self.rest:
            h = cast(PreNormBlock, block).analytic(h)
        return h - z


class _StackEvaluation(AbstractEvaluation):
    """`J = J_L ⋯ J_2 (I + J₁) − I`, by the blocks' own Jacobians.

    A way from a token through others never leads back to it, so its own block on the diagonal is
    the product of its own blocks.
    """

    tells_tokens = True

    @torch.no_grad()
    def __init__(self, stack: GatedStack, z: Tensor, x: Tensor) -> None:
        first = stack.first.evaluate(z, x)
        assert first is not None
        self._first, self._z = first, z
        h, self._rest = first.force() + z, list[LinearisedBlock]()
        for block in stack.rest:
            self._rest.append(LinearisedBlock(block, h, h))
            h = self._rest[-1].value
        self._value = h
        self.sources = (*first.sources, *(s for part in self._rest for s in part.sources))

    @torch.no_grad()
    def force(self) -> Tensor:
        return self._value - self._z

    @torch.no_grad()
    def vjp(self, a: Tensor) -> Tensor:
        carried = a
        for part in reversed(self._rest):
            carried = torch.add(*part.vjp(carried))
        return self._first.vjp(carried) + carried - a

    @torch.no_grad()
    def own_vjp(self, a: Tensor) -> Tensor:
        carried = a
        for part in reversed(self._rest):
            carried = torch.add(*part.own_vjp(carried))
        return self._first.own_vjp(carried) + carried - a

    @torch.no_grad()
    def jvp(self, v: Tensor) -> Tensor:
        pushed = self._first.jvp(v) + v
        for part in self._rest:
            pushed = part.jvp(pushed, pushed)
        return pushed - v

    def pull(self, a: Tensor) -> Gradients:
        carried, gradients = a, list[Gradients]()
        for part in reversed(self._rest):
            du, dh, own = part.pull(carried)
            carried = du + dh
            gradients.append(own)
        own = self._first.pull(carried)
        return (*own, *(g for each in reversed(gradients) for g in each))

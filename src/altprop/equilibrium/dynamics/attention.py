"""Causal attention and what every dynamics with one has in common: its exact cache.

Shapes: `B` samples, `T` tokens, `C` channels, `H` heads, `D = C/H`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from altprop.equilibrium.dynamics import analytic
from altprop.equilibrium.dynamics.dynamics import AbstractDynamics
from altprop.equilibrium.dynamics.linearised import LinearisedAttention
from altprop.equilibrium.dynamics.plain import FORCE, Kinds, is_overridden, is_watched
from altprop.equilibrium.dynamics.system import Extension
from altprop.errors import ConfigError


class KeyValues(NamedTuple):
    """The keys and values of earlier tokens, both `(B, H, S, D)`."""

    keys: Tensor
    values: Tensor


class CausalAttention(nn.Module):
    """Multi-head causal softmax attention with independent `W_Q, W_K, W_V, W_O` and no bias.

    **Arguments:** `d_model`, the width `C`; `heads`, which must divide it; `init_std`, the standard
    deviation of the normal initialisation; `qk_norm`, whether queries and keys are normed per head
    (RMS, with a learned gain per channel), which bounds the attention's logits.
    """

    def __init__(self, d_model: int, heads: int, init_std: float, qk_norm: bool = False) -> None:
        super().__init__()
        if d_model < 1 or heads < 1 or d_model % heads:
            raise ConfigError(
                f"heads is {heads} and d_model is {d_model}: heads must divide d_model, "
                "for example heads=4 with d_model=128"
            )
        self.heads = heads
        self.W_Q, self.W_K, self.W_V, self.W_O = (
            nn.Parameter(init_std * torch.randn(d_model, d_model)) for _ in range(4)
        )

        own = d_model // heads
        self.norm_q = nn.RMSNorm(own, eps=1e-6) if qk_norm else None
        self.norm_k = nn.RMSNorm(own, eps=1e-6) if qk_norm else None

    def forward(self, z: Tensor) -> Tensor:
        """Return the attention's output, `(B, T, C) → (B, T, C)`."""
        return self._merge(nnf.scaled_dot_product_attention(*self._project(z), is_causal=True))

    def extend(self, z: Tensor, cache: KeyValues | None) -> Tensor:
        """Return the output of new tokens, `(B, t, C)`, that attend to a cache and each other."""
        if cache is None:
            return self.forward(z)
        q, k, v = self._project(z)
        t, S = k.shape[2], cache.keys.shape[2]
        scores = torch.cat([q @ cache.keys.mT, q @ k.mT], dim=-1) * q.shape[-1] ** -0.5
        if t > 1:
            future = torch.ones(t, S + t, dtype=torch.bool, device=z.device).triu_(S + 1)
            scores = scores.masked_fill(future, -torch.inf)
        p = scores.softmax(-1)
        return self._merge(p[..., :S] @ cache.values + p[..., S:] @ v)

    def remember(self, z: Tensor, cache: KeyValues | None) -> KeyValues:
        """Return the cache with the keys and values of new tokens, `(B, t, C)`, at its end."""
        _, k, v = self._project(z)
        if cache is None:
            return KeyValues(k, v)
        return KeyValues(torch.cat([cache.keys, k], 2), torch.cat([cache.values, v], 2))

    @torch.no_grad()
    def linearise(self, read: Callable[[], Tensor]) -> LinearisedAttention:
        """Return the attention linearised at the `(B, T, C)` state that `read` returns."""
        weights = self.W_Q, self.W_K, self.W_V, self.W_O
        return LinearisedAttention(read, weights, self.heads, self._norms())

    def _norms(self) -> tuple[nn.RMSNorm, nn.RMSNorm] | None:
        if self.norm_q is None or self.norm_k is None:
            return None
        return self.norm_q, self.norm_k

    def _project(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, C = z.shape
        qkv = nnf.linear(z, torch.cat([self.W_Q, self.W_K, self.W_V]))
        q, k, v = qkv.view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        norms = self._norms()
        if norms is not None:
            q, k = norms[0](q), norms[1](k)
        return q, k, v

    def _merge(self, mixed: Tensor) -> Tensor:
        return nnf.linear(mixed.transpose(1, 2).flatten(2), self.W_O)

    def analytic(self, z: Tensor) -> Tensor:
        """Return the attention's output at a complex state, `(B, T, C)`."""
        weights = self.W_Q, self.W_K, self.W_V, self.W_O
        return analytic.causal_attention(z, *weights, self.heads, self._norms())

    def extra_repr(self) -> str:
        return f"d_model={self.W_Q.shape[0]}, heads={self.heads}"


def feed_forward(x: Tensor, up: nn.Module, down: nn.Module) -> Tensor:
    """Return `down(gelu(up(x)))`, `(..., C) → (..., C)`; in place where nobody sees it."""
    h = up(x)
    plain = type(up) is nn.Linear and not (is_overridden(up, FORCE) or is_watched(up))
    own = plain and not torch.is_grad_enabled()
    return down(torch.ops.aten.gelu_(h) if own else nnf.gelu(h))


_NORMS = (nn.LayerNorm, nn.RMSNorm)
PARTS: Kinds = {  # what has closed forms, by its name in a block
    "attention": (CausalAttention,),
    **dict.fromkeys(("norm1", "norm2"), _NORMS),
    **dict.fromkeys(("norm_q", "norm_k"), (nn.RMSNorm,)),
    **dict.fromkeys(("up", "down"), (nn.Linear,)),
}


class AbstractAttentive(AbstractDynamics):
    """Base of the causal dynamics with one attention; from it they get their exact cache.

    An equilibrium of such a dynamics never depends on later tokens, and on earlier ones only
    through the keys and values of their equilibria.
    """

    attention: CausalAttention

    @abstractmethod
    def attended(self, z: Tensor, x: Tensor) -> Tensor:
        """Return what the attention reads at state `z` under input `x`, all `(B, T, C)`."""

    @abstractmethod
    def combine(self, z: Tensor, x: Tensor, mixed: Tensor) -> Tensor:
        """Return the force, given what the attention made of it, `mixed`, `(B, T, C)`."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.combine(z, x, self.attention(self.attended(z, x)))

    def extend(self, cache: KeyValues | None, x: Tensor) -> Extension:
        return Extension(
            lambda z: self.combine(z, x, self.attention.extend(self.attended(z, x), cache)),
            lambda z: self.attention.remember(self.attended(z, x), cache),
        )

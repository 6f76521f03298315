"""Damped attention, the field's reference dynamics."""

from __future__ import annotations

import torch
from torch import Tensor

from altprop.equilibrium.dynamics.attention import PARTS, AbstractAttentive, CausalAttention
from altprop.equilibrium.dynamics.plain import consists_of
from altprop.equilibrium.dynamics.products import AbstractEvaluation, Gradients
from altprop.errors import ConfigError


class DampedAttention(AbstractAttentive):
    """Damped attention, `F(z; x) = −(z − x) + s(Attn(z) − c z)`.

    The reference dynamics of the field (Scurria et al., arXiv 2602.03670). Its Jacobian is not
    symmetric, so naive equilibrium propagation is biased on it. To train a language model prefer
    `GatedBlock`: without a stabiliser this one loses its fixed point.

    **Arguments:** `d_model`, the width `C`; `heads`; `scale`, `s`; `damping`, `c`. Weights start at
    `N(0, 1/C)`. **Input and state:** `(B, T, C)`.
    """

    def __init__(self, d_model: int, heads: int, scale: float = 1.0, damping: float = 1.0) -> None:
        super().__init__()
        if not 1 + scale * damping > 0:
            raise ConfigError(
                f"scale is {scale} and damping is {damping}: 1 + scale × damping must be positive, "
                "or nothing pulls the state back"
            )
        self.scale, self.damping = scale, damping
        self.step = 1 / (1 + scale * damping)
        self.attention = CausalAttention(d_model, heads, init_std=d_model**-0.5)

    def attended(self, z: Tensor, x: Tensor) -> Tensor:
        return z

    def combine(self, z: Tensor, x: Tensor, mixed: Tensor) -> Tensor:
        pulled = torch.sub(x, z, alpha=1 + self.scale * self.damping)
        return torch.add(pulled, mixed, alpha=self.scale)

    def evaluate(self, z: Tensor, x: Tensor) -> AbstractEvaluation | None:
        return _DampedEvaluation(self, z, x) if consists_of(self, PARTS) else None

    def analytic(self, z: Tensor, x: Tensor) -> Tensor:
        attended = self.scale * self.attention.analytic(z)
        return x - (1 + self.scale * self.damping) * z + attended

    def extra_repr(self) -> str:
        return f"scale={self.scale}, damping={self.damping}"


class _DampedEvaluation(AbstractEvaluation):
    """`J = s A − (1 + sc) I` with the attention's Jacobian `A`."""

    tells_tokens = True

    @torch.no_grad()
    def __init__(self, dynamics: DampedAttention, z: Tensor, x: Tensor) -> None:
        self._z, self._x = z, x.detach()
        self._scale, self._leak = dynamics.scale, 1 + dynamics.scale * dynamics.damping
        self._attention = dynamics.attention.linearise(lambda: z)
        self.sources = (x, *self._attention.sources)

    @torch.no_grad()
    def force(self) -> Tensor:
        pulled = torch.sub(self._x, self._z, alpha=self._leak)
        return pulled.add_(self._attention.value, alpha=self._scale)

    @torch.no_grad()
    def vjp(self, a: Tensor) -> Tensor:
        return self._attention.vjp(a).mul_(self._scale).sub_(a, alpha=self._leak)

    @torch.no_grad()
    def own_vjp(self, a: Tensor) -> Tensor:
        return self._attention.own_vjp(a).mul_(self._scale).sub_(a, alpha=self._leak)

    @torch.no_grad()
    def jvp(self, v: Tensor) -> Tensor:
        return self._attention.jvp(v).mul_(self._scale).sub_(v, alpha=self._leak)

    def pull(self, a: Tensor) -> Gradients:
        pulled = a if self._scale == 1 else self._scale * a
        return a, *self._attention.pull(pulled)[1]

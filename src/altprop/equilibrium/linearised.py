"""Closed-form products with the Jacobians of a transformer's parts, frozen at one state.

A nudged phase needs many products `Jv` and `Jᵀa` at the same state. Everything that does not
depend on `v` or `a` (projections, attention matrix, norms' statistics, the activation's slope) is
computed once here; each product then costs about one forward evaluation, where forward-mode or
double-backward automatic differentiation costs several.

Shapes: `B` samples, `T` tokens, `C` channels, `H` heads, `D = C/H`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn


class LinearisedAttention:
    """Causal softmax attention `z ↦ softmax(QKᵀ/√D) V W_Oᵀ`, linearised at `z`, `(B, T, C)`.

    **Arguments:** `z`; `w_qkv`, `(3C, C)`; `w_o`, `(C, C)`; `heads`; `norms`, of the queries and
    keys per head, if they have any. `value` is its output at `z`.
    """

    def __init__(
        self,
        z: Tensor,
        w_qkv: Tensor,
        w_o: Tensor,
        heads: int,
        norms: tuple[nn.RMSNorm, nn.RMSNorm] | None = None,
    ) -> None:
        _, T, C = z.shape
        self._w_qkv, self._w_o, self._heads = w_qkv, w_o, heads
        scale = (C // heads) ** -0.5
        q, k, self._v = self._split(nnf.linear(z, w_qkv))
        self._norms: tuple[LinearisedRMSNorm, LinearisedRMSNorm] | None = None
        if norms is not None:
            normed = linearise_rms_norm(norms[0], q), linearise_rms_norm(norms[1], k)
            self._norms, q, k = normed, normed[0].value, normed[1].value
        # the scale is folded into both, for each product needs it once
        self._q, self._k = scale * q, scale * k
        future = torch.ones(T, T, dtype=torch.bool, device=z.device).triu_(1)
        self._p = (q @ self._k.mT).masked_fill_(future, -math.inf).softmax(-1)
        self._mixed = self._p @ self._v
        self.value = nnf.linear(self._merge(self._mixed), w_o)

    def jvp(self, dz: Tensor) -> Tensor:
        dq, dk, dv = self._split(nnf.linear(dz, self._w_qkv))
        if self._norms is not None:
            dq, dk = self._norms[0].jvp(dq), self._norms[1].jvp(dk)
        # where P = 0, in the future, what these score changes hold never counts
        weighted = (dq @ self._k.mT).add_(self._q @ dk.mT).mul_(self._p)
        total = weighted.sum(-1, keepdim=True)
        mixed = (weighted @ self._v).addcmul_(total, self._mixed, value=-1)
        return nnf.linear(self._merge(mixed.add_(self._p @ dv)), self._w_o)

    def vjp(self, a: Tensor) -> Tensor:
        (da,) = self._split(a @ self._w_o)
        mean = (da * self._mixed).sum(-1, keepdim=True)
        ds = (da @ self._v.mT).sub_(mean).mul_(self._p)
        dq, dk, dv = ds @ self._k, ds.mT @ self._q, self._p.mT @ da
        if self._norms is not None:
            dq, dk = self._norms[0].vjp(dq), self._norms[1].vjp(dk)
        B, H, T, D = dv.shape
        joint = dv.new_empty(B, T, 3, H, D)
        for slot, part in enumerate((dq, dk, dv)):
            joint[:, :, slot] = part.transpose(1, 2)
        return joint.view(B, T, 3 * H * D) @ self._w_qkv

    def _split(self, y: Tensor) -> tuple[Tensor, ...]:
        """Return the `(B, H, T, D)` parts of `(B, T, nC)`."""
        B, T, _ = y.shape
        D = self._w_o.shape[0] // self._heads
        return y.view(B, T, -1, self._heads, D).permute(2, 0, 3, 1, 4).contiguous().unbind(0)

    @staticmethod
    def _merge(y: Tensor) -> Tensor:
        B, H, T, D = y.shape
        return y.transpose(1, 2).reshape(B, T, H * D)


class LinearisedNorm:
    """Layer norm over the last axis, linearised at `x`, `(..., C)`; `value` is its output."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
        self._x, self._weight, self._bias = x, weight, bias
        self.value, self._mean, self._rstd = torch.native_layer_norm(
            x, weight.shape, weight, bias, eps
        )

    def jvp(self, dx: Tensor) -> Tensor:
        return self._project(dx, None) * self._weight  # the projection is symmetric

    def vjp(self, a: Tensor) -> Tensor:
        return self._project(a, self._weight)

    def _project(self, v: Tensor, weight: Tensor | None) -> Tensor:
        """Return `rstd (u − mean(u) − x̂ mean(x̂ u))` with `u = weight v`, by torch's own kernel."""
        bias = None if weight is None else self._bias
        saved = self._weight.shape, self._mean, self._rstd, weight, bias
        out: Tensor = torch.ops.aten.native_layer_norm_backward(
            v.contiguous(), self._x, *saved, [True, False, False]
        )[0]
        return out


class LinearisedRMSNorm:
    """`x ↦ weight ⊙ x / rms(x)` over the last axis, linearised at `x`, `(..., C)`."""

    def __init__(self, x: Tensor, weight: Tensor, eps: float) -> None:
        self._weight = weight
        self._rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        self._unit = x * self._rstd
        self.value = self._unit * weight

    def jvp(self, dx: Tensor) -> Tensor:
        return self._project(dx) * self._weight

    def vjp(self, a: Tensor) -> Tensor:
        return self._project(a * self._weight)

    def _project(self, v: Tensor) -> Tensor:
        """Return `rstd (v − x̂ mean(x̂ v))`, which is symmetric in `v`."""
        along = (self._unit * v).mean(-1, keepdim=True)
        return self._rstd * (v - self._unit * along)


def linearise_rms_norm(norm: nn.RMSNorm, x: Tensor) -> LinearisedRMSNorm:
    """Return an RMS norm over the last axis, linearised at `x`."""
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    return LinearisedRMSNorm(x, norm.weight.detach(), eps)


def linearise_norm(
    norm: nn.LayerNorm | nn.RMSNorm, x: Tensor
) -> LinearisedNorm | LinearisedRMSNorm:
    """Return a norm over the last axis, linearised at `x`, `(..., C)`."""
    if isinstance(norm, nn.RMSNorm):
        return linearise_rms_norm(norm, x)
    return LinearisedNorm(x, norm.weight.detach(), norm.bias.detach(), norm.eps)


class LinearisedFeedForward:
    """`x ↦ down(gelu(up(x)))`, linearised at `x`, `(..., C)`."""

    def __init__(self, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor) -> None:
        self._up, self._down = up, down
        h = nnf.linear(x, up, up_bias)
        self._slope = torch.ops.aten.gelu_backward(torch.ones_like(h), h)  # Φ(h) + h φ(h)

    def jvp(self, dx: Tensor) -> Tensor:
        return nnf.linear(nnf.linear(dx, self._up).mul_(self._slope), self._down)

    def vjp(self, a: Tensor) -> Tensor:
        return (a @ self._down).mul_(self._slope) @ self._up

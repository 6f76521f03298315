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

_DENSE = 128  # up to so many tokens the whole attention matrix is cheaper to keep than to recompute


class LinearisedAttention:
    """Causal softmax attention `z ↦ softmax(QKᵀ/√D) V W_Oᵀ`, linearised at `z`, `(B, T, C)`.

    **Arguments:** `qkv`, the projections of `z`, `(B, T, 3C)`; `w_qkv`, `(3C, C)`; `w_o`, `(C, C)`;
    `heads`; `norms`, of the queries and keys per head, if they have any; `mixed`, the heads' values
    at `z`, `(B, H, T, D)`, where they are known.
    """

    def __init__(
        self,
        qkv: Tensor,
        w_qkv: Tensor,
        w_o: Tensor,
        heads: int,
        norms: tuple[nn.RMSNorm, nn.RMSNorm] | None = None,
        mixed: Tensor | None = None,
    ) -> None:
        self._w_qkv, self._w_o, self._heads = w_qkv, w_o, heads
        q, k, v = self._split(qkv)
        self._norms: tuple[LinearisedRMSNorm, LinearisedRMSNorm] | None = None
        if norms is not None:
            normed = linearise_rms_norm(norms[0], q), linearise_rms_norm(norms[1], k)
            self._norms, q, k = normed, normed[0].value, normed[1].value
        dense = qkv.shape[1] <= _DENSE
        self._core = _Dense(q, k, v, mixed) if dense else _Fused(q, k, v)

    @property
    def value(self) -> Tensor:
        """The attention's output at `z`, `(B, T, C)`."""
        return nnf.linear(self._merge(self._core.value), self._w_o)

    def jvp(self, dz: Tensor) -> Tensor:
        dq, dk, dv = self._split(nnf.linear(dz, self._w_qkv))
        if self._norms is not None:
            dq, dk = self._norms[0].jvp(dq), self._norms[1].jvp(dk)
        return nnf.linear(self._merge(self._core.jvp(dq, dk, dv)), self._w_o)

    def vjp(self, a: Tensor) -> Tensor:
        (da,) = self._split(a @ self._w_o)
        dq, dk, dv = self._core.vjp(da)
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


class _Dense:
    """`softmax(QKᵀ/√D) V`, linearised with its attention matrix at hand; for short windows.

    **Arguments:** `q`, `k`, `v`, `(B, H, T, D)`. `value` is its output, of that shape; it is
    computed unless it is given.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, value: Tensor | None = None) -> None:
        T, D = q.shape[-2:]
        scale = D**-0.5
        # the scale is folded into both, for each product needs it once
        self._q, self._k, self._v = scale * q, scale * k, v
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu_(1)
        self._p = (q @ self._k.mT).masked_fill_(future, -math.inf).softmax(-1)
        self.value = self._p @ v if value is None else value.contiguous()

    def jvp(self, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        # where P = 0, in the future, what these score changes hold never counts
        weighted = (dq @ self._k.mT).add_(self._q @ dk.mT).mul_(self._p)
        total = weighted.sum(-1, keepdim=True)
        mixed = (weighted @ self._v).addcmul_(total, self.value, value=-1)
        return mixed.add_(self._p @ dv)

    def vjp(self, da: Tensor) -> tuple[Tensor, ...]:
        mean = (da * self.value).sum(-1, keepdim=True)
        ds = (da @ self._v.mT).sub_(mean).mul_(self._p)
        return ds @ self._k, ds.mT @ self._q, self._p.mT @ da


class _Fused:
    """The same for long windows: torch's fused kernel, whose memory is linear in `T`.

    It has no forward-mode derivative, so `Jv` goes over the queries in slices, and computes their
    rows of the attention matrix anew.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
            self._out = nnf.scaled_dot_product_attention(q, k, v, is_causal=True)
        self._parts = (q, k, v)
        self.value = self._out.detach()

    def vjp(self, da: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self._out, self._parts, da, retain_graph=True)

    def jvp(self, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        q, k, v = (t.detach() for t in self._parts)
        T, D = q.shape[-2:]
        out = torch.empty_like(dv)
        for i in range(0, T, _DENSE):
            j = min(i + _DENSE, T)
            rows, seen = slice(i, j), slice(0, j)
            own, moved = D**-0.5 * q[..., rows, :], D**-0.5 * dq[..., rows, :]
            future = torch.ones(j - i, j, dtype=torch.bool, device=q.device).triu_(i + 1)
            p = (own @ k[..., seen, :].mT).masked_fill_(future, -math.inf).softmax(-1)
            weighted = (moved @ k[..., seen, :].mT).add_(own @ dk[..., seen, :].mT).mul_(p)
            total = weighted.sum(-1, keepdim=True)
            mixed = weighted @ v[..., seen, :] + p @ dv[..., seen, :]
            out[..., rows, :] = mixed.addcmul_(total, self.value[..., rows, :], value=-1)
        return out


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

"""Closed forms of a transformer's parts, frozen at one state: products and parameters' gradients.

A nudged phase needs many products `Jv` and `Jᵀa` at the same state. Everything that does not
depend on `v` or `a` (projections, attention matrix, norms' statistics, the activation's slope) is
computed once here; each product then costs about one forward evaluation, where forward-mode or
double-backward automatic differentiation costs several. What is kept is about what autograd would
keep of one evaluation, so it serves for the gradients of the parameters too.

Every part has `value`, its output; `jvp` and `vjp`; `sources`, the parameters that it is made of;
and `pull`, from a cotangent of its output to that of its input, as `vjp`, and the gradients of its
sources in their order (`None` for one that does not learn).

Shapes: `B` samples, `T` tokens, `C` channels, `H` heads, `D = C/H`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from altprop.equilibrium.dynamics.products import Gradients

_DENSE = 128  # up to so many tokens the whole attention matrix is cheaper to keep than to recompute
_LEAST = 32  # of a matrix that is computed anew, so many rows at a time, or more if they are short
Read = Callable[[], Tensor]


class LinearisedAttention:
    """Causal softmax attention `z ↦ softmax(QKᵀ/√D) V W_Oᵀ`, linearised at `z`, `(B, T, C)`.

    **Arguments:** `read`, which returns `z`, and is called again for the weights' gradients, so
    that a `z` made for this alone need not be kept; `weights`, `W_Q, W_K, W_V, W_O`, `(C, C)`;
    `heads`; `norms`, of the queries and keys per head, if they have any.
    """

    def __init__(
        self,
        read: Read,
        weights: tuple[Tensor, Tensor, Tensor, Tensor],
        heads: int,
        norms: tuple[nn.RMSNorm, nn.RMSNorm] | None = None,
    ) -> None:
        *self._projections, self._w_o = (w.detach() for w in weights)
        self._read, self._heads = read, heads
        z = read()
        # The scale 1/√D is folded into what makes queries and keys, half into each.
        root = (z.shape[-1] // heads) ** -0.25
        self._roots = (root, root, 1.0) if norms is None else (1.0, 1.0, 1.0)
        self.sources = (*weights, *(norm.weight for norm in norms or ()))
        q, k, v = self._split(self._project(z))
        self._norms: tuple[LinearisedRMSNorm, LinearisedRMSNorm] | None = None
        if norms is not None:
            normed = linearise_rms_norm(norms[0], q, root), linearise_rms_norm(norms[1], k, root)
            self._norms, q, k = normed, normed[0].value, normed[1].value
        self._core = (_Dense if z.shape[1] <= _DENSE else _Fused)(q, k, v)

    @property
    def value(self) -> Tensor:
        """The attention's output at `z`, `(B, T, C)`."""
        return nnf.linear(self._merge(self._core.value), self._w_o)

    def jvp(self, dz: Tensor) -> Tensor:
        dq, dk, dv = self._split(self._project(dz))
        if self._norms is not None:
            dq, dk = self._norms[0].jvp(dq), self._norms[1].jvp(dk)
        return nnf.linear(self._merge(self._core.jvp(dq, dk, dv)), self._w_o)

    def vjp(self, a: Tensor) -> Tensor:
        (da,) = self._split(a @ self._w_o)
        return self._to_state(self._core.vjp(da))

    def own_vjp(self, a: Tensor) -> Tensor:
        """Return what of `vjp` goes from a token's output to the same token, `(B, T, C)`."""
        (da,) = self._split(a @ self._w_o)
        return self._to_state(self._core.own_vjp(da))

    def _to_state(self, parts: Iterator[tuple[int, Tensor]]) -> Tensor:
        """Return the cotangent of `z` from those of queries, keys and values, with their places."""
        out: Tensor | None = None
        for slot, part in parts:
            if self._norms is not None and slot < 2:
                part = self._norms[slot].vjp(part)
            out = self._add(out, slot, self._merge(part))
            del part  # before the next one is made
        assert out is not None
        return out

    def pull(self, a: Tensor) -> tuple[Tensor, Gradients]:
        gradients: list[Tensor | None] = [None] * len(self.sources)
        gradients[3] = product(self.sources[3], a, lambda: self._merge(self._core.value))
        z = self._read()
        out: Tensor | None = None
        (da,) = self._split(a @ self._w_o)
        for slot, part in self._core.vjp(da):
            if self._norms is not None and slot < 2:
                part, (gradients[4 + slot],) = self._norms[slot].pull(part)
            merged = self._merge(part)
            weight = product(self.sources[slot], merged, lambda: z)
            gradients[slot] = weight if weight is None else weight.mul_(self._roots[slot])
            out = self._add(out, slot, merged)
            del part, merged
        assert out is not None
        return out, tuple(gradients)

    def _add(self, out: Tensor | None, slot: int, part: Tensor) -> Tensor:
        """Add to the cotangent of `z` what comes by a projection's, both `(B, T, C)`."""
        weight = self._weight(slot)
        if out is None:
            return part @ weight
        out.flatten(0, 1).addmm_(part.flatten(0, 1), weight)
        return out

    def _project(self, z: Tensor) -> Tensor:
        """Return queries, keys and values of `z` side by side, `(B, T, C) → (B, T, 3C)`."""
        return nnf.linear(z, torch.cat([self._weight(slot) for slot in range(3)]))

    def _weight(self, slot: int) -> Tensor:
        """Return a projection's weight with its scale; not kept, for there may be many chunks."""
        weight, root = self._projections[slot], self._roots[slot]
        return weight if root == 1 else root * weight

    def _split(self, y: Tensor) -> tuple[Tensor, ...]:
        """Return the `(B, H, T, D)` parts of `(B, T, nC)`."""
        B, T, width = y.shape
        C = self._w_o.shape[0]
        return (
            y.view(B, T, width // C, self._heads, C // self._heads)
            .permute(2, 0, 3, 1, 4)
            .contiguous()
            .unbind(0)
        )

    @staticmethod
    def _merge(y: Tensor) -> Tensor:
        B, H, T, D = y.shape
        return y.transpose(1, 2).reshape(B, T, H * D)


class _Dense:
    """`softmax(QKᵀ) V`, linearised with its attention matrix at hand; for short windows.

    **Arguments:** `q`, `k`, `v`, `(B, H, T, D)`. `value` is its output, of that shape.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._q, self._k, self._v = q, k, v
        future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu_(1)
        self._p = (q @ k.mT).masked_fill_(future, -math.inf).softmax(-1)
        self.value = self._p @ v

    def jvp(self, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        # where P = 0, in the future, what these score changes hold never counts
        weighted = (dq @ self._k.mT).add_(self._q @ dk.mT).mul_(self._p)
        total = weighted.sum(-1, keepdim=True)
        mixed = (weighted @ self._v).addcmul_(total, self.value, value=-1)
        return mixed.add_(self._p @ dv)

    def vjp(self, da: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the cotangents of `q`, `k`, `v` with their places, one at a time to save memory."""
        yield 2, self._p.mT @ da
        mean = (da * self.value).sum(-1, keepdim=True)
        ds = (da @ self._v.mT).sub_(mean).mul_(self._p)
        yield 0, ds @ self._k
        yield 1, ds.mT @ self._q

    def own_vjp(self, da: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the same as far as a token's output depends on its own query, key and value."""
        yield 2, self._p.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * da
        mean = (da * self.value).sum(-1, keepdim=True)
        ds = (da @ self._v.mT).sub_(mean).mul_(self._p)
        yield 0, ds @ self._k
        yield 1, ds.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * self._q


class _Fused:
    """The same for long windows: torch's fused kernel, whose memory is linear in `T`.

    It has no forward-mode derivative, so `Jv` goes over the queries in slices, and computes their
    rows of the attention matrix anew.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
            self._out = nnf.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        self._parts = (q, k, v)
        self.value = self._out.detach()

    def vjp(self, da: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield from enumerate(torch.autograd.grad(self._out, self._parts, da, retain_graph=True))

    def own_vjp(self, da: Tensor) -> Iterator[tuple[int, Tensor]]:
        q, k, v = (t.detach() for t in self._parts)
        out = torch.empty_like(q)
        own = torch.empty_like(q[..., :1])  # the attention that each token pays to itself
        for rows, seen, p in self._rows(q, k):
            own[..., rows, :] = p.diagonal(rows.start, -2, -1).unsqueeze(-1)
            mean = (da[..., rows, :] * self.value[..., rows, :]).sum(-1, keepdim=True)
            ds = (da[..., rows, :] @ v[..., seen, :].mT).sub_(mean).mul_(p)
            out[..., rows, :] = ds @ k[..., seen, :]
        yield 2, own * da
        yield 0, out
        yield 1, own * (da * (v - self.value)).sum(-1, keepdim=True) * q

    def _rows(self, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield the attention matrix in slices: the rows, the columns that they see, and those."""
        T = q.shape[-2]
        height = max(_LEAST, _DENSE**2 // T)
        for i in range(0, T, height):
            j = min(i + height, T)
            rows, seen = slice(i, j), slice(0, j)
            future = torch.ones(j - i, j, dtype=torch.bool, device=q.device).triu_(i + 1)
            scores = q[..., rows, :] @ k[..., seen, :].mT
            yield rows, seen, scores.masked_fill_(future, -math.inf).softmax(-1)

    def jvp(self, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        q, k, v = (t.detach() for t in self._parts)
        out = torch.empty_like(dv)
        for rows, seen, p in self._rows(q, k):
            own, moved = q[..., rows, :], dq[..., rows, :]
            weighted = (moved @ k[..., seen, :].mT).add_(own @ dk[..., seen, :].mT).mul_(p)
            total = weighted.sum(-1, keepdim=True)
            mixed = weighted @ v[..., seen, :] + p @ dv[..., seen, :]
            out[..., rows, :] = mixed.addcmul_(total, self.value[..., rows, :], value=-1)
        return out


class LinearisedNorm:
    """Layer norm over the last axis, linearised at `x`, `(..., C)`."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
        self._x, self.sources = x, (weight, bias)
        self._weight, self._bias, self._eps = weight.detach(), bias.detach(), eps
        self._fresh: Tensor | None
        self._fresh, self._mean, self._rstd = self._forward()

    @property
    def value(self) -> Tensor:
        """The output at `x`, `(..., C)`; not kept once it was read, for it is cheap to make."""
        fresh, self._fresh = self._fresh, None
        return self._forward()[0] if fresh is None else fresh

    def _forward(self) -> tuple[Tensor, Tensor, Tensor]:
        weights = self._weight, self._bias
        out: tuple[Tensor, Tensor, Tensor] = torch.native_layer_norm(
            self._x, self._weight.shape, *weights, self._eps
        )
        return out

    def jvp(self, dx: Tensor) -> Tensor:
        return self._backward(dx, None)[0] * self._weight  # the projection is symmetric

    def vjp(self, a: Tensor) -> Tensor:
        return self._backward(a, self._weight)[0]

    def pull(self, a: Tensor) -> tuple[Tensor, Gradients]:
        dx, *gradients = self._backward(a, self._weight, *(s.requires_grad for s in self.sources))
        return dx, tuple(gradients)

    def _backward(
        self, v: Tensor, weight: Tensor | None, *learn: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return `rstd (u − mean(u) − x̂ mean(x̂ u))` with `u = weight v`, by torch's own kernel."""
        bias = None if weight is None else self._bias
        saved = self._weight.shape, self._mean, self._rstd, weight, bias
        wanted = [True, *(learn or (False, False))]
        out: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
            v.contiguous(), self._x, *saved, wanted
        )
        return out


class LinearisedRMSNorm:
    """`x ↦ root weight ⊙ x / rms(x)` over the last axis, linearised at `x`, `(..., C)`."""

    def __init__(self, x: Tensor, weight: Tensor, eps: float, root: float = 1.0) -> None:
        self._root, self.sources = root, (weight,)
        self._weight = root * weight.detach()
        self._rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        self._unit = x * self._rstd
        self.value = self._unit * self._weight

    def jvp(self, dx: Tensor) -> Tensor:
        return self._project(dx) * self._weight

    def vjp(self, a: Tensor) -> Tensor:
        return self._project(a * self._weight)

    def pull(self, a: Tensor) -> tuple[Tensor, Gradients]:
        learns = self.sources[0].requires_grad
        weight = self._root * summed(a * self._unit) if learns else None
        return self.vjp(a), (weight,)

    def _project(self, v: Tensor) -> Tensor:
        """Return `rstd (v − x̂ mean(x̂ v))`, which is symmetric in `v`."""
        along = (self._unit * v).mean(-1, keepdim=True)
        return self._rstd * (v - self._unit * along)


def linearise_rms_norm(norm: nn.RMSNorm, x: Tensor, root: float = 1.0) -> LinearisedRMSNorm:
    """Return `root` times an RMS norm over the last axis, linearised at `x`."""
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    return LinearisedRMSNorm(x, norm.weight, eps, root)


def linearise_norm(
    norm: nn.LayerNorm | nn.RMSNorm, x: Tensor
) -> LinearisedNorm | LinearisedRMSNorm:
    """Return a norm over the last axis, linearised at `x`, `(..., C)`."""
    if isinstance(norm, nn.RMSNorm):
        return linearise_rms_norm(norm, x)
    return LinearisedNorm(x, norm.weight, norm.bias, norm.eps)


class LinearisedFeedForward:
    """`x ↦ down(gelu(up(x)))`, linearised at `x`, `(..., C)`.

    The activation's slope is computed once a product asks for it: who only evaluates does not.

    **Arguments:** `read`, which returns `x`, as for `LinearisedAttention`; `up`; `down`.
    """

    def __init__(self, read: Read, up: nn.Linear, down: nn.Linear) -> None:
        self._read, self.sources = read, (up.weight, up.bias, down.weight, down.bias)
        self._up, self._down = up.weight.detach(), down.weight.detach()
        self._h = nnf.linear(read(), self._up, up.bias.detach())
        self._slope: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The output at `x`, `(..., C)`."""
        return nnf.linear(nnf.gelu(self._h), self._down, self.sources[3].detach())

    def jvp(self, dx: Tensor) -> Tensor:
        return nnf.linear(self._bend(nnf.linear(dx, self._up)), self._down)

    def vjp(self, a: Tensor) -> Tensor:
        return self._bend(a @ self._down) @ self._up

    def pull(self, a: Tensor) -> tuple[Tensor, Gradients]:
        up, up_bias, down, down_bias = self.sources
        to_down = product(down, a, lambda: nnf.gelu(self._h))
        dh = a @ self._down
        if self._slope is None:
            dh = torch.ops.aten.gelu_backward(dh, self._h)
        else:
            dh.mul_(self._slope)
        return dh @ self._up, (
            product(up, dh, self._read),
            summed(dh) if up_bias.requires_grad else None,
            to_down,
            summed(a) if down_bias.requires_grad else None,
        )

    def _bend(self, dh: Tensor) -> Tensor:
        """Return, in place, the derivative of the activation, `Φ(h) + h φ(h)`, times `dh`."""
        if self._slope is None:
            self._slope = torch.ops.aten.gelu_backward(torch.ones_like(self._h), self._h)
        return dh.mul_(self._slope)


def product(weight: Tensor, cotangent: Tensor, read: Read) -> Tensor | None:
    """Return the gradient `gᵀx` of a weight, `(out, in)`, of the map `x ↦ x Wᵀ`, if it learns."""
    if not weight.requires_grad:
        return None
    return cotangent.flatten(0, -2).mT @ read().flatten(0, -2)


def summed(x: Tensor) -> Tensor:
    """Return the sum over all axes but the last, `(..., C) → (C,)`."""
    return x.flatten(0, -2).sum(0)

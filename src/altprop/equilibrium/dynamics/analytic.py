"""A transformer's parts continued to complex numbers: what `HolomorphicEP` relaxes.

torch defines none of them for complex input. Each equals the real function on real input and is
analytic nearby: no conjugate and no modulus enters, so a softmax may have a vanishing denominator
and a layer norm a vanishing variance; these poles and branch points bound a nudge's radius.

Shapes: `B` samples, `T` tokens, `C` channels, `H` heads, `D = C/H`; weights are real.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from altprop.errors import RuleError


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x Wᵀ + b` for a complex `x`, `(..., in) → (..., out)`."""
    y = x @ weight.to(x.dtype).T
    return y if bias is None else y + bias


def softmax(scores: Tensor) -> Tensor:
    """Return `exp(s) / Σ exp(s)` over the last axis, for complex `s` with finite parts."""
    if not scores.numel():  # which has no largest
        return scores
    size = (scores - scores.real.amax(-1, keepdim=True)).exp()
    return size / size.sum(-1, keepdim=True)


def causal_attention(
    z: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    heads: int,
    norms: tuple[nn.RMSNorm, nn.RMSNorm] | None = None,
) -> Tensor:
    """Return multi-head causal softmax attention at a complex state, `(B, T, C) → (B, T, C)`.

    **Arguments:** `norms`, of queries and of keys per head, `(..., D)`.
    """
    B, T, C = z.shape
    q, k, v = (linear(z, w).view(B, T, heads, C // heads).transpose(1, 2) for w in (w_q, w_k, w_v))
    if norms is not None:
        q, k = apply_norm(norms[0], q), apply_norm(norms[1], k)
    scores = q @ k.transpose(-1, -2) * (C // heads) ** -0.5  # bilinear: no conjugate
    future = torch.ones(T, T, dtype=torch.bool, device=z.device).triu_(1)
    # a complex −∞ makes exp return NaN, so the future is cut by a real number that exp sends to 0
    mixed = softmax(scores.masked_fill(future, -1e30)) @ v
    return linear(mixed.transpose(1, 2).reshape(B, T, C), w_o)


def feed_forward(x: Tensor, up: nn.Linear, down: nn.Linear) -> Tensor:
    """Return `down(gelu(up(x)))` at a complex `x`, `(..., C)`."""
    return linear(gelu(linear(x, up.weight, up.bias)), down.weight, down.bias)


def apply_norm(module: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    """Return what a norm over its last axes gives at a complex `x`.

    **Raises:** `RuleError` for any other module.
    """
    if not isinstance(module, nn.LayerNorm | nn.RMSNorm):
        raise RuleError(
            f"{type(module).__name__} stands in the place of a norm, and only LayerNorm and "
            "RMSNorm have an analytic form here: write estimator=AEP()"
        )
    axes = tuple(range(-len(module.normalized_shape), 0))
    if isinstance(module, nn.RMSNorm):
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        return _normed(x, module.weight, None, eps, axes)
    return layer_norm(x, module.weight, module.bias, module.eps, axes)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    axes: tuple[int, ...] = (-1,),
) -> Tensor:
    """Return the layer norm over some axes of a complex `x`, with variance `mean((x − x̄)²)`."""
    return _normed(x - x.mean(axes, keepdim=True), weight, bias, eps, axes)


def _normed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, axes: tuple[int, ...]
) -> Tensor:
    y = x / (x.square().mean(axes, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def gelu(x: Tensor) -> Tensor:
    """Return `x Φ(x)`, the exact (not the tanh) form, at a complex `x`."""
    z = x / math.sqrt(2)
    left = z.real < 0
    # on the left 1 + erf cancels, and its complement by the other sign does not
    tail = erfc_right(torch.where(left, -z, z)) / 2
    return x * torch.where(left, tail, 1 - tail)


def erf(z: Tensor) -> Tensor:
    """Return the error function of a complex tensor, to about 1e-15 of its size in double."""
    sign = torch.where(z.real < 0, -1.0, 1.0).to(z.real.dtype)  # it is odd
    x, y = sign * z.real, sign * z.imag
    real, imag = _off_the_axis(x, y)
    return torch.complex(sign * (torch.erf(x) + real), sign * imag)


def erfc_right(z: Tensor) -> Tensor:
    """Return `1 − erf(z)` for `Re z ≥ 0`, accurate also where it is tiny."""
    real, imag = _off_the_axis(z.real, z.imag)
    return torch.complex(torch.erfc(z.real) - real, -imag)


def _off_the_axis(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the real and imaginary parts of `erf(x + iy) − erf(x)` for `x ≥ 0`.

    The series of Salzer (Abramowitz and Stegun, 7.1.29), which the trapezoidal rule with step 1/2
    gives: its terms fall like `exp(−n²/4 + n|y|)`, so the more are summed the larger `y` is, and
    the result overflows where `exp(y² − x²)` does.
    """
    xy = x * y
    envelope = torch.exp(-x * x)
    # sin(xy)/x and its like stay finite at x = 0 by way of sinc(t) = sin(πt)/(πt)
    real = envelope * y * torch.sin(xy) * torch.sinc(xy / math.pi) / math.pi
    imag = envelope * y * torch.sinc(2 * xy / math.pi) / math.pi
    cos, sin = torch.cos(2 * xy), torch.sin(2 * xy)
    # (a sample that is lost must not take terms away from its batch-mates)
    finite = y.detach().abs().nan_to_num(nan=0.0)
    largest = float(finite.max()) if y.numel() else 0.0
    terms = 13 + math.ceil(2 * min(largest, 30.0))
    for n in range(1, terms + 1):
        # exp(−n²/4 − x²) times cosh(ny) and sinh(ny): exponents joined before they can overflow
        # apart, and expm1, for the difference of two exponentials cancels at a small y
        up = torch.exp(n * y.abs() - n * n / 4 - x * x) / 2
        decay = torch.expm1(-2 * n * y.abs())
        cosh, sinh = up * (2 + decay), -up * decay * y.sign()
        weight = 2 / math.pi / (n * n + 4 * x * x)
        flat = math.exp(-n * n / 4) * envelope
        real = real + weight * (2 * x * (flat - cosh * cos) + n * sinh * sin)
        imag = imag + weight * (2 * x * cosh * sin + n * sinh * cos)
    return real, imag

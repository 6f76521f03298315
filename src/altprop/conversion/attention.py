"""Forwards for torch's own transformer modules, whose native ones would pass rules by.

`nn.MultiheadAttention` reads its projections' weights without calling them, and the evaluation
fast path of `nn.TransformerEncoderLayer` calls nothing at all.
What is accepted, refused and returned is torch's; where no gradient passes, so is the forward.
Shapes: (L, N, E) target, (S, N, E) source, (L, N, E) swapped to (N, L, E) if `batch_first`;
`H` heads of `D` features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altprop.conversion.roles import Role
from altprop.conversion.sites import refuse_unrecorded
from altprop.transforms import wants_gradient

_torch: Any = F  # its stubs leave out what nn.MultiheadAttention calls


def why_not(module: nn.MultiheadAttention) -> str:
    """Return what keeps an attention module from being converted, or nothing."""
    if module.bias_k is not None or module.bias_v is not None:
        return "add_bias_kv=True is not supported"
    if module.add_zero_attn:
        return "add_zero_attn=True is not supported"
    return ""


def swaps(around: Iterable[nn.Module]) -> bool:
    """Say whether maps within these modules see (L, N, E) where the caller has (N, L, E)."""
    return any(isinstance(m, nn.MultiheadAttention) and m.batch_first for m in around)


class AttentionRole(Role):
    """An `nn.MultiheadAttention` that calls its projections, each as a map of its own.

    They see what torch's would, (L, N, E), so that the outputs are equal to the bit; `MapTap` gives
    the taps the caller's layout, which is the error's.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        m = cast(nn.MultiheadAttention, self)
        inputs = (query, key, value)
        given = [t for t in (*inputs, attn_mask, key_padding_mask) if t is not None]
        known = all(isinstance(t, Tensor) and not t.is_nested for t in given)
        if not known or not _records(m, given):
            refuse_unrecorded(m)
            return super().forward(  # type: ignore[misc]
                *inputs,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        # from here on what F.multi_head_attention_forward does, its checks by its own helpers
        H, D = m.num_heads, m.head_dim
        padding = F._canonical_mask(
            key_padding_mask,
            "key_padding_mask",
            F._none_or_dtype(attn_mask),
            "attn_mask",
            query.dtype,
        )
        mask = F._canonical_mask(attn_mask, "attn_mask", None, "", query.dtype, False)
        batched = _torch._mha_shape_check(query, key, value, padding, mask, H)
        if is_causal and mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        self._check_features(query, key, value)
        same = query is key and key is value
        if not batched:
            query, key, value = (t.unsqueeze(1) for t in inputs)
            padding = None if padding is None else padding.unsqueeze(0)
        elif m.batch_first:
            query, key, value = (t.transpose(0, 1) for t in inputs)
        (L, N), S = query.shape[:2], key.shape[0]
        q, k, v = self._project(query, key, value, same)
        q, k, v = (t.reshape(len(t), N * H, D).transpose(0, 1) for t in (q, k, v))
        if is_causal and padding is None and not need_weights:
            mask = None
        else:
            is_causal = False
            mask = _merged(mask, padding, (N, H, L, S))
        dropout = m.dropout if m.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            q, k = q * math.sqrt(1.0 / float(D)), k.transpose(-2, -1)
            scores = q.bmm(k) if mask is None else torch.baddbmm(mask, q, k)
            weights = F.softmax(scores, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            mixed = weights.bmm(v)
            weights = weights.view(N, H, L, S)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            if mask is not None:
                mask = mask.unsqueeze(0) if len(mask) == 1 else mask.view(N, H, -1, S)
            q, k, v = (t.view(N, H, t.shape[1], D) for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal).flatten(0, 1)
        out: Tensor = m.out_proj(mixed.transpose(0, 1).reshape(L, N, H * D))
        if not batched:
            return out.squeeze(1), weights
        return out.transpose(0, 1) if m.batch_first else out, weights

    def _check_features(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        m = cast(nn.MultiheadAttention, self)
        wanted = m.embed_dim
        if query.shape[-1] != wanted:
            raise AssertionError(
                f"was expecting embedding dimension of {wanted}, but got {query.shape[-1]}"
            )
        if m.in_proj_weight is not None:
            if key.shape != value.shape:
                raise AssertionError(
                    f"key shape {key.shape} does not match value shape {value.shape}"
                )
            return
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key's sequence and batch dims {key.shape[:-1]} do not match value's "
                f"{value.shape[:-1]}"
            )
        for name, t, weight in (
            ("key", key, m.k_proj_weight),
            ("value", value, m.v_proj_weight),
        ):
            if weight.shape[1] != t.shape[-1]:
                raise AssertionError(
                    f"expecting {name} weights shape of {(wanted, t.shape[-1])}, but got "
                    f"{weight.shape}"
                )

    def _project(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> list[Tensor]:
        m = cast(nn.MultiheadAttention, self)
        E, b = m.embed_dim, m.in_proj_bias
        if m.in_proj_weight is None:
            weights = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
            biases = (None, None, None) if b is None else b.chunk(3)
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            return [
                self._map(*part)
                for part in zip(names, (query, key, value), weights, biases, strict=True)
            ]
        name, W = "in_proj_weight", m.in_proj_weight
        if same:
            return list(self._map(name, query, W, b).chunk(3, dim=-1))
        parts = [slice(i * E, (i + 1) * E) for i in range(3)]
        return [
            self._map(name, x, W, None if b is None else b[rows], rows)
            for x, rows in zip((query, key, value), parts, strict=True)
        ]

    def _map(
        self, name: str, x: Tensor, W: Tensor, b: Tensor | None, rows: slice | None = None
    ) -> Tensor:
        site = self._altprop.sites.get(name)
        if site is None:
            return F.linear(x, W if rows is None else W[rows], b)
        return cast(Tensor, site(self, x, W, b, rows))


def _records(module: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Say whether autograd records what a module makes of `inputs`."""
    return torch.is_grad_enabled() and any(map(wants_gradient, (*inputs, *module.parameters())))


def _merged(
    mask: Tensor | None, padding: Tensor | None, shape: tuple[int, int, int, int]
) -> Tensor | None:
    """Return one additive mask, (1 or N * H, L or 1, S), or none; refuse other shapes."""
    N, H, L, S = shape
    if mask is not None:
        wanted = (L, S) if mask.dim() == 2 else (N * H, L, S)
        if mask.shape != wanted:
            raise RuntimeError(
                f"The shape of the {mask.dim()}D attn_mask is {mask.shape}, but should be {wanted}."
            )
        mask = mask.unsqueeze(0) if mask.dim() == 2 else mask
    if padding is None:
        return mask
    _torch._check_key_padding_mask(padding, S, N)
    padding = padding.view(N, 1, 1, S).expand(-1, H, -1, -1).reshape(N * H, 1, S)
    return padding if mask is None else mask + padding


class EncoderLayerRole(Role):
    """An `nn.TransformerEncoderLayer`, whose evaluation fast path calls none of its parts."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        refuse_unrecorded(cast(nn.Module, self))
        return super().forward(*args, **kwargs)  # type: ignore[misc]

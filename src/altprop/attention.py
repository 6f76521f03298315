"""Forwards for torch's own transformer modules, whose native ones would pass rules by.

`nn.MultiheadAttention` reads its projections' weights without calling them, and the evaluation
fast path of `nn.TransformerEncoderLayer` calls nothing at all.
Shapes: (L, N, E) target, (S, N, E) source, `H` heads; batch and sequence swapped if `batch_first`.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altprop.sites import Role


def why_not(module: nn.MultiheadAttention) -> str:
    """Return what keeps an attention module from being converted, or nothing."""
    if module.bias_k is not None or module.bias_v is not None:
        return "add_bias_kv=True is not supported"
    if module.add_zero_attn:
        return "add_zero_attn=True is not supported"
    return ""


class AttentionRole(Role):
    """An `nn.MultiheadAttention` that calls its projections, each as a map of its own."""

    _altprop_maps: dict[str, Any]

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
        same = query is key and key is value
        batched, H, D = query.dim() == 3, m.num_heads, m.head_dim
        if not batched:
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        elif m.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        (L, N), S = query.shape[:2], key.shape[0]
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, and attn_mask was not given")
        q, k, v = self._project(query, key, value, same)
        q, k, v = (t.reshape(len(t), N, H, D).permute(1, 2, 0, 3) for t in (q, k, v))
        dropout = m.dropout if m.training else 0.0
        weights: Tensor | None = None
        if is_causal and key_padding_mask is None and not need_weights:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            mask = self._mask(attn_mask, key_padding_mask, q.dtype, (N, H, L, S))
            if need_weights:
                scores = (q * math.sqrt(1 / D)) @ k.transpose(-2, -1)
                weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
                weights = F.dropout(weights, dropout) if dropout else weights
                mixed = weights @ v
                weights = weights.mean(1) if average_attn_weights else weights
                weights = weights if batched else weights.squeeze(0)
            else:
                mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out: Tensor = m.out_proj(mixed.permute(2, 0, 1, 3).reshape(L, N, H * D))
        if not batched:
            out = out.squeeze(1)
        elif m.batch_first:
            out = out.transpose(0, 1)
        return out, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> list[Tensor]:
        m = cast(nn.MultiheadAttention, self)
        E, b = m.embed_dim, m.in_proj_bias
        if m.in_proj_weight is None:
            weights = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
            biases = (None, None, None) if b is None else b.chunk(3)
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            return [
                self._altprop_maps[name](m, x, W, bias)
                for name, x, W, bias in zip(
                    names, (query, key, value), weights, biases, strict=True
                )
            ]
        packed = self._altprop_maps["in_proj_weight"]
        if same:
            return list(packed(m, query, m.in_proj_weight, b).chunk(3, dim=-1))
        parts = [slice(i * E, (i + 1) * E) for i in range(3)]
        return [
            packed(m, x, m.in_proj_weight[rows], None if b is None else b[rows], rows)
            for x, rows in zip((query, key, value), parts, strict=True)
        ]

    def _mask(
        self,
        attn_mask: Tensor | None,
        padding: Tensor | None,
        dtype: torch.dtype,
        shape: tuple[int, int, int, int],
    ) -> Tensor | None:
        """Return one additive mask, broadcastable to (N, H, L, S), or none."""
        N, H, L, S = shape
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.view(N, H, L, S))
        if padding is not None:
            masks.append(padding.view(N, 1, 1, S))
        added = [
            torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
            if mask.dtype == torch.bool
            else mask.to(dtype)
            for mask in masks
        ]
        return sum(added[1:], added[0]) if added else None


class EncoderLayerRole(Role):
    """An `nn.TransformerEncoderLayer` that always calls its parts, in evaluation as well."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        m = cast(nn.TransformerEncoderLayer, self)
        rest = (src_mask, src_key_padding_mask)
        if m.norm_first:
            src = src + m._sa_block(m.norm1(src), *rest, is_causal=is_causal)
            return src + m._ff_block(m.norm2(src))
        src = m.norm1(src + m._sa_block(src, *rest, is_causal=is_causal))
        return m.norm2(src + m._ff_block(src))

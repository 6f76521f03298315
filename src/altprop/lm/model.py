"""The language models, in one file that reads in a sitting.

Shapes: `B` windows, `T` tokens, `C` channels, `V` words of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from altprop import (
    AbstractEstimator,
    AbstractSolver,
    ConfigError,
    ConvergenceError,
    DataError,
)
from altprop.lm.blocks import ModelConfig, make_block
from altprop.parts import now


class EquilibriumLM(nn.Module):
    """A causal language model whose transformer block, or blocks, are an equilibrium.

    Token and position embeddings make the input `x`; the block relaxes to `z*`; logits are read
    from the normed equilibrium by a linear head without bias. Embeddings and head start at
    `N(0, 0.02²)`. Dropout acts on `x`, once for the whole relaxation, and on `z*`.

    **Arguments:** `config`, the shape; `solver`, `estimator`, `on_failure`, of the `Equilibrium`
    (`None`: `SOLVER` and `ESTIMATOR` of `altprop.lm.blocks`).
    """

    def __init__(
        self,
        config: ModelConfig,
        solver: AbstractSolver | None = None,
        estimator: AbstractEstimator | None = None,
        on_failure: str = "raise",
    ) -> None:
        super().__init__()
        self.config = config
        C = config.d_model
        self.tokens = nn.Embedding(config.vocabulary, C)
        self.positions = nn.Embedding(config.context, C)
        self.block = make_block(config, solver, estimator, on_failure)
        self.dropout = dropout(config)
        self.norm = nn.LayerNorm(C)
        self.head = nn.Linear(C, config.vocabulary, bias=False)
        for layer in (self.tokens, self.positions, self.head):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the logits, `(B, T, V)`, and the mean cross-entropy if `targets` are given.

        **Arguments:** `ids`, int64 `(B, T)` with `T` at most the context; `targets`, `(B, T)`.
        """
        x = embed(self, ids)
        if targets is None:
            return self._read_out(self.block(x)), None

        def cost(z: Tensor) -> Tensor:
            return cross_entropy(self._read_out(z), targets)

        logits = self._read_out(self.block(x, cost=cost))
        return logits, cross_entropy(logits, targets)

    def extend(
        self, ids: Tensor, cache: tuple[int, Any] | None = None
    ) -> tuple[Tensor, tuple[int, Any]]:
        """Return the logits after new tokens, `(B, V)`, and the cache with these in it.

        Earlier tokens' equilibria do not depend on later ones, so only the new are solved.

        **Arguments:** `ids`, int64 `(B, t)`; `cache`, what the last call returned.
        """
        length, kept = cache or (0, None)
        z, kept = self.block.extend(embed(self, ids, length), kept)
        return self._read_out(z[:, -1]), (length + ids.shape[1], kept)

    def _read_out(self, z: Tensor) -> Tensor:
        return self.head(self.norm(self.dropout(z)))


class GPT(nn.Module):
    """An ordinary causal transformer: the model that feedback rules train, and the control.

    Pre-norm blocks with a separate linear map for query, key, value, output and the feed-forward
    part, so that each can have a feedback of its own; every weight starts at `N(0, 0.02²)`. Dropout
    acts on the embeddings and on what either part of a block adds.

    **Arguments:** `config`, the shape; `checkpointing`, whether the insides of blocks are computed
    again in the backward pass instead of kept.
    """

    def __init__(self, config: ModelConfig, checkpointing: bool = False) -> None:
        super().__init__()
        self.config, self.checkpointing = config, checkpointing
        C = config.d_model
        self.tokens = nn.Embedding(config.vocabulary, C)
        self.positions = nn.Embedding(config.context, C)
        layers = 4 if config.layers is None else config.layers
        self.blocks = nn.ModuleList(Block(C, config.heads, config.dropout) for _ in range(layers))
        self.dropout = dropout(config)
        self.norm = nn.LayerNorm(C)
        self.head = nn.Linear(C, config.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if config.tie_head:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the logits, `(B, T, V)`, and the mean cross-entropy if `targets` are given.

        **Arguments:** `ids`, int64 `(B, T)` with `T` at most the context; `targets`, `(B, T)`.
        """
        h = embed(self, ids)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, use_reentrant=False)
            else:
                h = block(h)
        logits = self.head(self.norm(h))
        return logits, None if targets is None else cross_entropy(logits, targets)

    def extend(
        self, ids: Tensor, cache: tuple[int, Any] | None = None
    ) -> tuple[Tensor, tuple[int, Any]]:
        """Return the logits after new tokens, `(B, V)`, and the keys and values with these in it.

        **Arguments:** `ids`, int64 `(B, t)`; `cache`, what the last call returned.
        """
        length, kept = cache or (0, [None] * len(self.blocks))
        h, grown = embed(self, ids, length), []
        for block, pair in zip(self.blocks, kept, strict=True):
            h, pair = cast(Block, block).extend(h, pair)
            grown.append(pair)
        return self.head(self.norm(h[:, -1])), (length + ids.shape[1], grown)


class Block(nn.Module):
    """One pre-norm transformer block, `(B, T, C) → (B, T, C)`."""

    sublayer_outputs = ("attn", "mlp")  # where the residual stream is a module's output

    def __init__(self, d_model: int, heads: int, p: float = 0.0) -> None:
        super().__init__()
        self.attn = Attention(d_model, heads, p)
        self.mlp = FeedForward(d_model, p)

    def forward(self, h: Tensor) -> Tensor:
        return self.mlp(self.attn(h))

    def extend(
        self, h: Tensor, cache: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Do as `forward` for new tokens, `(B, t, C)`, beside the attention's cache."""
        h, cache = self.attn.extend(h, cache)
        return self.mlp(h), cache


class Attention(nn.Module):
    """`h + o_proj(attention(LN h))`, causal, without bias."""

    def __init__(self, d_model: int, heads: int, p: float = 0.0) -> None:
        super().__init__()
        self.heads, self.p = heads, p
        self.norm = nn.LayerNorm(d_model)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(4)
        )

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self._project(h)
        mixed = nnf.scaled_dot_product_attention(q, k, v, is_causal=True)
        return h + self._drop(self.o_proj(mixed.transpose(1, 2).reshape(h.shape)))

    def _drop(self, y: Tensor) -> Tensor:
        return drop(y, self.p) if self.p and self.training else y

    def extend(
        self, h: Tensor, cache: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Do as `forward` for new tokens, `(B, t, C)`, that follow those of the cache.

        The cache holds the keys and values of all tokens so far, each `(B, H, T, D)`.
        """
        q, k, v = self._project(h)
        if cache is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(cache, (k, v), strict=True))
        t, T = h.shape[1], k.shape[2]
        seen = torch.ones(t, T, dtype=torch.bool, device=h.device).tril(T - t)
        mixed = nnf.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return h + self.o_proj(mixed.transpose(1, 2).reshape(h.shape)), (k, v)

    def _project(self, h: Tensor) -> Iterator[Tensor]:
        B, T, C = h.shape
        x = self.norm(h)
        return (
            project(x).view(B, T, self.heads, C // self.heads).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )


class FeedForward(nn.Module):
    """`h + down_proj(gelu(up_proj(LN h)))`, four times as wide inside."""

    def __init__(self, d_model: int, p: float = 0.0) -> None:
        super().__init__()
        self.p = p
        self.norm = nn.LayerNorm(d_model)
        self.up_proj = nn.Linear(d_model, 4 * d_model)
        self.down_proj = nn.Linear(4 * d_model, d_model)
        nn.init.zeros_(self.up_proj.bias)
        nn.init.zeros_(self.down_proj.bias)

    def forward(self, h: Tensor) -> Tensor:
        y = self.down_proj(nnf.gelu(self.up_proj(self.norm(h))))
        return h + (drop(y, self.p) if self.p and self.training else y)


LanguageModel = EquilibriumLM | GPT


def embed(model: LanguageModel, ids: Tensor, start: int = 0) -> Tensor:
    """Return the token and position embeddings of `ids`, `(B, T) → (B, T, C)`.

    **Arguments:** `start`, the position of the first.

    **Raises:** `DataError` for more tokens than the model's context.
    """
    end = start + ids.shape[1]
    if end > model.config.context:
        raise DataError(f"{end} tokens do not fit into a context of {model.config.context}")
    x: Tensor = model.dropout(model.tokens(ids) + model.positions.weight[start:end])
    return x


class Dropout(nn.Module):
    """Drop a share `p` of what passes while training; of a part of a batch, as in the whole."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training else x


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="which part of a batch runs is no part of the graph"
)
def drop(x: Tensor, p: float) -> Tensor:
    """Return `x`, `(B, ...)`, with a share `p` of it dropped, drawn for the joint batch."""
    part = now()
    if part is None:
        return nnf.dropout(x, p)
    return x * nnf.dropout(x.new_ones(part.total, *x.shape[1:]), p)[part.rows]


def dropout(config: ModelConfig) -> nn.Module:
    """Return the dropout of a model's embeddings; without any it draws nothing."""
    return Dropout(config.dropout) if config.dropout else nn.Identity()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats, of `(B, T, V)` and `(B, T)`, in float32 or more."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nnf.cross_entropy(exact.flatten(0, 1), targets.flatten())


def generate(
    model: LanguageModel,
    ids: Tensor,
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue `ids`, `(B, T)`, by `count` sampled tokens; return `(B, T + count)`.

    Arguments and errors are those of `stream`, which gives out the tokens one by one.
    """
    tokens = stream(model, ids, count, temperature=temperature, top_k=top_k, generator=generator)
    return torch.cat([ids, *tokens], dim=1)


def stream(
    model: LanguageModel,
    ids: Tensor,
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue `ids`, `(B, T)`, by `count` sampled tokens, and yield each, `(B, 1)`, as it comes.

    Each token is read from the last context of tokens, by the same definition of the model as in
    training. While the context is not full, the model reads the new token beside a cache of the
    earlier ones, which is exact. Past it the window slides, which with learned absolute positions
    changes every state, so the window is read anew for each token.

    **Arguments:** `temperature` divides the logits, and 0 takes the likeliest token; `top_k` keeps
    only the likeliest so many; `generator` (on the CPU) makes the draws repeatable.

    **Raises:** `DataError` without a token to continue; `ConvergenceError` for logits that are not
    finite.
    """
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature is {temperature}, expected a number ≥ 0")
    if count < 0:
        raise ConfigError(f"{count} tokens were asked for, expected a number ≥ 0")
    if ids.shape[1] < 1:
        raise DataError("the prompt is empty: give at least one character to continue")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k is {top_k}, expected at least 1, or none for all tokens")
    pick = partial(_pick, temperature=temperature, top_k=top_k, generator=generator)
    return _stream(model, ids, count, pick)


@torch.no_grad()
def _stream(
    model: LanguageModel, ids: Tensor, count: int, pick: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    context = model.config.context
    cache, unread = None, ids
    for _ in range(count):
        if ids.shape[1] <= context:
            logits, cache = model.extend(unread, cache)
        else:
            logits = model(ids[:, -context:])[0][:, -1]
        unread = pick(logits)
        ids = torch.cat([ids, unread], dim=1)
        yield unread


def _pick(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Return the next token of each window, `(B, V) → (B, 1)`."""
    if not bool(torch.isfinite(logits).all()):
        raise ConvergenceError(
            "the model's logits are not finite: it lost its fixed point in training, so train "
            "it with a lower lr or with a stabiliser"
        )
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # from the likeliest down, in float64: a small temperature must not overflow
    below = (logits - logits.amax(-1, keepdim=True)).cpu().double()
    chances = (below / temperature).softmax(-1).float()
    return torch.multinomial(chances, 1, generator=generator).to(logits.device)

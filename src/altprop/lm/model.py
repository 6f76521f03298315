"""The language models, in one file that reads in a sitting.

Shapes: `B` windows, `T` tokens, `C` channels, `V` words of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from altprop import (
    AEP,
    AbstractDynamics,
    AbstractEstimator,
    AbstractSolver,
    Anderson,
    ConfigError,
    ConvergenceError,
    DampedAttention,
    DataError,
    Equilibrium,
    GatedBlock,
)
from altprop.errors import unknown

BLOCKS: dict[str, Callable[[int, int], AbstractDynamics]] = {
    "gated": GatedBlock,
    "damped": DampedAttention,
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a language model.

    Args:
        vocabulary: the number of tokens `V`.
        context: the longest window `T`.
        d_model: the width `C`.
        heads: attention heads; must divide the width.
        block: of an `EquilibriumLM`, the dynamics: `gated` (a pre-norm transformer block whose
            feedback is gated) or `damped` (damped attention).
        layers: of a `GPT`, the number of blocks.
        tie_head: of a `GPT`, whether the head is the token embedding.
    """

    vocabulary: int
    context: int = 64
    d_model: int = 128
    heads: int = 4
    block: str = "gated"
    layers: int = 4
    tie_head: bool = False

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "d_model", "heads", "layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.d_model % self.heads:
            raise ConfigError(
                f"heads is {self.heads} and d_model is {self.d_model}: heads must divide d_model, "
                "for example heads=4 with d_model=128"
            )
        if self.block not in BLOCKS:
            raise unknown("block", self.block, BLOCKS)


class EquilibriumLM(nn.Module):
    """A causal language model whose transformer block is an equilibrium.

    Token and position embeddings make the input `x`; the block relaxes to `z*`; logits are read
    from the normed equilibrium by a linear head without bias. Embeddings and head start at
    `N(0, 0.02²)`.

    **Arguments:** `config`, the shape; `solver`, `estimator`, `on_failure`, of the `Equilibrium`.
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
        self.block = Equilibrium(
            BLOCKS[config.block](C, config.heads),
            solver or Anderson(),
            estimator or AEP(),
            on_failure,  # type: ignore[arg-type]  # checked by Equilibrium
        )
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

    def _read_out(self, z: Tensor) -> Tensor:
        return self.head(self.norm(z))


class GPT(nn.Module):
    """An ordinary causal transformer: the model that feedback rules train, and the control.

    Pre-norm blocks with a separate linear map for query, key, value, output and the feed-forward
    part, so that each can have a feedback of its own; every weight starts at `N(0, 0.02²)`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        C = config.d_model
        self.tokens = nn.Embedding(config.vocabulary, C)
        self.positions = nn.Embedding(config.context, C)
        self.blocks = nn.ModuleList(Block(C, config.heads) for _ in range(config.layers))
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
            h = block(h)
        logits = self.head(self.norm(h))
        return logits, None if targets is None else cross_entropy(logits, targets)


class Block(nn.Module):
    """One pre-norm transformer block, `(B, T, C) → (B, T, C)`."""

    sublayer_outputs = ("attn", "mlp")  # where the residual stream is a module's output

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(d_model, heads)
        self.mlp = FeedForward(d_model)

    def forward(self, h: Tensor) -> Tensor:
        return self.mlp(self.attn(h))


class Attention(nn.Module):
    """`h + o_proj(attention(LN h))`, causal, without bias."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(d_model)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(4)
        )

    def forward(self, h: Tensor) -> Tensor:
        B, T, C = h.shape
        x = self.norm(h)
        q, k, v = (
            project(x).view(B, T, self.heads, C // self.heads).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nnf.scaled_dot_product_attention(q, k, v, is_causal=True)
        return h + self.o_proj(mixed.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """`h + down_proj(gelu(up_proj(LN h)))`, four times as wide inside."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.up_proj = nn.Linear(d_model, 4 * d_model)
        self.down_proj = nn.Linear(4 * d_model, d_model)
        nn.init.zeros_(self.up_proj.bias)
        nn.init.zeros_(self.down_proj.bias)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down_proj(nnf.gelu(self.up_proj(self.norm(h))))


LanguageModel = EquilibriumLM | GPT


def embed(model: LanguageModel, ids: Tensor) -> Tensor:
    """Return the token and position embeddings of `ids`, `(B, T) → (B, T, C)`.

    **Raises:** `DataError` for more tokens than the model's context.
    """
    T = ids.shape[1]
    if T > model.config.context:
        raise DataError(f"{T} tokens do not fit into a context of {model.config.context}")
    return model.tokens(ids) + model.positions.weight[:T]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats, of `(B, T, V)` against `(B, T)`, in float32."""
    return nnf.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
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

    Each token is read from the last context of tokens, from an equilibrium of the same definition
    as in training.

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
    for _ in range(count):
        logits = model(ids[:, -model.config.context :])[0][:, -1].float()
        if not bool(torch.isfinite(logits).all()):
            raise ConvergenceError(
                "the model's logits are not finite: it lost its fixed point in training, so train "
                "it with a lower lr or with a stabiliser"
            )
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            if top_k is not None and top_k < logits.shape[-1]:
                least = logits.topk(top_k).values[:, -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            chances = (logits / temperature).softmax(-1).cpu()
            new = torch.multinomial(chances, 1, generator=generator).to(ids)
        ids = torch.cat([ids, new], dim=1)
    return ids

"""The language models, in one file that reads in a sitting.

Shapes: `B` windows, `T` tokens, `C` channels, `V` words of the vocabulary.
"""

from __future__ import annotations

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
    """The shape of an `EquilibriumLM`.

    Args:
        vocabulary: the number of tokens `V`.
        context: the longest window `T`.
        d_model: the width `C`.
        heads: attention heads; must divide the width.
        block: the dynamics, `gated` (a pre-norm transformer block whose feedback is gated) or
            `damped` (damped attention).
    """

    vocabulary: int
    context: int = 64
    d_model: int = 128
    heads: int = 4
    block: str = "gated"

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "d_model", "heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
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
        T = ids.shape[1]
        if T > self.config.context:
            raise DataError(f"{T} tokens do not fit into a context of {self.config.context}")
        x = self.tokens(ids) + self.positions.weight[:T]
        if targets is None:
            return self._read_out(self.block(x)), None

        def cost(z: Tensor) -> Tensor:
            return cross_entropy(self._read_out(z), targets)

        logits = self._read_out(self.block(x, cost=cost))
        return logits, cross_entropy(logits, targets)

    def _read_out(self, z: Tensor) -> Tensor:
        return self.head(self.norm(z))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats, of `(B, T, V)` against `(B, T)`, in float32."""
    return nnf.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def generate(
    model: EquilibriumLM,
    ids: Tensor,
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue `ids`, `(B, T)`, by `count` sampled tokens; return `(B, T + count)`.

    Each token is read from the same equilibrium as in training, over the last context of tokens.

    **Arguments:** `temperature` divides the logits, and 0 takes the likeliest token; `top_k` keeps
    only the likeliest so many; `generator` (on the CPU) makes the draws repeatable.
    """
    if temperature < 0:
        raise ConfigError(f"temperature is {temperature}, expected a number ≥ 0")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k is {top_k}, expected at least 1, or none for all tokens")
    for _ in range(count):
        logits = model(ids[:, -model.config.context :])[0][:, -1].float()
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

"""What stands between embedding and head: the shape of a language model, and its equilibria."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from altprop import (
    AEP,
    AbstractDynamics,
    AbstractEstimator,
    AbstractSolver,
    Anderson,
    ConfigError,
    DampedAttention,
    Equilibrium,
    Fallback,
    FixedPoint,
    GatedBlock,
    GatedStack,
    JacobianHinge,
    ThickBlock,
)
from altprop.errors import unknown

BLOCKS: dict[str, Callable[[int, int], AbstractDynamics]] = {
    "gated": GatedBlock,
    "damped": DampedAttention,
    "thick": ThickBlock,
}
STACKING = ("joint", "separate")

# At these the gradient's cosine to the exact one rounds to 0.9999 or more on trained blocks, and
# the loss is that of the exact state to 3e-4. One token that excites itself makes plain iteration
# slow, or diverge, by a single mode: what extrapolation is best at. A state or an adjoint that
# needs more evaluations is given up: the step is refused, and the hinge acts alone.
SOLVER = Fallback((FixedPoint(max_steps=8), Anderson(max_steps=15)), tol=1e-2, max_steps=24)
ESTIMATOR = AEP(tol=6e-2, max_steps=11, solver=Anderson())
# Strict while the rate is high and the feedback is young, and loose enough at last to gain by it.
STABILISER = JacobianHinge(start=0.15, over=3000)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a language model.

    Args:
        vocabulary: the number of tokens `V`.
        context: the longest window `T`.
        d_model: the width `C`.
        heads: attention heads; must divide the width.
        block: of an `EquilibriumLM`, the dynamics: `gated` (a pre-norm transformer block whose
            feedback is gated), `damped` (damped attention), or `thick` (attention and feed-forward
            part side by side; it needs a strong stabiliser).
        layers: the number of blocks (None: 4 of a `GPT`, 1 of an `EquilibriumLM`).
        tie_head: of a `GPT`, whether the head is the token embedding.
        stacking: of an `EquilibriumLM` of several layers, `joint` (one equilibrium, whose feedback
            goes from the last block to the first) or `separate` (an equilibrium each).
        dropout: the share of numbers that are dropped while it trains.
    """

    vocabulary: int
    context: int = 64
    d_model: int = 128
    heads: int = 4
    block: str = "gated"
    layers: int | None = None
    tie_head: bool = False
    stacking: str = "joint"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "d_model", "heads", "layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")
        if self.d_model % self.heads:
            raise ConfigError(
                f"heads is {self.heads} and d_model is {self.d_model}: heads must divide d_model, "
                "for example heads=4 with d_model=128"
            )
        if self.block not in BLOCKS:
            raise unknown("block", self.block, BLOCKS)
        if self.stacking not in STACKING:
            raise unknown("stacking", self.stacking, STACKING)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}, expected in [0, 1)")


class Separate(nn.Module):
    """Equilibria one after the other, each with its own fixed point, `(B, T, C) → (B, T, C)`."""

    def __init__(self, blocks: list[Equilibrium]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, cost: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the last one's state; `cost` is for estimators that nudge with it: none here."""
        for block in self.blocks:
            x = block(x)
        return x

    def extend(self, x: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Return the state of new tokens, `(B, t, C)`, and the caches with them."""
        grown = []
        for block, own in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x, kept = cast(Equilibrium, block).extend(x, own)
            grown.append(kept)
        return x, grown


def make_block(
    config: ModelConfig,
    solver: AbstractSolver | None,
    estimator: AbstractEstimator | None,
    on_failure: Any,
) -> Equilibrium | Separate:
    """Return what an `EquilibriumLM` relaxes.

    **Raises:** `ConfigError` for several layers of a block that has no joint dynamics, for a way of
    stacking one layer, and for an estimator that needs the cost of an equilibrium from which none
    is read.
    """
    layers, size = config.layers or 1, (config.d_model, config.heads)

    def equilibrium(dynamics: AbstractDynamics) -> Equilibrium:
        return Equilibrium(dynamics, solver or SOLVER, estimator or ESTIMATOR, on_failure)

    if layers == 1:
        if config.stacking != "joint":
            raise ConfigError(
                f"stacking is {config.stacking}, but there is one layer: write --layers 2, or more"
            )
        return equilibrium(BLOCKS[config.block](*size))
    if config.stacking == "separate":
        if getattr(estimator, "nudge", None) == "cost":
            raise ConfigError(
                f"{type(estimator).__name__}(nudge='cost') nudges with the cost of its state, "
                "which only the last of several has: write nudge='linear', or stacking joint"
            )
        return Separate([equilibrium(BLOCKS[config.block](*size)) for _ in range(layers)])
    if config.block != "gated":
        raise ConfigError(
            f"block {config.block} has no joint dynamics of {layers} layers: write --block gated, "
            "or --stacking separate"
        )
    return equilibrium(GatedStack(*size, layers))

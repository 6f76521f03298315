"""Block-wise direct feedback: a block's output error is projected to each linear map inside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from altprop.errors import ConfigError
from altprop.feedback import check_init, draw
from altprop.rule import AbstractBroadcast, Scope, Site


@dataclass(frozen=True)
class BlockDirectFeedback(AbstractBroadcast):
    """Form each map's gradient from `e Bᵀ`, `e` being the gradient at its block's output.

    Between blocks, and on to norms and embeddings, the exact cotangent travels. `e` carries the
    loss's own scale: unlike `apply_dfa_block_update`, nothing is divided by the number of tokens.

    **Arguments:** `features`, the width of a block's output where it is not that of its last linear
    map; `init`, `std`, `k`: as in `FeedbackAlignment`.
    """

    features: int | None = None
    init: str = "gaussian"
    std: float = 0.02
    k: int | None = None

    def __post_init__(self) -> None:
        check_init(self.init, self.std, self.k)
        if self.features is not None and self.features < 1:
            raise ConfigError(f"features must be at least 1, not {self.features}")

    @property
    def takes(self) -> frozenset[str]:
        return frozenset({"blocks"})

    @property
    def width(self) -> int | None:
        return self.features

    def plan(self, scope: Scope) -> None:
        for block in scope.blocks():
            scope.tap(scope.maps_in(block), at=block)

    def draw(self, site: Site, generator: torch.Generator) -> Tensor:
        return draw(self.init, site.rows, site.columns, generator, std=self.std, k=self.k)

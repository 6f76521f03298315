"""Feedback alignment: a fixed random matrix stands in for the transposed weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from altprop.feedback import check_init, draw
from altprop.rule import AbstractTransport, Site


@dataclass(frozen=True)
class FeedbackAlignment(AbstractTransport):
    """Send `g B` to a map's input, `B` fixed and random (Lillicrap et al. 2016, eq. 3).

    The forward weights turn towards `B` while they learn. Weak in deep networks: `KolenPollack`
    costs hardly more and aligns.

    **Arguments:** `init`, `"gaussian"`, `"orthogonal"`, `"ortho_he"` or `"sparse"`; `std`, the
    scale (inert for `ortho_he`); `k`, the entries a row of a sparse `B`, `max(1, in // 16)` unless
    given. **Raises:** `ConfigError` for an unknown name or a value out of range.
    """

    init: str = "gaussian"
    std: float = 0.02
    k: int | None = None

    def __post_init__(self) -> None:
        check_init(self.init, self.std, self.k)

    def draw(self, site: Site, generator: torch.Generator) -> Tensor:
        return draw(self.init, site.rows, site.columns, generator, std=self.std, k=self.k)

    def matrix(self, W: Tensor, B: Tensor | None, noise: Tensor | None) -> Tensor:
        assert B is not None
        return B

"""Aligned feedback: forward-only probes of each map tell its feedback which way to turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from altprop.errors import ConfigError
from altprop.feedback import check_init, cosine_gradient, draw, normalised, randn
from altprop.rule import AbstractTransport, Site


@dataclass(frozen=True)
class AlignedFeedback(AbstractTransport):
    """Send `g B`; `B` descends `1 − cos(B, Ĵ)`, `Ĵ = mean((W p) pᵀ)` (local form of GrAPE).

    `Wᵀ` is never applied. Only the direction is learned; the norm of `B` changes slowly, unless
    `normalize` gives each column of the matrix in use the norm that its drawing had on average.

    **Arguments:** `probes`, Gaussian vectors per pass; `normalize`, off by default since sizes
    matter where `B` stands in for `W`; `init`, `std`: as in `FeedbackAlignment`.
    **Raises:** `ConfigError` for a value out of range.
    """

    probes: int = 32
    normalize: bool = False
    init: str = "gaussian"
    std: float = 0.02

    learned: ClassVar[bool] = True
    signal: ClassVar[str] = "learned feedback"

    def __post_init__(self) -> None:
        check_init(self.init, self.std, None)
        if self.probes < 1:
            raise ConfigError(f"probes must be at least 1, not {self.probes}")

    @property
    def noisy(self) -> bool:
        return True

    def draw(self, site: Site, generator: torch.Generator) -> Tensor:
        return draw(self.init, site.rows, site.columns, generator, std=self.std)

    def noise(self, site: Site, generator: torch.Generator) -> Tensor:
        return randn(generator, self.probes, site.columns)

    def matrix(self, W: Tensor, B: Tensor | None, noise: Tensor | None) -> Tensor:
        assert B is not None
        return normalised(B, self.std, 0) if self.normalize else B

    def feedback_gradient(
        self, W: Tensor, B: Tensor, grad_W: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        assert noise is not None
        p = noise.to(W.dtype)
        return cosine_gradient(B, (p @ W.t()).t() @ p / len(p))

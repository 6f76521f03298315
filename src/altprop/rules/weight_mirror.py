"""Weight mirror: each map is fed noise by itself, and its feedback learns the correlation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from altprop.errors import ConfigError
from altprop.feedback import check_init, draw, randn
from altprop.rule import AbstractTransport, Site


@dataclass(frozen=True)
class WeightMirror(AbstractTransport):
    """Send `g B`; `B` follows `mean(y_c p_cᵀ)` of noise `p` through the map (Akrout et al. 2019).

    The gradient of `B` is `decay · B − mean(y_c p_cᵀ)` with the responses `y = W p` and the noise
    both centred, so gradient descent is the paper's mirror phase and rests at `B = W / decay`.
    Each map hears its own noise: one sample sent through the whole stack would not be independent.

    **Arguments:** `probes`, noise vectors per pass, at least 2; `decay`, which bounds the norm;
    `init`, `std`: as in `FeedbackAlignment`. **Raises:** `ConfigError` for a value out of range.
    """

    probes: int = 32
    decay: float = 1.0
    init: str = "gaussian"
    std: float = 0.02

    learned: ClassVar[bool] = True
    signal: ClassVar[str] = "learned feedback"

    def __post_init__(self) -> None:
        check_init(self.init, self.std, None)
        if self.probes < 2:
            raise ConfigError(f"a weight mirror centres its noise: probes={self.probes} is below 2")
        if not (math.isfinite(self.decay) and self.decay >= 0):
            raise ConfigError(f"decay must be a number >= 0, not {self.decay}")

    @property
    def noisy(self) -> bool:
        return True

    def draw(self, site: Site, generator: torch.Generator) -> Tensor:
        return draw(self.init, site.rows, site.columns, generator, std=self.std)

    def noise(self, site: Site, generator: torch.Generator) -> Tensor:
        p = randn(generator, self.probes, site.columns)
        return p - p.mean(0)

    def matrix(self, W: Tensor, B: Tensor | None, noise: Tensor | None) -> Tensor:
        assert B is not None
        return B

    def feedback_gradient(
        self, W: Tensor, B: Tensor, grad_W: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        assert noise is not None
        p = noise.to(W.dtype)
        y = p @ W.t()  # centred, since the noise is and the map is linear
        return torch.addmm(B, y.t(), p, beta=self.decay, alpha=-1 / len(p))

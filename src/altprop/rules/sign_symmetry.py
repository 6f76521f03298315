"""Sign symmetry: the way back knows only the weight's signs, and perhaps a random size for each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from altprop.errors import unknown
from altprop.feedback import randn
from altprop.rule import AbstractTransport, Site

_VARIANTS = ("sign", "usf", "brsf", "frsf")
_SCALES = ("frobenius", "fan_in", "none")


@dataclass(frozen=True)
class SignSymmetry(AbstractTransport):
    """Send `g · (sign(W) ⊙ |R|) · scale` to a map's input (Xiao et al. 2018; Moskovitz 2018).

    **Arguments:** `scale`, what multiplies the signs: `"frobenius"` is `‖W‖_F / √numel(W)`, which
    keeps the weight's norm; `"fan_in"` is `√(2 / in)`; `"none"` is 1. The literature disagrees, so
    it is a choice. `variant`, the sizes `|R|`: `"sign"` and `"usf"` (uniform) are 1, `"brsf"` draws
    `|N(0, 1)|` anew at every pass, `"frsf"` once. **Raises:** `ConfigError` for an unknown name.
    """

    scale: str = "frobenius"
    variant: str = "sign"

    signal: ClassVar[str] = "feedback by the weights' signs"

    def __post_init__(self) -> None:
        if self.scale not in _SCALES:
            raise unknown("scale", self.scale, _SCALES)
        if self.variant not in _VARIANTS:
            raise unknown("variant", self.variant, _VARIANTS)

    @property
    def noisy(self) -> bool:
        return self.variant == "brsf"

    def draw(self, site: Site, generator: torch.Generator) -> Tensor | None:
        if self.variant != "frsf":
            return None
        return randn(generator, site.rows, site.columns).abs()

    def noise(self, site: Site, generator: torch.Generator) -> Tensor:
        return randn(generator, site.rows, site.columns).abs()

    def matrix(self, W: Tensor, B: Tensor | None, noise: Tensor | None) -> Tensor:
        M = W.sign()  # a fresh tensor, so that the rest may work in place
        if self.scale == "frobenius":
            M.mul_(torch.linalg.vector_norm(W).mul_(max(W.numel(), 1) ** -0.5))
        elif self.scale == "fan_in":
            M.mul_(math.sqrt(2 / max(W.shape[1], 1)))
        size = B if noise is None else noise
        return M if size is None else M.mul_(size)

"""Kolen-Pollack: the feedback learns by the weight's own gradient, and so grows equal to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from altprop.feedback import check_init, draw
from altprop.rule import AbstractTransport, Site


@dataclass(frozen=True)
class KolenPollack(AbstractTransport):
    """Send `g B`, and give the parameter `B` exactly the gradient of `W` (Akrout et al. 2019, 3.2).

    With the same optimiser and decoupled weight decay `λ` at rate `η` the difference `W − B`
    shrinks by `1 − ηλ` a step. Without weight decay it stays; Adam's coupled decay contracts it
    only roughly. Call `add_feedback(optimizer, model)` if the optimiser was built before. Where
    `W` is used elsewhere too (one parameter in two maps), `B` gets this map's share of its gradient
    alone, and the difference need not shrink.

    **Arguments:** `init`, `std`, `k`: as in `FeedbackAlignment`.
    """

    init: str = "gaussian"
    std: float = 0.02
    k: int | None = None

    learned: ClassVar[bool] = True
    signal: ClassVar[str] = "learned feedback"

    def __post_init__(self) -> None:
        check_init(self.init, self.std, self.k)

    def draw(self, site: Site, generator: torch.Generator) -> Tensor:
        return draw(self.init, site.rows, site.columns, generator, std=self.std, k=self.k)

    def matrix(self, W: Tensor, B: Tensor | None, noise: Tensor | None) -> Tensor:
        assert B is not None
        return B

    def feedback_gradient(
        self, W: Tensor, B: Tensor, grad_W: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        assert grad_W is not None
        return grad_W.clone()  # two parameters must not share one .grad

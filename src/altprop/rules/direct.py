"""Direct feedback alignment: the error jumps from the output straight to every tap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from altprop.errors import unknown
from altprop.feedback import check_init, check_period, draw
from altprop.rule import AbstractBroadcast, Scope, Site

_CHOICES = {
    "granularity": ("matmul", "sublayer", "block"),
    "error": ("logits", "head_input"),
    "feedback": ("shared", "independent"),
    "pass_through": ("hybrid", "pure"),
}


@dataclass(frozen=True)
class DirectFeedback(AbstractBroadcast):
    """Replace the cotangent of every tap by `e Bᵀ` (Nøkland 2016; Launay et al. 2020, section 3).

    **Arguments:** `granularity`, where the taps are: `"matmul"`, each linear map's own output;
    before the activation, whose derivative does not enter (Nøkland's rule multiplies by it: take
    `"block"` where each block is a map and its activation); `"sublayer"`, after attention and after
    the feed-forward part, the residual path cut there too (Launay's micro); `"block"`, each block's
    output, with ordinary autograd inside (macro).
    `error`: the gradient at the `"logits"`, or at the `"head_input"`, which still transports the
    head's transpose. `feedback`: one matrix `"shared"` by slicing, so that the error is multiplied
    once for all taps of one width, which all hear the same signal, or `"independent"` ones.
    `pass_through`, for `"matmul"` only (inert otherwise): `"hybrid"` maps send the exact `g W` on,
    `"pure"` ones nothing. `features`, the width of a tapped block where it is not that of its last
    linear map. `calibrate_every=n` makes every n-th recorded forward pass one of exact backprop.
    `init`, `std`, `k`: the drawing of `B`, as in `FeedbackAlignment`.
    **Raises:** `ConfigError` for an unknown name or a value out of range.
    """

    granularity: str = "matmul"
    error: str = "logits"
    feedback: str = "shared"
    pass_through: str = "hybrid"
    calibrate_every: int = 0
    features: int | None = None
    init: str = "gaussian"
    std: float = 0.02
    k: int | None = None

    def __post_init__(self) -> None:
        for field, names in _CHOICES.items():
            if getattr(self, field) not in names:
                raise unknown(field, getattr(self, field), names)
        check_init(self.init, self.std, self.k)
        check_period(self.calibrate_every)

    @property
    def takes(self) -> frozenset[str]:
        return frozenset({"maps" if self.granularity == "matmul" else "blocks"})

    @property
    def sends(self) -> bool:
        return self.pass_through == "hybrid"

    @property
    def at_head_input(self) -> bool:
        return self.error == "head_input"

    @property
    def one_feedback(self) -> bool:
        return self.feedback == "shared"

    @property
    def width(self) -> int | None:
        return self.features

    @property
    def period(self) -> int:
        return self.calibrate_every

    def plan(self, scope: Scope) -> None:
        if self.granularity == "matmul":
            scope.tap(scope.maps())
        elif self.granularity == "block":
            scope.tap(scope.blocks())
        else:
            scope.tap([tap for block in scope.blocks() for tap in scope.sublayers(block)])

    def draw(self, site: Site, generator: torch.Generator) -> Tensor:
        return draw(self.init, site.rows, site.columns, generator, std=self.std, k=self.k)

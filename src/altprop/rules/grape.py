"""GrAPE: direct feedback whose matrices follow the true Jacobian, measured forward only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from altprop.errors import ConfigError, unknown
from altprop.feedback import (
    check_init,
    check_period,
    cosine_gradient,
    draw,
    generator_for,
    normalised,
)
from altprop.rule import AbstractBroadcast, Probe, Scope, Site, spread_error

_AXES = {"hidden": 1, "output": 0, "none": 1}


@dataclass(frozen=True)
class GrAPE(AbstractBroadcast):
    """Send `e Bᵀ` to each block; `B` turns towards `Ĵᵀ` by `1 − cos` (Caillon et al., ICLR 2026).

    Before a recorded pass, forward-mode probes with every rule off push a Gaussian tangent `p`
    through a tap; `Ĵ` is the mean of `p (J p)ᵀ` over probes and same-token pairs, taken before the
    cosine. `B` receives the gradient of `Σ (1 − cos)` over its vectors, a sum and not a mean, so
    that the rate need not grow with the width; any optimiser moves it. The probes use the plain
    (math) attention and evaluation mode: no dropout, no running statistics. Under
    `DistributedDataParallel`, and in the passes of one step that are told of each other
    (`altprop.seeing`), `Ĵ` is the joint batch's too, whatever the shares of it.

    A pass costs `probes` forward-mode passes per block. The control `DirectFeedback(
    granularity="block", calibrate_every=…)` belongs beside it: calibration alone gives much.

    **Arguments:** `probes`, per block and measurement; `every`, measure at every n-th pass;
    `normalize`, which vectors of the matrix in use have the norm of a fresh draw: one per
    `"hidden"` unit (the paper's; erases the units' relative importance), one per `"output"`, or
    `"none"`; the cosine is over the same vectors. `calibrate_every`, `error`, `features`, `std`: as
    in `DirectFeedback`. **Raises:** `ConfigError` for an unknown name or a value out of range.
    """

    probes: int = 1
    every: int = 1
    normalize: str = "hidden"
    calibrate_every: int = 0
    error: str = "logits"
    features: int | None = None
    std: float = 0.02

    learned: ClassVar[bool] = True
    signal: ClassVar[str] = "broadcast error"

    def __post_init__(self) -> None:
        check_init("gaussian", self.std, None)
        if self.normalize not in _AXES:
            raise unknown("normalize", self.normalize, _AXES)
        if self.error not in ("logits", "head_input"):
            raise unknown("error", self.error, ("logits", "head_input"))
        if self.probes < 1 or self.every < 1:
            raise ConfigError(
                f"probes={self.probes} and every={self.every} must both be at least 1"
            )
        check_period(self.calibrate_every)

    @property
    def takes(self) -> frozenset[str]:
        return frozenset({"blocks"})

    @property
    def at_head_input(self) -> bool:
        return self.error == "head_input"

    @property
    def width(self) -> int | None:
        return self.features

    @property
    def period(self) -> int:
        return self.calibrate_every

    def plan(self, scope: Scope) -> None:
        scope.tap(scope.blocks())

    def draw(self, site: Site, generator: torch.Generator) -> Tensor:
        return draw("gaussian", site.rows, site.columns, generator, std=self.std)

    def cotangent(self, e: Tensor, B: Tensor, shape: torch.Size) -> Tensor:
        if self.normalize != "none":
            B = normalised(B, self.std, _AXES[self.normalize])
        return super().cotangent(e, B, shape)

    def estimates(self, probe: Probe, seed: int, step: int) -> Sequence[Tensor | None] | None:
        if step % self.every:
            return None
        found: list[Tensor | None] = []
        for tap, site in enumerate(probe.taps):
            generator = generator_for(seed, site.path, "probe", step)
            total: Tensor | None = None
            for _ in range(self.probes):
                p, Jp = probe.push(tap, generator)
                Jp = spread_error(Jp, p.shape).expand(*p.shape[:-1], Jp.shape[-1])
                # over tokens first: never anything of size V x features per token
                pairs = p.flatten(0, -2).t() @ Jp.flatten(0, -2) / p.shape[:-1].numel()
                total = pairs if total is None else total + pairs
            assert total is not None
            found.append(probe.average(total / self.probes))
        return found

    def feedback_gradient(self, B: Tensor, estimate: Tensor) -> Tensor:
        return cosine_gradient(B, estimate.to(B.dtype), dim=_AXES[self.normalize])

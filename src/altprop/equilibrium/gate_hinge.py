"""A stabiliser without any derivative: it reads how the relaxation contracts and turns the gate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from altprop.equilibrium.dynamics.conduct import refuse_shards
from altprop.equilibrium.estimators.problem import Certificate
from altprop.equilibrium.hinge import (
    AbstractStabiliser,
    HingeState,
    accumulate,
    called,
    process_group,
    samples,
    worst_gain,
)
from altprop.equilibrium.solvers.solver import check_counts, check_fields, sample_norm
from altprop.errors import RuleError


@dataclass(frozen=True)
class GateHinge(AbstractStabiliser):
    """Push a gate back where the relaxation contracts too slowly: `w · mean_b max(0, ρ_b − τ)²`.

    `ρ_b = ‖F(z′)‖ / ‖F(z)‖` for `z′ = z + εF(z)` is how much of a sample's residual one more step
    of the relaxation leaves. The rule is local: the gain is taken to be proportional to the gate
    `α`, so that the gradient of `ρ_b` is `ρ_b α / ‖α‖²`, and nothing is differentiated. It sees
    what a circuit sees, two evaluations of the force, and only the mode that this very residual
    lies in; `JacobianHinge` also finds others, and moves every weight.

    **Arguments:** `target`, the margin `τ` (`None`: the dynamics' own `margin`); `every`, act on
    every so many steps, with `every` times the weight; `weight`, `w` for `every=1`.
    """

    target: float | None = None
    every: int = 2
    weight: float = 4.0

    def __post_init__(self) -> None:
        if self.target is not None:
            check_fields("GateHinge", target=self.target)
        check_fields("GateHinge", weight=self.weight)
        check_counts("GateHinge", every=self.every)

    def init(self, generator: torch.Generator) -> HingeState:
        return HingeState(generator)

    @torch.no_grad()
    def apply(
        self,
        model: nn.Module,
        state: HingeState,
        step: int,
        *,
        urgent: bool = False,
    ) -> dict[str, float]:
        if step % self.every and not urgent:
            return {}
        group, gains = process_group(model), []
        for block, _, seen in called(model):
            refuse_shards(block.dynamics, "GateHinge")
            gate = block.dynamics.gate
            if gate is None:
                raise RuleError(
                    f"GateHinge turns a gate, and {type(block.dynamics).__name__} has none: write "
                    "JacobianHinge()"
                )
            target = block.dynamics.margin if self.target is None else self.target
            ratio = _contraction(seen)
            if len(ratio):
                gains.append(float(ratio.max()))
            push = None
            if gate.requires_grad and len(ratio) and math.isfinite(gains[-1]):
                slope = 2 * self.weight * self.every * (ratio - target).clamp_min(0) * ratio
                size = gate.square().sum().clamp_min(1e-12)
                push = float(slope.sum()) / samples(ratio) * gate / size
            accumulate([push], [gate], group)
        return worst_gain(gains)


def _contraction(seen: Certificate) -> Tensor:
    """Return what part of its residual one more step leaves of each sample, `(B,)`."""
    assert seen.system is not None
    z, system = seen.state, seen.system.once()
    with torch.autocast(z.device.type, enabled=False), system.recalled():
        force = system.force(z)
        left = system.force(z + system.step * force)
    # a residual of nothing but rounding tells nothing, and leaves nothing to push
    floor = 100 * torch.finfo(z.dtype).eps * sample_norm(z)
    before, after = sample_norm(force), sample_norm(left)
    return torch.where(before <= floor, torch.zeros_like(after), after / before)

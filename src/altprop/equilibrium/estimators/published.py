"""The contrastive estimators exactly as published, to reproduce the literature's figures.

A fixed number of explicit Euler steps from the free state, a given `β`, the cost's gradient taken
at the nudged state, and (for the asymmetric form) the correction clipped as a whole to the norm of
the force. The clip moves the nudged equilibrium and the fixed time stops short of it, so these are
biased by construction, the more the longer the phase. To train, use `AEP`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from altprop.equilibrium.estimators.estimator import AbstractAdjointEstimator
from altprop.equilibrium.estimators.nudge import Map, Nudge, check_nudge, cost_gradient
from altprop.equilibrium.estimators.problem import Adjoint, Problem
from altprop.equilibrium.levels import level_norms, relative_to_levels
from altprop.equilibrium.solvers.solver import (
    check_counts,
    check_fields,
    conclude,
    per_sample,
    sample_norm,
)

# (displacement from z*, driving force) ↦ what is subtracted from the driving force
Correct = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PublishedEP(AbstractAdjointEstimator):
    """Naive equilibrium propagation as published: two nudged phases of `steps` Euler steps each.

    **Arguments:** `step`, the Euler step `ε`; `steps`, the length `T2` of a nudged phase; `beta`,
    the nudge, in units of the caller's own cost; `nudge`, `"cost"` (`∇C` at the nudged state, as a
    physical system would; call the module with `cost=`) or `"linear"` (the constant cotangent).
    """

    scaled: ClassVar[bool] = False

    step: float = 0.1
    steps: int = 20
    beta: float = 0.02
    nudge: Nudge = "cost"

    def __post_init__(self) -> None:
        _check("PublishedEP", self.step, self.steps, self.beta, self.nudge)

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        gradient, scale = _nudge("PublishedEP", self.nudge, problem, cotangent)
        adjoint = _relax(problem, gradient, None, self.step, self.steps, self.beta)
        return replace(adjoint, value=adjoint.value * per_sample(scale, cotangent))


@dataclass(frozen=True)
class PublishedAEP(AbstractAdjointEstimator):
    """Asymmetric equilibrium propagation as published (Scurria et al., arXiv 2602.03670).

    **Arguments:** `step`, the Euler step `ε`; `steps`, the length `T2` of a nudged phase; `beta`,
    the nudge, in units of the caller's own cost; `nudge`, `"cost"` (`∇C` at the nudged state: call
    the module with `cost=`) or `"linear"` (the constant cotangent); `clip`, whether the
    correction `(J − Jᵀ)(z − z*)` is scaled down, over the whole tensor, to at most the norm of the
    nudged force.
    """

    scaled: ClassVar[bool] = False

    step: float = 0.1
    steps: int = 20
    beta: float = 0.02
    nudge: Nudge = "cost"
    clip: bool = True

    def __post_init__(self) -> None:
        _check("PublishedAEP", self.step, self.steps, self.beta, self.nudge)

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        products = problem.linearise()

        def correct(displacement: Tensor, drive: Tensor) -> Tensor:
            out = products.jvp(displacement) - products.vjp(displacement)
            if self.clip:
                size = out.norm().clamp_min(torch.finfo(out.dtype).tiny)
                out = out * (drive.norm() / size).clamp_max(1.0)
            return out

        gradient, scale = _nudge("PublishedAEP", self.nudge, problem, cotangent)
        adjoint = _relax(problem, gradient, correct, self.step, self.steps, self.beta)
        return replace(
            adjoint,
            value=adjoint.value * per_sample(scale, cotangent),
            evaluations=3 * adjoint.evaluations + 1,  # a force, a JVP and a VJP each, and J itself
        )


def _check(name: str, step: float, steps: int, beta: float, nudge: str) -> None:
    check_fields(name, step=step, beta=beta)
    check_counts(name, steps=steps)
    check_nudge(name, nudge)


def _nudge(name: str, nudge: Nudge, problem: Problem, cotangent: Tensor) -> tuple[Map, Tensor]:
    """Return `z ↦ ∇C(z)` in the caller's units, and the factor of the result, `(B,)`."""
    if nudge == "linear":
        return lambda z: cotangent, torch.ones_like(sample_norm(cotangent))
    return cost_gradient(name, problem, cotangent)


def _relax(
    problem: Problem,
    gradient: Map,
    correct: Correct | None,
    step: float,
    steps: int,
    beta: float,
) -> Adjoint:
    """Return `(z⁻ − z⁺)/2β` after `steps` Euler steps of either phase from the free state."""
    still = problem.state
    ends, drives = [], []
    for sign in (1.0, -1.0):
        z = still
        for _ in range(steps):
            drive = problem.force(z) - sign * beta * gradient(z)
            if correct is not None:
                drive = drive - correct(z - still, drive)
            z = z + step * drive
        ends.append(z)
        drives.append(drive)
    nudge = beta * sample_norm(gradient(still))
    tiny = torch.finfo(still.dtype).tiny
    value = (ends[1] - ends[0]) / (2 * beta)
    shown = torch.stack([level_norms(drive, problem.widths) for drive in drives]).amax(0)
    if not problem.widths:
        shown = shown / nudge.clamp_min(tiny).unsqueeze(1)
    residual = relative_to_levels(shown, beta * value, problem.widths).amax(1)
    moved = torch.maximum(*(sample_norm(z - still) for z in ends))
    return Adjoint(
        value=value,
        residual=residual,
        remainder=(drives[1] - drives[0]) / 2,
        evaluations=2 * steps,
        result=conclude(residual, 0),
        beta=torch.full_like(residual, beta),
        response=moved / sample_norm(still).clamp_min(tiny),
    )

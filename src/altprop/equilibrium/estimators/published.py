"""The contrastive estimators exactly as published, to reproduce the literature's figures.

A fixed number of explicit Euler steps from the free state, a given `β`, the cost's gradient taken
at the nudged state, and (for the asymmetric form) the correction clipped as a whole to the norm of
the force. The clip moves the nudged equilibrium and the fixed time stops short of it, so these are
biased by construction, the more the longer the phase. To train, use `AEP`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from altprop.equilibrium.estimators.estimator import (
    AbstractEstimator,
    Adjoint,
    Problem,
    check_counts,
    check_fields,
)
from altprop.equilibrium.solvers.solver import conclude, sample_norm
from altprop.errors import ConfigError, RuleError

Nudge = Literal["cost", "linear"]
# (displacement from z*, driving force) ↦ what is subtracted from the driving force
Correct = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PublishedEP(AbstractEstimator):
    """Naive equilibrium propagation as published: two nudged phases of `steps` Euler steps each.

    **Arguments:** `step`, the Euler step `ε`; `steps`, the length `T2` of a nudged phase; `beta`,
    the nudge, in units of the caller's own cost; `nudge`, `"cost"` (`∇C` at the nudged state, as a
    physical system would; call the module with `cost=`) or `"linear"` (the constant cotangent).
    """

    step: float = 0.1
    steps: int = 20
    beta: float = 0.02
    nudge: Nudge = "cost"

    def __post_init__(self) -> None:
        _check("PublishedEP", self.step, self.steps, self.beta, self.nudge)

    def pull(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        gradient, scale = _cost_gradient("PublishedEP", self.nudge, problem, cotangent)
        adjoint = _relax(problem, gradient, None, self.step, self.steps, self.beta)
        return replace(adjoint, value=adjoint.value * scale)

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        return self.pull(problem, cotangent)


@dataclass(frozen=True)
class PublishedAEP(AbstractEstimator):
    """Asymmetric equilibrium propagation as published (Scurria et al., arXiv 2602.03670).

    **Arguments:** as `PublishedEP`; `clip`, whether the correction `(J − Jᵀ)(z − z*)` is scaled
    down, over the whole tensor, to at most the norm of the nudged force.
    """

    step: float = 0.1
    steps: int = 20
    beta: float = 0.02
    nudge: Nudge = "cost"
    clip: bool = True

    def __post_init__(self) -> None:
        _check("PublishedAEP", self.step, self.steps, self.beta, self.nudge)

    def pull(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        products = problem.linearise()

        def correct(displacement: Tensor, drive: Tensor) -> Tensor:
            out = products.jvp(displacement) - products.vjp(displacement)
            if self.clip:
                size = out.norm().clamp_min(torch.finfo(out.dtype).tiny)
                out = out * (drive.norm() / size).clamp_max(1.0)
            return out

        gradient, scale = _cost_gradient("PublishedAEP", self.nudge, problem, cotangent)
        adjoint = _relax(problem, gradient, correct, self.step, self.steps, self.beta)
        return replace(
            adjoint,
            value=adjoint.value * scale,
            evaluations=3 * adjoint.evaluations + 1,  # a force, a JVP and a VJP each, and J itself
        )

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        return self.pull(problem, cotangent)


def _check(name: str, step: float, steps: int, beta: float, nudge: str) -> None:
    check_fields(name, step=step, beta=beta)
    check_counts(name, steps=steps)
    if nudge not in ("cost", "linear"):
        raise ConfigError(f"{name}: nudge is {nudge!r}, expected 'cost' or 'linear'")


def _cost_gradient(
    name: str, nudge: str, problem: Problem, cotangent: Tensor
) -> tuple[Callable[[Tensor], Tensor], float]:
    """Return `z ↦ ∇C(z)` and the number by which the loss is a multiple of the cost."""
    if nudge == "linear":
        return lambda z: cotangent, 1.0
    cost = problem.cost
    if cost is None:
        raise RuleError(
            f"{name}(nudge='cost') needs the cost as a function of the state: call the module as "
            "block(x, cost=lambda z: loss_fn(head(z), y)), or write nudge='linear'"
        )

    def gradient(z: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            (out,) = torch.autograd.grad(cost(leaf), leaf)
        return out

    # The loss may be the cost times a number (accumulation, a loss scale): carry that over.
    own = gradient(problem.state)
    size = float(own.norm())
    scale = float((own / size * cotangent).sum()) / size if size > 0 else 0.0
    if float((cotangent - scale * own).norm()) > 0.05 * float(cotangent.norm()):
        raise RuleError(
            "the cost given to the module is not the loss that was differentiated (their "
            "gradients at the free state differ): pass that same loss as cost="
        )
    return gradient, scale


def _relax(
    problem: Problem,
    gradient: Callable[[Tensor], Tensor],
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
    residual = torch.maximum(*map(sample_norm, drives)) / nudge.clamp_min(tiny)
    moved = torch.maximum(*(sample_norm(z - still) for z in ends))
    return Adjoint(
        value=(ends[1] - ends[0]) / (2 * beta),
        residual=residual,
        remainder=(drives[1] - drives[0]) / 2,
        evaluations=2 * steps,
        result=conclude(residual, 0),
        beta=torch.full_like(residual, beta),
        response=moved / sample_norm(still).clamp_min(tiny),
    )

"""Equilibrium propagation on a vector field: contrast nudged equilibria.

Reference: Scellier et al., "Generalization of Equilibrium Propagation to Vector Field Dynamics",
arXiv 1808.04873; centred nudges after Laborieux et al., arXiv 2006.03824.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from altprop.equilibrium.estimators.estimator import AbstractAdjointEstimator, check_own_solver
from altprop.equilibrium.estimators.nudge import Nudge, check_nudge, nudge_at
from altprop.equilibrium.estimators.phases import (
    Phases,
    Sides,
    check_sides,
    contrast,
    response_beta,
)
from altprop.equilibrium.estimators.problem import Adjoint, Problem
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    check_counts,
    check_fields,
    sample_norm,
)


@dataclass(frozen=True)
class EP(AbstractAdjointEstimator):
    """Contrast the equilibria of `F(z) ∓ βg = 0`, which gives `a → −J⁻¹ g` as `β → 0`.

    That is the gradient only where `J` is symmetric; on attention it is biased at any `β`. Use
    `AEP` for a gradient; this is what the field calls naive EP.

    **Arguments:** `beta`, the nudge for a cotangent of unit norm per sample (`None`: chosen so that
    the state moves by `response` relative to its norm); `response`; `tol`, the residual of a
    nudged phase relative to the nudge; `max_steps`, the limit of evaluations per phase; `sides`,
    2 for the centred pair, whose own bias is of order `β²`, 1 for the positive nudge against the
    free state, at half the cost and of order `β`, or 4 for pairs at `±β` and `±β/2`, extrapolated
    to order `β⁴` at up to twice the cost; `nudge`, `"linear"` (the constant cotangent) or `"cost"`
    (`∇C` at the nudged state, as a physical system would: call the module with `cost=`; both agree
    to first order); `solver`, of the phases (`None`: the module's own).
    """

    beta: float | None = None
    response: float = 1e-3
    tol: float = 1e-3
    max_steps: int = 100
    sides: Sides = 2
    nudge: Nudge = "linear"
    solver: AbstractSolver | None = None

    def __post_init__(self) -> None:
        if self.beta is not None:
            check_fields("EP", beta=self.beta)
        check_fields("EP", response=self.response, tol=self.tol)
        check_counts("EP", max_steps=self.max_steps)
        check_sides("EP", self.sides)
        check_nudge("EP", self.nudge)
        check_own_solver("EP", self.solver)

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        nudge = nudge_at("EP", self.nudge, problem, cotangent)
        guess = problem.step * cotangent  # what one step of the linear phase would give
        if self.beta is None:
            beta = response_beta(problem, guess, self.response)
        else:
            beta = torch.full_like(sample_norm(cotangent), self.beta)
        phases = Phases(problem, nudge, beta, self.tol, self.max_steps, self.solver)
        plus = phases.run(1.0, -guess)
        earlier = 0
        for _ in range(3):
            wanted = response_beta(problem, plus.value, self.response)
            ratio = wanted / phases.beta
            if self.beta is not None or not bool(((ratio < 0.25) | (ratio > 4)).any()):
                break
            # The response was not what the guess said: take the measured one, from this state.
            earlier += plus.evaluations
            phases = replace(phases, beta=wanted)
            plus = phases.run(1.0, plus.value)
        out = contrast(phases, plus, self.sides)
        return replace(out, evaluations=out.evaluations + earlier)

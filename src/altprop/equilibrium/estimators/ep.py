"""Equilibrium propagation on a vector field: contrast two nudged equilibria.

Reference: Scellier et al., "Generalization of Equilibrium Propagation to Vector Field Dynamics",
arXiv 1808.04873; centred nudges after Laborieux et al., arXiv 2006.03824.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from altprop.equilibrium.estimators.estimator import (
    AbstractEstimator,
    Adjoint,
    Problem,
    check_counts,
    check_fields,
)
from altprop.equilibrium.estimators.phases import contrast, phase, response_beta
from altprop.equilibrium.solvers.solver import sample_norm


@dataclass(frozen=True)
class EP(AbstractEstimator):
    """Contrast the equilibria of `F(z) ∓ βg = 0`, which gives `a → −J⁻¹ g` as `β → 0`.

    That is the gradient only where `J` is symmetric; on attention it is biased at any `β`. Use
    `AEP` for a gradient; this is what the field calls naive EP.

    **Arguments:** `beta`, the nudge for a cotangent of unit norm per sample (`None`: chosen so that
    the state moves by `response` relative to its norm); `response`; `tol`, the residual of a
    nudged phase relative to the nudge; `max_steps`, the limit of evaluations per phase.
    """

    beta: float | None = None
    response: float = 1e-3
    tol: float = 1e-3
    max_steps: int = 100

    def __post_init__(self) -> None:
        check_fields("EP", beta=self.beta, response=self.response, tol=self.tol)
        check_counts("EP", max_steps=self.max_steps)

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        evaluations = 0
        guess = problem.step * cotangent  # what one step of the linear phase would give
        if self.beta is None:
            beta = response_beta(problem, guess, self.response)
        else:
            beta = torch.full_like(sample_norm(cotangent), self.beta)
        start = -guess
        while True:
            plus = phase(problem, cotangent, beta, start, None, self.tol, self.max_steps)
            evaluations += plus.evaluations
            wanted = response_beta(problem, plus.value, self.response)
            ratio = wanted / beta
            if self.beta is not None or not bool(((ratio < 0.25) | (ratio > 4)).any()):
                break
            # The response was not what the guess said: take the measured one, from this state.
            beta, start = wanted, plus.value
        minus = phase(problem, -cotangent, beta, -plus.value, None, self.tol, self.max_steps)
        evaluations += minus.evaluations
        return replace(contrast(plus, minus, beta, problem), evaluations=evaluations)

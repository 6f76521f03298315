"""Asymmetric equilibrium propagation: nudged phases corrected by `(J − Jᵀ)`.

Reference: Scurria et al., arXiv 2602.03670. Linearised, a phase of `F(z) − (J − Jᵀ)(z − z*) ∓ βg`
settles where `Jᵀ d = ±βg`, so the contrast is the exact adjoint for any Jacobian.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from altprop.equilibrium.estimators.estimator import (
    AbstractEstimator,
    Adjoint,
    Problem,
    Products,
    check_fields,
    solve_adjoint,
)
from altprop.equilibrium.estimators.phases import contrast, phase, response_beta
from altprop.equilibrium.solvers.solver import sample_norm
from altprop.errors import ConfigError


@dataclass(frozen=True)
class AEP(AbstractEstimator):
    """Contrast the equilibria of `F(z) − (J − Jᵀ)(z − z*) ∓ βg = 0`: exact as `β → 0`.

    The phases are solved, not merely relaxed for a fixed time, and the correction is never
    clipped: at the nudged equilibrium it is as large as the force itself. With `start="adjoint"`
    the phases start from the solution of their linearisation, which changes where they start and
    not where they end; each makes at least one nonlinear update.

    **Arguments:** `beta`, the nudge for a cotangent of unit norm per sample (`None`: chosen so that
    the state moves by `response` relative to its norm; below 1e-5 float32's round-off dominates,
    above 1e-2 the bias of order `β²`); `response`; `tol`, the residual of a nudged phase relative
    to the nudge; `max_steps`, the limit of evaluations per phase; `start`, `"adjoint"` or `"zero"`.
    """

    beta: float | None = None
    response: float = 1e-3
    tol: float = 1e-3
    max_steps: int = 100
    start: Literal["adjoint", "zero"] = "adjoint"

    def __post_init__(self) -> None:
        check_fields(
            "AEP",
            beta=self.beta,
            response=self.response,
            tol=self.tol,
            max_steps=self.max_steps,
        )
        if self.start not in ("adjoint", "zero"):
            raise ConfigError(f"AEP: start is {self.start!r}, expected 'adjoint' or 'zero'")

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        products = problem.linearise()
        evaluations = 1
        if self.start == "adjoint":
            linear = solve_adjoint(problem, products, cotangent, self.tol, self.max_steps)
            evaluations += linear.evaluations
            guess, first = linear.value, -linear.value
        else:
            guess, first = problem.step * cotangent, torch.zeros_like(cotangent)
        if self.beta is None:
            beta = response_beta(problem, guess, self.response)
        else:
            beta = torch.full_like(sample_norm(cotangent), self.beta)

        def antisymmetric(u: Tensor) -> Tensor:
            return products.jvp(u) - products.vjp(u)

        still = products.value
        plus = phase(
            problem, still, cotangent, beta, first, antisymmetric, self.tol, self.max_steps
        )
        minus = phase(
            problem, still, -cotangent, beta, -plus.value, antisymmetric, self.tol, self.max_steps
        )
        evaluations += 3 * (plus.evaluations + minus.evaluations)
        return replace(contrast(plus, minus, beta, problem), evaluations=evaluations)

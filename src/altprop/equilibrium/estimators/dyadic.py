"""Dyadic equilibrium propagation: a midpoint that infers and a difference that carries the error.

Reference: Scurria et al., arXiv 2602.03670 (the doubled state space) and arXiv 2602.02281. With two
copies `m ± d/2` of the state, `ṁ = F(m)` and `ḋ = J(m)ᵀ d − β∇C(m)`: the midpoint keeps the
inference dynamics, and the difference settles at `d = −βa`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from altprop.equilibrium.estimators.estimator import AbstractAdjointEstimator, check_own_solver
from altprop.equilibrium.estimators.nudge import Nudge, check_nudge, nudge_at
from altprop.equilibrium.estimators.problem import Adjoint, Problem
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    check_counts,
    check_fields,
    per_sample,
    sample_norm,
)


@dataclass(frozen=True)
class DyadicEP(AbstractAdjointEstimator):
    """Solve `F(m) = 0` and `J(m)ᵀ a + ∇C(m) = 0` as one system: exact, at any nudge.

    The difference obeys a linear equation, so `β` drops out of `a = −d/β` and there is no bias in
    it; what remains is the tolerance. The midpoint starts at the free state, where it stays up to
    what the free phase had left. Every evaluation linearises the force anew at the midpoint, so it
    costs about three forces where `Implicit` costs one product; use it for the procedure.

    **Arguments:** `tol`, the residual of the pair: the midpoint's relative to `‖z*‖` and the
    difference's relative to the nudge; `max_steps`, the limit of evaluations; `nudge`, `"linear"`
    (the constant cotangent) or `"cost"` (`∇C` at the midpoint: call the module with `cost=`);
    `solver`, of the pair (`None`: the module's own).
    """

    tol: float = 1e-3
    max_steps: int = 100
    nudge: Nudge = "linear"
    solver: AbstractSolver | None = None

    def __post_init__(self) -> None:
        check_fields("DyadicEP", tol=self.tol)
        check_counts("DyadicEP", max_steps=self.max_steps)
        check_nudge("DyadicEP", self.nudge)
        check_own_solver("DyadicEP", self.solver)

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        nudge = nudge_at("DyadicEP", self.nudge, problem, cotangent)
        tiny = torch.finfo(cotangent.dtype).tiny
        # in units of ‖z*‖ the midpoint's residual weighs as much as the difference's
        unit = per_sample(sample_norm(problem.state).clamp_min(tiny), cotangent)

        def residual(pair: Tensor) -> Tensor:
            moved, a = pair.unbind(1)
            m = problem.state + unit * moved
            pulled = problem.linearise(m).vjp(a) + nudge(m)
            return torch.stack([problem.force(m) / unit, pulled], 1)

        at_rest = problem.linearise()
        halves = at_rest.inverse(transposed=False), at_rest.inverse(transposed=True)

        def invert(pair: Tensor) -> Tensor:
            moved, a = pair.unbind(1)
            assert halves[0] is not None and halves[1] is not None
            return torch.stack([halves[0](moved), halves[1](a)], 1)

        start = torch.stack([torch.zeros_like(cotangent), problem.step * cotangent], 1)
        solution = problem.solve(
            residual,
            start,
            tol=self.tol,
            max_steps=self.max_steps,
            scale=torch.ones_like(sample_norm(cotangent)),
            solver=self.solver,
            inverse=None if None in halves else invert,
        )
        midpoint, pulled = solution.force.unbind(1)
        return Adjoint(
            value=solution.value[:, 1],
            residual=solution.residual,
            remainder=pulled,
            evaluations=3 * solution.evaluations + 1,  # a force, a linearisation and a VJP each
            result=solution.result,
            response=sample_norm(solution.value[:, 0]),
            nudged_residuals=torch.stack([sample_norm(midpoint), sample_norm(pulled)]),
        )

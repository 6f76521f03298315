"""Implicit differentiation: solve `Jᵀ a = −g` by vector-Jacobian products.

Reference: Bai, Kolter and Koltun, "Deep Equilibrium Models", NeurIPS 2019, equation 12.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from altprop.equilibrium.estimators.estimator import (
    AbstractEstimator,
    Adjoint,
    Problem,
    check_own_solver,
    solve_adjoint,
)
from altprop.equilibrium.solvers.solver import AbstractSolver, check_counts, check_fields


@dataclass(frozen=True)
class Implicit(AbstractEstimator):
    """Solve the adjoint equation `Jᵀ a = −g` to a tolerance: exact, but it transports `Jᵀ`.

    The last residual is known, so a solver that relaxes takes one more step, which is free; the
    certificate is the residual before it.

    **Arguments:** `tol`, the residual `‖Jᵀa + g‖ / ‖g‖` per sample (the default is that of the
    linear solution which `AEP` starts from); `max_steps`, the limit of VJPs;
    `solver`, of this linear problem (`None`: the module's own), such as `GMRES()`.
    """

    tol: float = 2.5e-3
    max_steps: int = 100
    solver: AbstractSolver | None = None

    def __post_init__(self) -> None:
        check_fields("Implicit", tol=self.tol)
        check_counts("Implicit", max_steps=self.max_steps)
        check_own_solver("Implicit", self.solver)

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        products = problem.linearise()
        solution = solve_adjoint(
            problem, products, cotangent, self.tol, self.max_steps, self.solver
        )
        value = solution.value
        if self.solver is not None or products.inverse(transposed=True) is None:
            solver = self.solver or problem.solver
            value = solver.onward(value, solution.force, problem.step)
        return Adjoint(
            value=value,
            residual=solution.residual,
            remainder=solution.force,
            evaluations=solution.evaluations + 1,
            result=solution.result,
        )

"""Implicit differentiation: solve `Jᵀ a = −g` by vector-Jacobian products.

Reference: Bai, Kolter and Koltun, "Deep Equilibrium Models", NeurIPS 2019, equation 12.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from altprop.equilibrium.estimators.estimator import (
    WITHOUT_STEP,
    AbstractAdjointEstimator,
    check_own_solver,
    relaxes,
    solve_adjoint,
)
from altprop.equilibrium.estimators.problem import Adjoint, Problem, step_on
from altprop.equilibrium.solvers.solver import AbstractSolver, check_counts, check_fields


@dataclass(frozen=True)
class Implicit(AbstractAdjointEstimator):
    """Solve the adjoint equation `Jᵀ a = −g` to a tolerance: exact, but it transports `Jᵀ`.

    The last residual is known, so a solver that relaxes takes one more step, which is free and
    shrinks the error about threefold; the certificate is the residual before it. A sample for which
    the step is too long (by that residual, it would move `a` further than an error may) takes none.
    A solver that takes none at all is held to 0.4 of the tolerance, for the same error.

    **Arguments:** `tol`, the residual `‖Jᵀa + g‖ / ‖g‖` per sample, in a stack of layers that of
    each level relative to its own adjoint (the default is that of the linear solution which `AEP`
    starts from); `max_steps`, the limit of VJPs; `solver`, of this linear problem (`None`: the
    module's own), such as `GMRES()`.
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
        by_inverse = self.solver is None and products.inverse(transposed=True) is not None
        steps = relaxes(problem, self.solver) and not by_inverse
        tol = self.tol if steps else WITHOUT_STEP * self.tol
        solution = solve_adjoint(problem, products, cotangent, tol, self.max_steps, self.solver)
        return Adjoint(
            value=solution.value if by_inverse else step_on(solution, problem.widths),
            residual=solution.residual,
            remainder=solution.force,
            evaluations=solution.evaluations + 1,
            result=solution.result,
        )

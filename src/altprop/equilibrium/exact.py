"""The adjoint that stands in for any estimator's while rules are switched off."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from altprop.equilibrium.estimators.estimator import AbstractAdjointEstimator, solve_adjoint
from altprop.equilibrium.estimators.problem import Adjoint, Problem
from altprop.equilibrium.solvers.gmres import GMRES
from altprop.equilibrium.solvers.solver import conclude, sample_norm

_TOL = {4: 1e-6, 8: 1e-10}  # by the bytes of a number
_MAX_STEPS = 1000


@dataclass(frozen=True)
class Exact(AbstractAdjointEstimator):
    """Solve `Jᵀ a = −g` until rounding is all that is left of the residual.

    Its residual is relative to `‖a‖ + ‖g‖`: where `a` is much longer than `g`, the round-off of
    `Jᵀa` alone may be larger than any small part of `g`.
    """

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        products = problem.linearise()
        tol = _TOL[cotangent.itemsize]
        # GMRES needs no stable relaxation, and a triangular system no solver at all
        solver = None if products.inverse(transposed=True) is not None else GMRES()
        found = solve_adjoint(problem, products, cotangent, tol, _MAX_STEPS, solver)
        residual = found.residual / (1 + sample_norm(found.value))
        return Adjoint(
            value=found.value,
            residual=residual,
            remainder=found.force,
            evaluations=found.evaluations + 1,
            result=conclude(residual, tol),
        )

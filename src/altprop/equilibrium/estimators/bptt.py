"""Backpropagation through time: record a stated relaxation and differentiate it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from altprop.equilibrium.call import Call
from altprop.equilibrium.estimators.estimator import AbstractEstimator
from altprop.equilibrium.estimators.problem import Certificate
from altprop.equilibrium.solvers.solver import conclude, relative_residual


@dataclass(frozen=True)
class BPTT(AbstractEstimator):
    """Differentiate every step of the solver's relaxation: exact for that finite relaxation.

    Memory grows with the number of steps, so use it as a reference, not to train. It needs
    `solver=Euler(...)` or `FixedPoint(...)`, whose `max_steps` steps it records without stopping
    early.
    """

    def attach(self, call: Call) -> Tensor:
        system, solver = call.system, call.solver
        z = solver.unroll(system.force, system.start(), step=system.step)
        steps = int(getattr(solver, "max_steps", 0))
        with torch.no_grad():
            residual = relative_residual(system.force(z), z, None)
        result = conclude(residual, 0)
        call.report(
            Certificate(
                result=result,
                free_residual=residual,
                free_evaluations=steps + 1,
                state=z.detach(),
                input=system.x.detach(),
                adjoint_evaluations=steps,
            )
        )
        call.settle(result, residual)
        return z

"""Backpropagation through time: record a stated relaxation and differentiate it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from altprop.equilibrium.estimators.estimator import (
    AbstractEstimator,
    Adjoint,
    Certificate,
    Problem,
    Site,
)
from altprop.equilibrium.solvers.solver import conclude, relative_residual
from altprop.errors import RuleError


@dataclass(frozen=True)
class BPTT(AbstractEstimator):
    """Differentiate every step of the solver's relaxation: exact for that finite relaxation.

    Memory grows with the number of steps, so use it as a reference, not to train. It needs
    `solver=Euler(...)` or `FixedPoint(...)`, whose `max_steps` steps it records without stopping
    early.
    """

    records: ClassVar[bool] = True

    def attach(self, site: Site) -> Tensor:
        z = site.solver.unroll(site.force, site.start, step=site.step)
        steps = int(getattr(site.solver, "max_steps", 0))
        with torch.no_grad():
            residual = relative_residual(site.force(z), z, None)
        result = conclude(residual, 0)
        site.finish(
            Certificate(
                result=result,
                free_residual=residual,
                free_evaluations=steps + 1,
                state=z.detach(),
                input=site.x.detach(),
                adjoint_evaluations=steps,
            )
        )
        site.settle(result, residual, site.solver.tol, "free phase")
        return z

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        raise RuleError("BPTT has no adjoint state: it differentiates the relaxation itself")

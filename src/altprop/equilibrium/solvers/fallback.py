"""A chain of solvers: each goes on where the last one left off, for the samples that need it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from altprop.equilibrium.solvers.anderson import Anderson
from altprop.equilibrium.solvers.euler import Euler
from altprop.equilibrium.solvers.newton import NewtonKrylov
from altprop.equilibrium.solvers.scattered import Scattered
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Force,
    Solution,
    better_of,
    check_solver_fields,
    conclude,
    per_sample,
    relative_residual,
    with_limits,
    with_stride,
)
from altprop.errors import ConfigError


@dataclass(frozen=True)
class Fallback(AbstractSolver):
    """Try solvers in turn, from the best state so far, until every sample is within the tolerance.

    A sample that is done stays as it is while a hard one goes on alone, so no sample's result
    depends on its batch-mates; one that ran away to infinity goes on from the start. An easy
    problem costs what the first solver costs. A point that only Newton finds may be one that a
    physical relaxation would never reach: convergence here is no certificate of stability. The step
    that is free after a solve (`stride`) is, for each sample, that of the solver it was solved by.

    **Arguments:** `solvers`, in order; each runs with this chain's `tol` and up to its own limit of
    evaluations (the second Anderson starts with an empty memory and smaller steps, which is what a
    restart is; the last resort seeks from scattered states); `tol`, the relative force residual to
    reach; `max_steps`, the limit of force evaluations of the whole chain.
    """

    solvers: tuple[AbstractSolver, ...] = (
        Anderson(),
        Anderson(mixing=0.3),
        NewtonKrylov(),
        Euler(step=0.05, max_steps=600),
        Scattered(),
    )
    tol: float = 7e-4
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        check_solver_fields(self)
        # a list is what configuration files give; a value must be hashable
        object.__setattr__(self, "solvers", tuple(self.solvers))
        wrong = [s for s in self.solvers if not isinstance(s, AbstractSolver)]
        if wrong or not self.solvers:
            raise ConfigError(
                f"Fallback: solvers is {self.solvers!r}, expected one solver or more: write "
                "Fallback(solvers=(Anderson(), NewtonKrylov()))"
            )

    def stride(self, step: float) -> float:
        return self.solvers[0].stride(step)  # of an easy sample; a solution tells each one's own

    @torch.no_grad()
    def solve(
        self,
        force: Force,
        start: Tensor,
        *,
        step: float,
        scale: Tensor | None = None,
    ) -> Solution:
        best: Solution | None = None
        for solver in self.solvers:
            used = 0 if best is None else best.evaluations
            if used >= self.max_steps:
                break
            limit = min(solver.max_steps, self.max_steps - used)
            member = with_limits(solver, self.tol, limit)
            at = start
            if best is not None:  # a sample that was lost has no state to go on from
                sound = per_sample(torch.isfinite(best.residual), start)
                at = torch.where(sound, best.value, start)
            found = member.solve(force, at, step=step, scale=scale)
            found = with_stride(found, member, step)
            best = found if best is None else better_of(best, found)
            if bool((best.residual <= self.tol).all()):
                break
        assert best is not None  # there is at least one solver and one evaluation
        residual = relative_residual(best.force, best.value, scale)
        return replace(best, residual=residual, result=conclude(residual, self.tol))

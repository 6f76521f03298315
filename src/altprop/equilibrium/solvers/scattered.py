"""Many starts: where no solver finds a fixed point from one state, seek it from seeded others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from altprop.equilibrium.solvers.newton import NewtonKrylov
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Force,
    Solution,
    better_of,
    check_counts,
    check_fields,
    check_solver_fields,
    conclude,
    per_sample,
    relative_residual,
    sample_norm,
    with_limits,
)
from altprop.errors import ConfigError

# multiples of it, modulo 1, fill the unit interval evenly, so that near and far starts alternate
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Scattered(AbstractSolver):
    """Run a solver from its start, then from random states near and far, keeping the best.

    A last resort: which of several fixed points it finds is a matter of the draws, and a physical
    relaxation would most likely not go there. The draws are seeded and the same for every sample,
    so that neither batch-mates nor the program's other draws change the result.

    **Arguments:** `solver`, run from every start up to its own limit of evaluations; `starts`, how
    many beside the given one; `spread`, the distance of the farthest start in units of the size of
    the given one (where feedback is not held, fixed points lie far out: on such a system 16 needed
    500 to 1900 evaluations over four seeds, 8 needed 2000 to 5900); `seed`, of the draws; `tol`,
    the relative force residual to reach; `max_steps`, the limit of force evaluations over all
    starts.
    """

    solver: AbstractSolver = NewtonKrylov()
    starts: int = 40
    spread: float = 16.0
    seed: int = 0
    tol: float = 7e-4
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        check_solver_fields(self)
        if not isinstance(self.solver, AbstractSolver):
            raise ConfigError(
                f"Scattered: solver is {self.solver!r}, expected a solver such as NewtonKrylov()"
            )
        check_counts("Scattered", starts=self.starts)
        check_fields("Scattered", spread=self.spread)

    @torch.no_grad()
    def solve(
        self,
        force: Force,
        start: Tensor,
        *,
        step: float,
        scale: Tensor | None = None,
    ) -> Solution:
        generator = torch.Generator().manual_seed(self.seed)
        best = self._from(start, 0, force, step, scale)
        size = sample_norm(start)
        # a start at zero has no size of its own: take the step that the force wants to make there
        size = torch.where(size > 0, size, step * sample_norm(best.force)).clamp_min(1e-6)
        for number in range(self.starts):
            done = best.residual <= self.tol
            if bool(done.all()) or best.evaluations >= self.max_steps:
                break
            draw = torch.randn(start.shape[1:], generator=generator).to(start)
            draw = draw / draw.norm() * (self.spread * ((number + 1) * _GOLDEN % 1))
            scattered = start + per_sample(size, start) * draw
            # a sample that is done stays: the solver stops there at once
            at = torch.where(per_sample(done, start), best.value, scattered)
            best = better_of(best, self._from(at, best.evaluations, force, step, scale))
        residual = relative_residual(best.force, best.value, scale)
        return replace(best, residual=residual, result=conclude(residual, self.tol))

    def _from(
        self, at: Tensor, used: int, force: Force, step: float, scale: Tensor | None
    ) -> Solution:
        limit = max(1, min(self.solver.max_steps, self.max_steps - used))
        return with_limits(self.solver, self.tol, limit).solve(force, at, step=step, scale=scale)

"""Explicit Euler relaxation, `z ← z + εF(z)`: the reference, and what analogue hardware does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Force,
    Solution,
    check_solver_fields,
    conclude,
    is_positive,
    per_sample,
    relative_residual,
)
from altprop.errors import ConfigError


@dataclass(frozen=True)
class Euler(AbstractSolver):
    """Relax by explicit Euler steps.

    An eigenvalue `a ± ib` of the force's Jacobian needs `ε < −2a/(a² + b²)`, so rotating modes
    force tiny steps: prefer `Anderson` unless the relaxation itself is what you study.

    **Arguments:** `step`, the step `ε`; `max_steps`, the limit of steps; `tol`, the relative force
    residual that ends the relaxation early (0: never, exactly `max_steps` steps).
    """

    repeatable: ClassVar[bool] = False

    step: float = 0.1
    max_steps: int = 120
    tol: float = 0.0

    def __post_init__(self) -> None:
        check_solver_fields(self)
        if not is_positive(self.step):
            raise ConfigError(f"Euler: step is {self.step!r}, expected a number > 0, such as 0.1")

    def solve(
        self,
        force: Force,
        start: Tensor,
        *,
        step: float,
        scale: Tensor | None = None,
    ) -> Solution:
        return relax(force, start, self.step, self.tol, self.max_steps, scale)

    def stride(self, step: float) -> float:
        return self.step

    def unroll(self, force: Force, start: Tensor, *, step: float) -> Tensor:
        return unrolled(force, start, self.step, self.max_steps)


@torch.no_grad()
def relax(
    force: Force,
    start: Tensor,
    step: float,
    tol: float,
    max_steps: int,
    scale: Tensor | None = None,
) -> Solution:
    """Step `z ← z + step · F(z)` until each sample is within the tolerance.

    A sample that converged or blew up stops, and the others go on: no sample's result depends on
    its batch-mates. Arguments are those of `AbstractSolver.solve` and of the solvers.
    """
    z, f = start, force(start)
    residual = relative_residual(f, z, scale)
    for n in range(max_steps):
        moving = ~(residual <= tol) & torch.isfinite(residual)
        count = int(moving.sum())
        if not count:
            return Solution(z, f, residual, n + 1, conclude(residual, tol))
        ahead = torch.add(z, f, alpha=step)
        z = ahead if count == len(z) else torch.where(per_sample(moving, z), ahead, z)
        f = force(z)
        residual = relative_residual(f, z, scale)
    return Solution(z, f, residual, max_steps + 1, conclude(residual, tol))


def unrolled(force: Force, start: Tensor, step: float, steps: int) -> Tensor:
    """Return the state after so many steps, each of them recorded wherever autograd is on."""
    z = start
    for _ in range(steps):
        z = z + step * force(z)
    return z

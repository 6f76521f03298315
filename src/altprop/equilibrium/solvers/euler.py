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

    @torch.no_grad()
    def solve(
        self,
        force: Force,
        start: Tensor,
        *,
        step: float,
        scale: Tensor | None = None,
    ) -> Solution:
        # A sample that converged or blew up stops, and the others go on: no sample's result
        # depends on its batch-mates.
        z, f = start, force(start)
        residual = relative_residual(f, z, scale)
        for n in range(self.max_steps):
            moving = ~(residual <= self.tol) & torch.isfinite(residual)
            if not bool(moving.any()):
                return Solution(z, f, residual, n + 1, conclude(residual, self.tol))
            z = torch.where(per_sample(moving, z), z + self.step * f, z)
            f = force(z)
            residual = relative_residual(f, z, scale)
        return Solution(z, f, residual, self.max_steps + 1, conclude(residual, self.tol))

    def stride(self, step: float) -> float:
        return self.step

    def unroll(self, force: Force, start: Tensor) -> Tensor:
        z = start
        for _ in range(self.max_steps):
            z = z + self.step * force(z)
        return z

"""Explicit Euler relaxation, `z ← z + εF(z)`: the reference, and what analogue hardware does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from altprop.equilibrium.solvers.relaxation import relax, unrolled
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Force,
    Solution,
    check_solver_fields,
    is_positive,
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

"""Plain fixed-point iteration, `z ← z + εF(z)` with the dynamics' own `ε`."""

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
)


@dataclass(frozen=True)
class FixedPoint(AbstractSolver):
    """Iterate the natural map of the dynamics, `g(z) = z + εF(z)`, until it moves nothing.

    It converges wherever `g` contracts near its fixed point, at the rate of the largest eigenvalue
    of `J_g`, and it cannot rest anywhere else. Nothing is extrapolated, so a causal window's states
    never depend on its later tokens, whatever the tolerance.

    **Arguments:** `tol`, the relative force residual to reach (0: never, exactly `max_steps`
    steps); `max_steps`, the limit of steps.
    """

    repeatable: ClassVar[bool] = False

    tol: float = 1e-3
    max_steps: int = 100

    def __post_init__(self) -> None:
        check_solver_fields(self)

    def solve(
        self,
        force: Force,
        start: Tensor,
        *,
        step: float,
        scale: Tensor | None = None,
    ) -> Solution:
        return relax(force, start, step, self.tol, self.max_steps, scale)

    def stride(self, step: float) -> float:
        return step

    def unroll(self, force: Force, start: Tensor, *, step: float) -> Tensor:
        return unrolled(force, start, step, self.max_steps)

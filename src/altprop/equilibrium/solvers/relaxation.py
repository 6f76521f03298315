"""Explicit steps `z ← z + εF(z)`: what Euler and fixed-point iteration have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from altprop.equilibrium.solvers.solver import (
    Force,
    Solution,
    conclude,
    per_sample,
    relative_residual,
)


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

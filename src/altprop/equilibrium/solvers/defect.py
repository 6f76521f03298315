"""Defect correction: where the linear part can be inverted, correct what the force still shows.

Reference: Stetter, "The defect correction principle and discretization methods", Numer. Math. 29
(1978).
"""

from __future__ import annotations

import torch
from torch import Tensor

from altprop.equilibrium.solvers.solver import (
    Force,
    Result,
    Solution,
    conclude,
    per_sample,
    relative_residual,
)


@torch.no_grad()
def defect_correction(
    force: Force,
    inverse: Force,
    start: Tensor,
    *,
    tol: float,
    max_steps: int,
    scale: Tensor | None = None,
) -> Solution:
    """Solve `force(u) = 0` by `u ← u + inverse(force(u))`, each sample until it is solved.

    For a linear force one correction is exact; a nudged phase differs from its linear part by a
    curvature of order `β`, by which each further correction shrinks the error. No accelerated
    solver: what it leaves is what the force itself does not know yet.

    **Arguments:** `force`; `inverse`, of minus the force's linear part; both take `(B, ...)` to
    `(B, ...)`. The others are as in `AbstractSolver`.
    """
    u, f = start, force(start)
    residual = relative_residual(f, u, scale)
    best_u, best_f, best = u, f, residual
    steps = 1
    while steps < max_steps:
        moving = ~(best <= tol) & torch.isfinite(residual)
        if not bool(moving.any()):
            break
        u = torch.where(per_sample(moving, u), u + inverse(f), u)
        f = force(u)
        steps += 1
        residual = relative_residual(f, u, scale)
        better = residual < best
        best_u = torch.where(per_sample(better, u), u, best_u)
        best_f = torch.where(per_sample(better, u), f, best_f)
        best = torch.where(better, residual, best)
        if not bool(better.any()):  # round-off, or a nudge too large for its curvature
            break
    lost = ~torch.isfinite(residual) & ~(best <= tol)
    result = Result.NON_FINITE if bool(lost.any()) else conclude(best, tol)
    return Solution(best_u, best_f, best, steps, result)

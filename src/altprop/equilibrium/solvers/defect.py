"""Defect correction: where the linear part can be inverted, correct what the force still shows.

Reference: Stetter, "The defect correction principle and discretization methods", Numer. Math. 29
(1978).
"""

from __future__ import annotations

from torch import Tensor

from altprop.equilibrium.solvers.solver import Force, Point, Solution, iterate


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
    before: Tensor | None = None

    def correct(at: Point) -> Tensor | None:
        nonlocal before
        improved = before is None or bool((at.least < before).any())
        before = at.least
        # else it is round-off, or a nudge too large for its curvature
        return at.value + inverse(at.force) if improved else None

    return iterate(force, start, correct, tol=tol, max_steps=max_steps, scale=scale)

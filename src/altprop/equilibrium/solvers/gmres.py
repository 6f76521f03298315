"""Restarted GMRES for linear forces: the adjoint's equation, and nudged phases at a small nudge.

Reference: Saad and Schultz, "GMRES: a generalized minimal residual algorithm for solving
nonsymmetric linear systems", SIAM J. Sci. Stat. Comput. 7 (1986).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from altprop.equilibrium.solvers.krylov import difference_product, gmres_cycle
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Force,
    Solution,
    check_counts,
    check_solver_fields,
    conclude,
    per_sample,
    relative_residual,
    sample_norm,
)
from altprop.errors import RuleError


@dataclass(frozen=True)
class GMRES(AbstractSolver):
    """Solve a linear force, `A z + b = 0`, in the fewest products that any Krylov method needs.

    It needs neither a step nor stability, only that `A` is not singular, so it serves where
    Anderson stalls: give it to an estimator, `Implicit(solver=GMRES())` or `AEP(solver=GMRES())`.
    A nudged phase is linear up to the order of its nudge, and every restart begins from the true
    force, so what is left of the curvature is corrected. For a free phase use `NewtonKrylov`.

    **Arguments:** `restart`, the largest Krylov space (memory grows with it); `tol`, the relative
    force residual to reach; `max_steps`, the limit of force evaluations, products included.

    **Raises:** `RuleError` for a force that is not linear.
    """

    linear: ClassVar[bool] = True
    restart: int = 30
    tol: float = 1e-3
    max_steps: int = 100

    def __post_init__(self) -> None:
        check_solver_fields(self)
        check_counts("GMRES", restart=self.restart)

    @torch.no_grad()
    def solve(
        self,
        force: Force,
        start: Tensor,
        *,
        step: float,
        scale: Tensor | None = None,
    ) -> Solution:
        z, f = start, force(start)
        residual = relative_residual(f, z, scale)
        evaluations = 1
        going = torch.ones_like(residual, dtype=torch.bool)
        while evaluations + 1 < self.max_steps:
            going &= torch.isfinite(residual) & ~(residual <= self.tol)
            if not bool(going.any()):
                break
            right = torch.where(per_sample(going, f), -f, torch.zeros_like(f))
            goal = self.tol * (sample_norm(z) if scale is None else scale)
            # any length serves a linear force; this one keeps round-off and curvature small
            reach = torch.maximum(sample_norm(z), sample_norm(f)).clamp_min(
                torch.finfo(f.dtype).tiny
            )
            product = difference_product(force, z, f, reach)
            cycle = gmres_cycle(
                product, right, goal, min(self.restart, self.max_steps - evaluations - 1)
            )
            moved = torch.where(per_sample(going, z), z + cycle.x, z)
            new = force(moved)
            evaluations += cycle.products + 1
            _check_linear(going, f, new, cycle.left, cycle.size * sample_norm(moved))
            measured = relative_residual(new, moved, scale)
            better = going & (measured < residual)
            shaped = per_sample(better, z)
            z, f = torch.where(shaped, moved, z), torch.where(shaped, new, f)
            residual = torch.where(better, measured, residual)
            going &= better  # a cycle without progress would repeat itself
        return Solution(z, f, residual, evaluations, conclude(residual, self.tol))


def _check_linear(going: Tensor, old: Tensor, new: Tensor, left: Tensor, size: Tensor) -> None:
    """Refuse a force whose value after a cycle is not what linearity predicts."""
    off = sample_norm(new + left)
    rounding = 1e3 * torch.finfo(old.dtype).eps * size
    wrong = going & ~(off <= 0.1 * sample_norm(old) + rounding)
    if bool(wrong.any()):
        worst = float((off / sample_norm(old))[wrong].max())
        raise RuleError(
            "GMRES solves linear problems, and this force is not linear (after one cycle it is off "
            f"by {worst:.1e} of what linearity predicts): keep it to an estimator, such as "
            "Implicit(solver=GMRES()) or, with a smaller nudge, AEP(solver=GMRES()), and write "
            "solver=NewtonKrylov() for a free phase"
        )

"""Newton's method with GMRES inside: fast near a fixed point, and indifferent to its stability.

Reference: Knoll and Keyes, "Jacobian-free Newton–Krylov methods", J. Comput. Phys. 193 (2004);
the backtracking is that of Eisenstat and Walker, SIAM J. Optim. 4 (1994).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    is_positive,
    per_sample,
    relative_residual,
    sample_norm,
)
from altprop.errors import ConfigError


@dataclass(frozen=True)
class NewtonKrylov(AbstractSolver):
    """Solve by Newton steps `J s = −F`, each by GMRES on differences of forces, with backtracking.

    It converges where relaxation and Anderson do not (rotating, stiff and unstable points), at a
    price per step; so it also finds points that a physical relaxation would never reach. A sample
    stops when its norm cannot be lowered along the step any more: its Jacobian is singular there.

    **Arguments:** `tol`, the relative force residual to reach; `max_steps`, the limit of force
    evaluations, products and trials included; `restart`, the largest Krylov space of a step;
    `forcing`, the relative residual of a step's linear problem; `halvings`, the limit of
    backtracking.
    """

    tol: float = 7e-4
    max_steps: int = 300
    restart: int = 30
    forcing: float = 0.1
    halvings: int = 12

    def __post_init__(self) -> None:
        check_solver_fields(self)
        check_counts("NewtonKrylov", restart=self.restart, halvings=self.halvings)
        if not (is_positive(self.forcing) and self.forcing < 1):
            raise ConfigError(
                f"NewtonKrylov: forcing is {self.forcing!r}, expected a number between 0 and 1"
            )

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
        tiny, eps = torch.finfo(f.dtype).tiny, torch.finfo(f.dtype).eps
        while evaluations + 1 < self.max_steps:
            going &= torch.isfinite(residual) & ~(residual <= self.tol)
            if not bool(going.any()):
                break
            size = sample_norm(f)
            right = torch.where(per_sample(going, f), -f, torch.zeros_like(f))
            # half the tolerance, so that a last step does not end just short of it
            goal = torch.maximum(
                self.forcing * size,
                0.5 * self.tol * (sample_norm(z) if scale is None else scale),
            )
            goal = torch.minimum(goal, 0.9 * size)
            reach = math.sqrt(eps) * torch.maximum(sample_norm(z), step * size).clamp_min(tiny)
            cycle = gmres_cycle(
                difference_product(force, z, f, reach),
                right,
                goal,
                min(self.restart, self.max_steps - evaluations - 1),
            )
            evaluations += cycle.products
            searching, length = going.clone(), torch.ones_like(size)
            for _ in range(self.halvings):
                if evaluations >= self.max_steps or not bool(searching.any()):
                    break
                shaped = per_sample(searching, z)
                trial = torch.where(shaped, z + per_sample(length, z) * cycle.x, z)
                new = force(trial)
                evaluations += 1
                lower = searching & (sample_norm(new) <= (1 - 1e-4 * length) * size)
                shaped = per_sample(lower, z)
                z, f = torch.where(shaped, trial, z), torch.where(shaped, new, f)
                searching &= ~lower
                length = torch.where(searching, length / 2, length)
            going &= ~searching
            residual = relative_residual(f, z, scale)
        return Solution(z, f, residual, evaluations, conclude(residual, self.tol))

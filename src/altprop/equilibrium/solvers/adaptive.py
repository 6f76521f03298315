"""Relaxation with an adaptive step: the trajectory of `dz/dt = F(z)` itself, to a stated accuracy.

Reference: the embedded pair 3(2) of Bogacki and Shampine, "A 3(2) pair of Runge–Kutta formulas",
Appl. Math. Lett. 2 (1989), whose last stage is the next step's first; step control as in Hairer,
Nørsett and Wanner, "Solving Ordinary Differential Equations I", section II.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Force,
    Solution,
    check_fields,
    check_solver_fields,
    conclude,
    per_sample,
    relative_residual,
    sample_norm,
)


@dataclass(frozen=True)
class Moment:
    """A point of the trajectory: `time`, `(B,)`, for every sample has its own steps; `value` and
    `force`, `(B, ...)`; `residual`, `(B,)`; `evaluations` so far."""

    time: Tensor
    value: Tensor
    force: Tensor
    residual: Tensor
    evaluations: int


@dataclass(frozen=True)
class Adaptive(AbstractSolver):
    """Follow the physical relaxation with error control, a step size of its own for each sample.

    Use it to study the dynamics: what it converges to is what the physical system would reach, and
    where it does not (a limit cycle, a runaway) the system does not either. To train, prefer
    `Anderson`, which needs a tenth of the evaluations. `trajectory` gives the points on the way.

    **Arguments:** `tol`, the relative force residual that ends a sample's relaxation (0: never);
    `max_steps`, the limit of force evaluations (three per step tried); `rtol`, `atol`, the error
    accepted in a step, relative to the state's norm and absolute.
    """

    tol: float = 7e-4
    max_steps: int = 600
    rtol: float = 1e-3
    atol: float = 1e-9

    def __post_init__(self) -> None:
        check_solver_fields(self)
        check_fields("Adaptive", rtol=self.rtol, atol=self.atol)

    def solve(
        self,
        force: Force,
        start: Tensor,
        *,
        step: float,
        scale: Tensor | None = None,
    ) -> Solution:
        for moment in self.trajectory(force, start, step=step, scale=scale):
            last = moment
        return Solution(
            last.value,
            last.force,
            last.residual,
            last.evaluations,
            conclude(last.residual, self.tol),
        )

    @torch.no_grad()
    def trajectory(
        self, force: Force, start: Tensor, *, step: float, scale: Tensor | None = None
    ) -> Iterator[Moment]:
        """Yield the start, and where the samples are after every step that is tried.

        It ends when all samples are done or the limit is met. A sample whose step was rejected
        repeats its last point.

        **Arguments:** as `solve`; `step` is the first step that is tried.
        """
        z, f = start, force(start)
        evaluations = 1
        residual = relative_residual(f, z, scale)
        time = torch.zeros_like(residual)
        h = torch.full_like(residual, step)
        yield Moment(time, z, f, residual, evaluations)
        eps = 10 * torch.finfo(f.dtype).eps
        while evaluations + 3 <= self.max_steps:
            # a sample whose step has shrunk to nothing is running away in finite time
            going = ~(residual <= self.tol) & torch.isfinite(residual) & (h > eps * step)
            if not bool(going.any()):
                return
            width = per_sample(torch.where(going, h, torch.zeros_like(h)), z)
            second = force(z + width / 2 * f)
            third = force(z + width * 3 / 4 * second)
            moved = z + width * (2 / 9 * f + 1 / 3 * second + 4 / 9 * third)
            fourth = force(moved)
            evaluations += 3
            error = width * (-5 / 72 * f + 1 / 12 * second + 1 / 9 * third - 1 / 8 * fourth)
            size = torch.maximum(sample_norm(z), sample_norm(moved))
            # Near an equilibrium any error within rtol would let the steps grow until they are
            # unstable, and the state would hover there; so an error may not exceed a tenth of the
            # step itself either.
            share = torch.maximum(0.1 * h * sample_norm(f), eps * size)
            allowed = torch.minimum(self.atol + self.rtol * size, share)
            ratio = sample_norm(error) / allowed
            ratio = torch.where(torch.isfinite(ratio), ratio, torch.full_like(ratio, torch.inf))
            accept = going & (ratio <= 1)
            shaped = per_sample(accept, z)
            z, f = torch.where(shaped, moved, z), torch.where(shaped, fourth, f)
            time = torch.where(accept, time + h, time)
            factor = (0.9 * ratio.clamp_min(1e-9) ** (-1 / 3)).clamp(0.2, 5.0)
            h = torch.where(going, h * factor, h)
            residual = relative_residual(f, z, scale)
            yield Moment(time, z, f, residual, evaluations)

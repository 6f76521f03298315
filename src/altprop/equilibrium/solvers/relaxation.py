"""Explicit steps `z ← z + εF(z)`: what Euler and fixed-point iteration have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from altprop.equilibrium.solvers.solver import Force, Solution, iterate


def relax(
    force: Force,
    start: Tensor,
    step: float,
    tol: float,
    max_steps: int,
    scale: Tensor | None = None,
) -> Solution:
    """Make up to `max_steps` steps `z ← z + step · F(z)`, until each sample is within `tol`.

    Arguments are those of `AbstractSolver.solve` and of the solvers.
    """
    return iterate(
        force,
        start,
        lambda at: torch.add(at.value, at.force, alpha=step),
        tol=tol,
        max_steps=max_steps + 1,  # the force where the last step ends is evaluated too
        scale=scale,
        latest=True,
    )


def unrolled(force: Force, start: Tensor, step: float, steps: int) -> Tensor:
    """Return the state after so many steps, each of them recorded wherever autograd is on."""
    z = start
    for _ in range(steps):
        z = z + step * force(z)
    return z

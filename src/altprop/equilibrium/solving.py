"""How a call solves: first tokens first, a batch in parts."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from altprop.equilibrium.driven import Driven
from altprop.equilibrium.solvers.solver import AbstractSolver, Force, Solution, worst


def quiet(driven: Driven) -> Force:
    """Return the force without recording, in full precision."""

    def force(z: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            return driven.force(z)

    return force


def approach_freely(
    solver: AbstractSolver, driven: Driven, start: Tensor
) -> tuple[Solution, Tensor]:
    """Approach the free state from `start`, `(B, ...)`, where it helps first tokens before all.

    The others then start displaced as the first ones were on average. An evaluation of a part of
    the window counts as that part of one.
    """
    first = driven.first() if solver.piecewise and solver.tol > 0 else None
    if first is None:
        return solver.approach(quiet(driven), start, step=driven.step)
    k, T = first.x.shape[1], start.shape[1]
    head = solver.solve(quiet(first), start[:, :k], step=driven.step)
    moved = (head.value - start[:, :k]).mean(1, keepdim=True)
    start = torch.cat([head.value, start[:, k:] + moved], 1)
    found, ahead = solver.approach(quiet(driven), start, step=driven.step)
    spent = found.evaluations + math.ceil(head.evaluations * k / T)
    return replace(found, evaluations=spent), ahead


def whole(parts: list[Tensor]) -> Tensor:
    """Return the samples of all parts in one tensor; the part itself if it is the only one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def join(parts: list[Solution]) -> Solution:
    """Return the solution of a batch from those of its parts; the one that took longest counts."""
    if len(parts) == 1:
        return parts[0]
    return Solution(
        value=torch.cat([part.value for part in parts]),
        force=torch.cat([part.force for part in parts]),
        residual=torch.cat([part.residual for part in parts]),
        evaluations=max(part.evaluations for part in parts),
        result=worst(*(part.result for part in parts)),
    )

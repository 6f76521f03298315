"""What rounding hides: the floor of a contrast, sample by sample and level by level.

A contrast of phases divides differences of forces by a small nudge, and with them their rounding:
`eps ‖z*‖ / β` times a small factor. Nothing at or below that floor says anything about the force,
so no state is moved by it and no residual is judged by it. A layered system has one floor per
level, for the levels' adjoints may differ by many powers of ten and one nudge serves them all.

Shapes: `B` samples, `P` levels (1 where the state is no stack of levels), a state `(B, ...)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altprop.equilibrium.estimators.estimator import Problem
from altprop.equilibrium.solvers.solver import per_sample, sample_norm

# A contrast's rounding is 0.3 to 2.3 times eps ‖z*‖ / β (measured: stacks of tanh and ReLU layers
# of width 16 to 1024, a GPT's blocks, damped attention, a gated block after 1000 steps; float32).
ROUNDING = 4.0


def level_norms(v: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Return the Euclidean norm of each level of each sample, `(B, P)`."""
    if not widths:
        return sample_norm(v).unsqueeze(1)
    return torch.stack([sample_norm(part) for part in v.flatten(1).split(widths, 1)], 1)


def choose(mask: Tensor, v: Tensor, other: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Return the levels of `v` where the mask, `(B, P)`, says so, and those of `other` elsewhere.

    **Arguments:** `v`, `(B, ...)`; `other`, of that shape or of one that broadcasts to it.
    """
    if not widths:
        return torch.where(per_sample(mask, v), v, other)
    spread = mask.repeat_interleave(torch.tensor(widths, device=v.device), dim=1)
    return torch.where(spread.view(v.shape), v, other)


def relative_to_levels(norms: Tensor, a: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Return norms, `(B, P)`, relative to those of the levels of `a`; as they are without levels.

    Without levels they are relative to the nudge, which is 1.
    """
    if not widths:
        return norms
    return norms / level_norms(a, widths).clamp_min(torch.finfo(norms.dtype).tiny)


def floor_of(problem: Problem, beta: Tensor) -> Tensor:
    """Return the rounding that a contrast at the nudge `beta`, `(B,)`, may hold, `(B, P)`."""
    eps = torch.finfo(problem.state.dtype).eps
    return ROUNDING * eps * level_norms(problem.state, problem.widths) / beta.unsqueeze(1)

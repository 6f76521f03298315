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

from altprop.equilibrium.estimators.problem import Problem
from altprop.equilibrium.levels import choose, level_norms

# A contrast's rounding is 0.3 to 2.3 times eps ‖z*‖ / β (measured: stacks of tanh and ReLU layers
# of width 16 to 1024, a GPT's blocks, damped attention, a gated block after 1000 steps; float32).
ROUNDING = 4.0


def floor_of(problem: Problem, beta: Tensor) -> Tensor:
    """Return the rounding that a contrast at the nudge `beta`, `(B,)`, may hold, `(B, P)`."""
    eps = torch.finfo(problem.state.dtype).eps
    return ROUNDING * eps * level_norms(problem.state, problem.widths) / beta.unsqueeze(1)


def loud(v: Tensor, floor: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Return `v`, `(B, ...)`, with zeros at the levels that are below their floor, `(B, P)`."""
    return choose(level_norms(v, widths) <= floor, torch.zeros_like(v), v, widths)

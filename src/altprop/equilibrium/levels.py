"""A stack's levels, each by its own measure: judged, and solved, relative to what itself holds.

The adjoints of a stack's levels may differ by many powers of ten, so a residual that is small
beside the whole says nothing about the small ones. In units of each level's own size the system
keeps its form, `J = −I + N` becomes `−I + D⁻¹ N D` with the same natural step, so a solver needs to
know nothing of levels.

Shapes: `B` samples, `P` levels (1 where the state is no stack of levels), `n` numbers per sample
over all levels; a state is `(B, n)`, several of them as one unknown `(B, k, n)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from altprop.equilibrium.solvers.solver import (
    Force,
    Result,
    Solution,
    conclude,
    per_sample,
    power_below,
    sample_norm,
)

Attempt = Callable[[Force, Tensor, Force | None], Solution]


def level_norms(v: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Return the Euclidean norm of all that `v` holds at each level of each sample, `(B, P)`."""
    if not widths:
        return sample_norm(v).unsqueeze(1)
    return torch.stack([sample_norm(part) for part in v.split(widths, -1)], 1)


def per_level(s: Tensor, v: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Return `s`, `(B, P)`, shaped so that it multiplies `v` sample by sample, level by level."""
    if not widths:
        return per_sample(s, v)
    spread = s.repeat_interleave(torch.tensor(widths, device=v.device), 1, output_size=v.shape[-1])
    return spread.view(len(v), *([1] * (v.dim() - 2)), v.shape[-1])


def choose(mask: Tensor, v: Tensor, other: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Return the levels of `v` where the mask, `(B, P)`, says so, and those of `other` elsewhere.

    **Arguments:** `v`, `(B, ...)`; `other`, of that shape or of one that broadcasts to it.
    """
    return torch.where(per_level(mask, v, widths), v, other)


def relative_to_levels(norms: Tensor, a: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Return norms, `(B, P)`, relative to those of the levels of `a`; as they are without levels.

    Without levels they are relative to the nudge, which is 1.
    """
    if not widths:
        return norms
    size = level_norms(a, widths).clamp_min(torch.finfo(norms.dtype).tiny)
    # a level that nothing has reached yet is far from solved, which is not the same as lost
    return norms / torch.maximum(size, 1e-30 * norms)


def worst_level(force: Tensor, a: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Return the residual of the level that is worst relative to its own part of `a`, `(B,)`."""
    return relative_to_levels(level_norms(force, widths), a, widths).amax(1)


def solve_by_levels(
    attempt: Attempt,
    force: Force,
    start: Tensor,
    inverse: Force | None,
    tol: float,
    widths: tuple[int, ...],
) -> Solution:
    """Solve until every level is within `tol` of its own size, in units of the sizes known so far.

    The first sizes are those of the start, so an attempt may end before it has reached all levels,
    or with less there than it thought. What it has found tells better sizes, and another attempt
    goes on in these, for the samples that need it.

    **Arguments:** `attempt`, from a force, a start and an inverse (of minus the force's linear
    part, or `None`) to a solution within `tol`; the others as it would be given them.

    **Returns:** the solution; `residual` is that of the worst level, relative to its own value.
    """
    if not widths:
        return attempt(force, start, inverse)
    value, left, evaluations, lost = start, torch.zeros_like(start), 0, False
    stride: Tensor | None = None
    unsolved = torch.ones(len(start), dtype=torch.bool, device=start.device)
    size = level_norms(start, widths)
    for _ in range(len(widths) + 1):  # an attempt reaches one more level at least
        unit = per_level(_powers(size), start, widths)
        found = _scaled(attempt, force, value, inverse, unit, unsolved)
        evaluations += found.evaluations
        lost = lost or found.result is Result.NON_FINITE
        value = found.value
        left = torch.where(per_sample(unsolved, start), found.force, left)
        if stride is None or found.stride is None:
            stride = found.stride
        else:
            stride = torch.where(unsolved, found.stride, stride)
        residual = worst_level(left, value, widths)
        # what fell short in its own units would do so again
        unsolved &= ~(residual <= tol) & (found.residual <= tol)
        if not bool(unsolved.any()):
            break
        size = torch.maximum(level_norms(value, widths), level_norms(left, widths))
    result = conclude(residual, tol)
    if lost and result is not Result.CONVERGED:
        result = Result.NON_FINITE
    return Solution(value, left, residual, evaluations, result, stride)


def _scaled(
    attempt: Attempt,
    force: Force,
    start: Tensor,
    inverse: Force | None,
    unit: Tensor,
    unsolved: Tensor,
) -> Solution:
    """Attempt a solve in these units; a sample that is solved shows no force, and stays."""
    still, begin = per_sample(~unsolved, start), start / unit

    def scaled(v: Tensor) -> Tensor:
        at = start if v is begin else v * unit  # of the start itself products may be known
        return (force(at) / unit).masked_fill(still, 0.0)

    def inverted(r: Tensor) -> Tensor:
        assert inverse is not None
        return inverse(r * unit) / unit

    found = attempt(scaled, begin, None if inverse is None else inverted)
    return replace(found, value=found.value * unit, force=found.force * unit)


def _powers(size: Tensor) -> Tensor:
    """Return the powers of 2 just below the levels' sizes, `(B, P)`: to scale by them is exact.

    What has no size yet takes that of the level above, from which its adjoint will come.
    """
    above = torch.ones_like(size[:, 0])
    known = []
    for own in reversed(size.unbind(1)):
        above = torch.where((own > 0) & torch.isfinite(own), own, above)
        known.append(above)
    return power_below(torch.stack(known[::-1], 1))

"""Phases that are read where they start: what their contrast shows beside the linear problem.

At mirror images of the linear solution `a` the contrast's residual is that of the linear problem,
which is known, and what the nudge adds to it: a bias of order `β²`, kinks that lie between the two
phases, and round-off, of order `1/β`. So no phase has to be iterated. Where a sample shows more
than round-off beside its linear problem its nudge is made as small as that asks for; what a smaller
nudge does not make smaller is no curvature, and is not taken either. Nor is what they show of a
sample whose linear problem is not solved, or whose state is further from its fixed point than they
are from each other.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from altprop.equilibrium.estimators.phases import Phases, Sides, displacement, finest_response
from altprop.equilibrium.estimators.problem import Adjoint, Problem, step_on
from altprop.equilibrium.estimators.roundoff import ROUNDING, floor_of
from altprop.equilibrium.levels import choose, level_norms, relative_to_levels, worst_level
from altprop.equilibrium.solvers.solver import (
    Solution,
    conclude,
    relative_residual,
    sample_norm,
)

_SHRINK = 8.0  # at least: a bias of order β² falls 64-fold
_MOST = 512.0  # where nothing is known of the bias, as beside a floor of 0
_LOOKS = 3  # smaller nudges that are tried
_ASTRAY = 0.1  # a state's relative error, beside which a nudge of some 1e-4 of it tells nothing


def confirm(
    phases: Phases, linear: Solution, first: Tensor, across: Tensor, sides: Sides
) -> Adjoint:
    """Make one nonlinear update of each phase from the linear solution, and read the adjoint.

    Where the linear solver knows of no step that is worth taking, the phases only certify.

    **Arguments:** `phases`, at the nudge to begin with; `linear`, the solution of `Jᵀ a + g = 0`
    and its residual; `first`, minus its value; `across`, the correction `(J − Jᵀ)u` there.
    """
    problem, widths = phases.problem, phases.problem.widths
    size = level_norms(first, widths)
    # what a nudge of the finest response hides of a level whatever its state's size
    allowed = ROUNDING * torch.finfo(first.dtype).eps / finest_response(first) * size
    seen, ends = _look(phases, first, across, sides)
    looks = 1
    # no smaller nudge makes good what the state, or the linear problem, is off by
    off = (_state_error(problem, first) > _ASTRAY) | (linear.residual > phases.tol)
    hidden = off.unsqueeze(1).expand_as(size)
    lost = ~torch.isfinite(linear.residual).unsqueeze(1)
    beside = level_norms(seen - linear.force, widths)
    for _ in range(_LOOKS):
        floor = torch.maximum(allowed, floor_of(problem, phases.beta))
        curved = ~((beside <= floor) | hidden | lost)
        if not bool(curved.any()):
            break
        phases = replace(phases, beta=phases.beta / _shrink(beside / floor, curved))
        seen, ends = _look(phases, first, across, sides)
        looks += 1
        before, beside = beside, level_norms(seen - linear.force, widths)
        hidden = hidden | curved & (beside >= before / 2)
    floor = torch.where(hidden, beside, floor_of(problem, phases.beta))
    # below its floor a level keeps what the linear problem itself still shows
    untold = hidden | (level_norms(seen, widths) <= floor)
    left = choose(untold, linear.force, seen, widths)
    residual = worst_level(left, first, widths)
    return Adjoint(
        value=step_on(replace(linear, force=left, residual=residual), widths, problem.step),
        residual=residual,
        remainder=left,
        evaluations=looks * len(ends),
        result=conclude(residual, phases.tol),
        beta=phases.beta,
        response=displacement(phases.beta, sample_norm(first), problem),
        nudged_residuals=torch.stack([sample_norm(end) for end in ends]),
        floor=relative_to_levels(floor, first, widths).mT,
    )


def _state_error(problem: Problem, first: Tensor) -> Tensor:
    """Return `‖F‖/‖z‖ · ‖a‖/‖g‖`, `(B,)`: how far a sample's state is from a fixed point.

    A cotangent has norm 1, or is 0, as its adjoint is. NaN where the linear problem was lost.
    """
    return relative_residual(problem.still, problem.state, None) * sample_norm(first)


def _shrink(beyond: Tensor, curved: Tensor) -> Tensor:
    """Return by what to divide each sample's nudge, `(B,)`, so that rounding hides its curvature.

    The one falls with the square of the nudge and the other grows with its inverse; they meet at
    the third root of what is between them, and twice that leaves the curvature an eighth.

    **Arguments:** `beyond`, how many times the rounding shows, and `curved`, where that counts,
    `(B, P)`.
    """
    most = torch.where(curved, beyond, 0.0).amax(1)
    factor = 2 * most.nan_to_num(_SHRINK).pow(1 / 3)
    return torch.where(curved.any(1), factor.clamp(_SHRINK, _MOST), 1.0)


def _look(
    phases: Phases, first: Tensor, across: Tensor, sides: Sides
) -> tuple[Tensor, list[Tensor]]:
    """Return the residual of the contrast, and of each phase, with the phases at `±first`."""
    plus = phases.drive(1.0, first) - across
    if sides == 1:
        return -plus, [plus]
    minus = phases.drive(-1.0, -first) + across
    pair = (minus - plus) / 2
    if sides == 2:
        return pair, [plus, minus]
    near, ends = _look(phases.halved(), first, across, 2)
    return (4 * near - pair) / 3, [plus, minus, *ends]

"""The nudged phases that every contrastive estimator shares.

In units of the nudge, `z^{±β} = z* + β u±`, a phase solves `ψ±(u) = 0` with
`ψ±(u) = (F(z* + βu) − F(z*))/β − (correction of u) ∓ g`, and the adjoint is `a = (u⁻ − u⁺)/2`, or
`−u⁺` where there is one phase only. Its bias is even in `β`, so two pairs leave none of order `β²`
(Richardson's extrapolation). Working with `u` keeps a small nudge from drowning in `z*`;
subtracting `F(z*)` keeps the free phase's own residual out of it. Residuals are relative to the
nudge, never to the state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from altprop.equilibrium.estimators.nudge import Map
from altprop.equilibrium.estimators.problem import Adjoint, Problem, step_on
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Solution,
    per_sample,
    sample_norm,
    worst,
)
from altprop.errors import ConfigError

Sides = Literal[1, 2, 4]


@dataclass(frozen=True)
class Phases:
    """The nudged phases of one problem.

    `nudge`: from a state to the nudge there (at `z*`, the cotangent). `beta`: `(B,)`. `tol`,
    `max_steps`: of one phase. `solver`: None for the module's own. `inverse`: of minus the phases'
    linear part, where the dynamics has it.
    """

    problem: Problem
    nudge: Map
    beta: Tensor
    tol: float
    max_steps: int
    solver: AbstractSolver | None = None
    inverse: Map | None = None

    def drive(self, sign: float, u: Tensor) -> Tensor:
        """Return `(F(z* + βu) − F(z*))/β ∓ g` at the displacement `u`, `(B, ...)`."""
        size = per_sample(self.beta, u)
        z = self.problem.state + size * u
        return (self.problem.force(z) - self.problem.still) / size - sign * self.nudge(z)

    def run(self, sign: float, start: Tensor, correction: Map | None = None) -> Solution:
        """Solve the phase of that sign from `u = start`; `value` is the last state evaluated.

        **Arguments:** `correction`, what is subtracted from the force, a linear map of `u`.
        """

        def residual(u: Tensor) -> Tensor:
            drive = self.drive(sign, u)
            return drive if correction is None else drive - correction(u)

        return self.solve(residual, start, torch.ones_like(self.beta))

    def halved(self) -> Phases:
        """Return the phases of half the nudge, whose displacements keep the size of these."""
        return replace(self, beta=self.beta / 2)

    def solve(self, residual: Map, start: Tensor, scale: Tensor) -> Solution:
        """Drive any force of displacements to zero, to this object's tolerance times `scale`."""
        return self.problem.solve(
            residual,
            start,
            tol=self.tol,
            max_steps=self.max_steps,
            scale=scale,
            solver=self.solver,
            inverse=self.inverse,
        )


def response_beta(problem: Problem, adjoint: Tensor, response: float) -> Tensor:
    """Return the nudge, `(B,)`, at which `‖z^β − z*‖ = response ‖z*‖` if `‖z^β − z*‖ = β‖a‖`.

    A state at zero has no size to be relative to; it moves by `response` itself.
    """
    tiny = torch.finfo(adjoint.dtype).tiny
    size, state = sample_norm(adjoint), sample_norm(problem.state)
    beta = response * torch.where(state > 0, state, 1.0) / size.clamp_min(tiny)
    return torch.where(size > 0, beta, torch.full_like(beta, response))


def finest_response(like: Tensor) -> float:
    """Return the response at which round-off, `eps` over it, and the bias, its square, are small.

    The square root of `eps` in float32; 1e-6 in float64, where both are below 1e-9.
    """
    return max(float(torch.finfo(like.dtype).eps ** 0.5), 1e-6)


def contrast(phases: Phases, plus: Solution, sides: Sides) -> Adjoint:
    """Solve what is left after the positive phase, and return the adjoint read off all phases."""
    if sides == 1:
        return _read(phases, plus, None)
    minus = phases.run(-1.0, -plus.value)
    pair = _read(phases, plus, minus)
    if sides == 2:
        return pair
    near = phases.halved()
    # the displacements at half the nudge, but for what is of order β²
    up, down = 0.75 * plus.value - 0.25 * minus.value, 0.75 * minus.value - 0.25 * plus.value
    ends = near.run(1.0, up), near.run(-1.0, down)
    return extrapolate(_read(near, *ends), pair)


def extrapolate(near: Adjoint, far: Adjoint) -> Adjoint:
    """Return the adjoint without bias of order `β²`, from pairs at half the nudge and at the whole.

    The nudge and the response are the far pair's, the residual is the worse of the two pairs', and
    the round-off the near one's. What the phases leave can enter 5/3-fold, where a pair's enters
    once.
    """
    assert near.nudged_residuals is not None and far.nudged_residuals is not None
    assert near.residual is not None and far.residual is not None
    residuals = torch.cat([far.nudged_residuals, near.nudged_residuals])
    return replace(
        far,
        value=(4 * near.value - far.value) / 3,
        residual=torch.maximum(far.residual, near.residual),
        remainder=(4 * near.remainder - far.remainder) / 3,
        evaluations=near.evaluations + far.evaluations,
        result=worst(near.result, far.result),
        nudged_residuals=residuals,
        floor=near.floor,
    )


def _read(phases: Phases, plus: Solution, minus: Solution | None) -> Adjoint:
    """Return the adjoint read off the phases' states, with its certificate.

    With `minus=None` it is read off one side, whose bias is of order `β` instead of `β²`. The last
    force of each phase is known, so one nonlinear update of either state is free, and is made even
    where the phase's start was within the tolerance already; but not one that is too long for the
    phases' solver or for the adjoint (`step_on`). The certificate is the residual before it.
    """
    sides = [plus] if minus is None else [plus, minus]
    residuals = torch.stack([side.residual for side in sides])
    size = torch.stack([sample_norm(side.value) for side in sides]).amax(0)
    if minus is None:
        value, remainder = -plus.value, -plus.force
    else:
        value, remainder = (minus.value - plus.value) / 2, (minus.force - plus.force) / 2
    strides = [side.stride for side in sides if side.stride is not None]
    read = replace(
        plus,
        value=value,
        force=remainder,
        residual=residuals.amax(0),
        stride=torch.stack(strides).amin(0),
    )
    return Adjoint(
        value=step_on(read, phases.problem.widths, phases.problem.step),
        residual=read.residual,
        remainder=remainder,
        evaluations=sum(side.evaluations for side in sides),
        result=worst(*(side.result for side in sides)),
        beta=phases.beta,
        response=displacement(phases.beta, size, phases.problem),
        nudged_residuals=residuals,
    )


def displacement(beta: Tensor, size: Tensor, problem: Problem) -> Tensor:
    """Return `‖z^β − z*‖ / ‖z*‖`, `(B,)`, of displacements of norm `size` in units of `β`."""
    return beta * size / sample_norm(problem.state).clamp_min(torch.finfo(size.dtype).tiny)


def check_sides(name: str, sides: int) -> None:
    """Refuse anything but one side, a pair, or two pairs."""
    if sides not in get_args(Sides):
        raise ConfigError(
            f"{name}: sides is {sides!r}, expected 1 (one-sided), 2 (centred) or 4 (two pairs)"
        )

"""The two nudged phases that every contrastive estimator shares.

In units of the nudge, `z^{±β} = z* + β u±`, a phase solves `ψ±(u) = 0` with
`ψ±(u) = (F(z* + βu) − F(z*))/β − (correction of u) ∓ g`, and the adjoint is `a = (u⁻ − u⁺)/2`.
Working with `u` keeps a small nudge from drowning in `z*`; subtracting `F(z*)` keeps the free
phase's own residual out of it. Residuals are relative to the nudge, never to the state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from altprop.equilibrium.estimators.estimator import Adjoint, Problem
from altprop.equilibrium.solvers.solver import Result, Solution, per_sample, sample_norm

Map = Callable[[Tensor], Tensor]


def response_beta(problem: Problem, adjoint: Tensor, response: float) -> Tensor:
    """Return the nudge, `(B,)`, at which `‖z^β − z*‖ = response ‖z*‖` if `‖z^β − z*‖ = β‖a‖`."""
    tiny = torch.finfo(adjoint.dtype).tiny
    size = sample_norm(adjoint)
    beta = response * sample_norm(problem.state).clamp_min(tiny) / size.clamp_min(tiny)
    return torch.where(size > 0, beta, torch.full_like(beta, response))


def phase(
    problem: Problem,
    nudge: Tensor,
    beta: Tensor,
    start: Tensor,
    correction: Map | None,
    tol: float,
    max_steps: int,
    inverse: Map | None = None,
) -> Solution:
    """Solve one nudged phase from `u = start`, `(B, ...)`; `value` is the last state evaluated.

    **Arguments:** `nudge`, `±g`; `beta`, `(B,)`; `correction`, what is subtracted from the force, a
    linear map of `u`; `inverse`, of minus the phase's linear part, where the dynamics has it.
    """
    size = per_sample(beta, start)

    def residual(u: Tensor) -> Tensor:
        moved = (problem.force(problem.state + size * u) - problem.still) / size - nudge
        return moved if correction is None else moved - correction(u)

    scale = torch.ones_like(beta)
    return problem.solve(
        residual, start, tol=tol, max_steps=max_steps, scale=scale, inverse=inverse
    )


def contrast(plus: Solution, minus: Solution, beta: Tensor, problem: Problem) -> Adjoint:
    """Return the adjoint read off the two phases' states, with its certificate.

    The last force of each phase is known, so one nonlinear update of either state is free, and is
    made even where the phase's start was within the tolerance already. The certificate is the
    residual before that update.
    """
    worst = torch.maximum(plus.residual, minus.residual)
    size = torch.maximum(sample_norm(plus.value), sample_norm(minus.value))
    tiny = torch.finfo(size.dtype).tiny
    return Adjoint(
        value=(minus.value - plus.value + problem.step * (minus.force - plus.force)) / 2,
        residual=worst,
        remainder=(minus.force - plus.force) / 2,
        evaluations=0,
        result=worse(plus.result, minus.result),
        beta=beta,
        response=beta * size / sample_norm(problem.state).clamp_min(tiny),
    )


def worse(first: Result, second: Result) -> Result:
    """Return the worse of two outcomes."""
    order = (Result.CONVERGED, Result.FIXED_TIME, Result.MAX_STEPS, Result.NON_FINITE)
    return max(first, second, key=order.index)

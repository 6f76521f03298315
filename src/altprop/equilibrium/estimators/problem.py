"""What an estimator is given, an equilibrium's adjoint problem, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from altprop.equilibrium.dynamics.products import AbstractLinearisation
from altprop.equilibrium.dynamics.system import System
from altprop.equilibrium.levels import level_norms, solve_by_levels
from altprop.equilibrium.solvers.defect import defect_correction
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Force,
    Result,
    Solution,
    per_sample,
    scaled_norm,
    with_limits,
    with_stride,
)

Cost = Callable[[Tensor], Tensor]


@dataclass
class Certificate:
    """What one call of an `Equilibrium` measured; the backward pass fills in the adjoint's part.

    `free_residual`: `‖F‖/‖z‖` per sample at the state that is recorded, `(B,)`. `free_evaluations`:
    force evaluations of the free phase, the recorded one included. `result`: its outcome. `state`,
    `input`: `z*` and `x`, detached, `(B, ...)`. `adjoint_result`: how the backward
    pass's solve ended, None before it. `adjoint_residual`: of the linear problem, or of the nudged
    phases (AEP: of their contrast; the others: the worst of them), relative to the nudge, `(B,)`;
    in a layered system the worst level's, relative to what the unknown holds at that level.
    `adjoint_remainder`: the adjoint equation's residual as a vector, `(B, ...)`.
    `nudged_residuals`: each nudged phase's own, `(phases, B)`; None for an estimator without any.
    `antisymmetry`: `‖Jv − Jᵀv‖/‖Jv‖`, `(B,)`, along the adjoint, where the estimator has both
    products anyway: how wrong naive EP would be here. `adjoint_floor`: the round-off below which a
    contrast of phases tells nothing, relative to the nudge, `(1, B)`, or to the level's own adjoint
    in a layered system, `(levels, B)`; where it is above 1 the adjoint of that level is that of the
    linear problem alone. `adjoint_evaluations`: force, JVP and VJP products in the backward pass.
    `state_error`: `‖F‖/‖z‖ · ‖a‖/‖g‖`, `(B,)`, what the free phase has left, amplified as the
    cotangent is by the adjoint problem: the relative distance to the fixed point of the linearised
    force, along the adjoint. Where it is not small the state may be on its way elsewhere, such as
    past a fixed point that has just vanished, and the gradient is one of nothing, however small
    both residuals are. `beta`: the nudge per sample for a cotangent of unit norm, `(B,)`.
    `response`: `‖z^β − z*‖ / ‖z*‖`, `(B,)`. `system`: what was solved, for whoever evaluates its
    force later; None after `extend`.
    """

    result: Result
    free_residual: Tensor
    free_evaluations: int
    state: Tensor
    input: Tensor
    adjoint_result: Result | None = None
    adjoint_residual: Tensor | None = None
    adjoint_remainder: Tensor | None = None
    adjoint_evaluations: int = 0
    state_error: Tensor | None = None
    beta: Tensor | None = None
    response: Tensor | None = None
    nudged_residuals: Tensor | None = None
    antisymmetry: Tensor | None = None
    adjoint_floor: Tensor | None = None
    system: System | None = None

    def complete(self, adjoint: Adjoint, cotangent: Tensor) -> None:
        """Add what a backward pass measured from the cotangent `g`, `(B, ...)`."""
        size = scaled_norm(cotangent)
        amplified = torch.where(size == 0, 0.0, scaled_norm(adjoint.value) / size)
        self.state_error = self.free_residual * amplified
        self.adjoint_result = adjoint.result
        self.adjoint_residual = adjoint.residual
        self.adjoint_remainder = adjoint.remainder
        self.adjoint_evaluations += adjoint.evaluations
        self.beta, self.response = adjoint.beta, adjoint.response
        self.nudged_residuals = adjoint.nudged_residuals
        self.antisymmetry, self.adjoint_floor = adjoint.antisymmetry, adjoint.floor


@dataclass(frozen=True)
class Adjoint:
    """What an estimator returns: `value` is `a`, `(B, ...)`; the rest certifies it.

    The fields are those of `Certificate`. `residual` is None where nothing was measured; `floor` is
    its `adjoint_floor`.
    """

    value: Tensor
    residual: Tensor | None
    remainder: Tensor
    evaluations: int
    result: Result
    beta: Tensor | None = None
    response: Tensor | None = None
    nudged_residuals: Tensor | None = None
    antisymmetry: Tensor | None = None
    floor: Tensor | None = None


class Problem:
    """The adjoint problem of one call: the free state, and what can be computed there.

    **Fields:** `state`, `z*`, `(B, ...)`; `still`, `F(z*)`, what the free phase left; `step`, the
    dynamics' `ε`; `solver`, the module's own; `given()`, what the module gave out, where the
    cotangent was taken; `cost`, `C(z)` where the caller gave it; `widths`, where the state is a
    stack of levels, the numbers per sample that each holds.
    """

    def __init__(
        self,
        system: System,
        solver: AbstractSolver,
        state: Tensor,
        still: Tensor,
        linearised: Callable[[], AbstractLinearisation],
        given: Callable[[], Tensor],
        cost: Cost | None = None,
    ) -> None:
        self.state, self.still, self.solver = state, still, solver
        self.given, self.cost = given, cost
        self.step, self.widths = system.step, system.widths
        self._system, self._linearised = system, linearised

    def force(self, z: Tensor) -> Tensor:
        """Return `F(z; x)`, without recording."""
        return quietly(self._system.force, z)

    def linearise(self, at: Tensor | None = None) -> AbstractLinearisation:
        """Return the Jacobian's products at `z*`, or at another state."""
        with torch.autocast(self.state.device.type, enabled=False):
            return self._linearised() if at is None else self._system.linearise(at)

    def analytic(self, z: Tensor) -> Tensor:
        """Return `F(z; x)` continued to complex states; a `RuleError` says where there is none."""
        return quietly(self._system.analytic, z)

    def solve(
        self,
        force: Force,
        start: Tensor,
        *,
        tol: float,
        max_steps: int,
        scale: Tensor,
        solver: AbstractSolver | None = None,
        inverse: Force | None = None,
    ) -> Solution:
        """Drive a force to zero; each level by itself where there are levels.

        The solution says which step from it is worth taking; `step`, where it is the inverse's.

        **Arguments:** as those of a solver's `solve`, with its limits; `solver`, another one than
        the module's own; `inverse`, of minus the force's linear part, used where there is no
        `solver`.
        """
        own = with_limits(solver or self.solver, tol, max_steps)

        def attempt(force: Force, start: Tensor, inverse: Force | None) -> Solution:
            if inverse is None:
                return with_stride(
                    own.solve(force, start, step=self.step, scale=scale), own, self.step
                )
            found = defect_correction(
                force, inverse, start, tol=tol, max_steps=max_steps, scale=scale
            )
            return replace(found, stride=torch.full_like(found.residual, self.step))

        given = inverse if solver is None else None
        with torch.autocast(self.state.device.type, enabled=False):
            return solve_by_levels(attempt, force, start, given, tol, self.widths)


def step_on(found: Solution, widths: tuple[int, ...], step: float | None = None) -> Tensor:
    """Return `a + εr`, one more step of each sample that it does not carry too far, `(B, ...)`.

    A step that contracts has `ε‖g‖ = ε‖Jᵀa‖ ≤ 2‖a‖`, so it moves `a` by at most twice the residual,
    which is relative to `g` (and to `a` itself where there are levels). One that would move it
    further may amplify the very error that the residual certifies, and is not taken.

    **Arguments:** `found`, with `a` as its value and `r` as its force; `widths`, of the levels;
    `step`, the `ε` where the solver takes any (`None`: its own).
    """
    assert found.stride is not None
    stride = found.stride
    if step is not None:
        stride = torch.where(stride > 0, step, stride)
    moved = stride.unsqueeze(1) * level_norms(found.force, widths)
    allowed = 2 * found.residual.unsqueeze(1) * level_norms(found.value, widths)
    # a sample that is lost stays visible as NaN
    stride = stride.masked_fill((moved > allowed).any(1), 0.0)
    return found.value + per_sample(stride, found.value) * found.force


def quietly(force: Force, z: Tensor) -> Tensor:
    """Return a force at `z` without recording, in full precision."""
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        return force(z)

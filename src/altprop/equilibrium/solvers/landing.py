"""Where a module lands: a solve, one evaluation that is recorded, and what follows from it.

The force at a solution is known, so one more step is free where the solver says that it is worth
taking. The evaluation after it is the one that is recorded, and it tells whether the step was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Force,
    Result,
    Solution,
    conclude,
    per_sample,
    relative_residual,
    with_limits,
    with_stride,
)

# Another path through the same arithmetic (autograd's, a compiler's) may round otherwise, and no
# residual that is near the tolerance is worth a failure for that.
_ROUNDED = 2.0


@dataclass(frozen=True)
class Landing:
    """A state whose force was evaluated at last, and what the solve that led there needed.

    `state`, `force`: `(B, ...)`; the force carries autograd's record if the evaluation made one.
    `residual`: of that state, `(B,)`. `reached`: what the tolerance is held against, `(B,)`: that
    residual, or the solver's own of the very same state where the two differ by rounding. `stride`:
    the `ε` of a step from there that is worth taking, `(B,)`, 0 for none. `evaluations`, `result`:
    of it all. `apart`: whether the force was another one when it was recorded.
    """

    state: Tensor
    force: Tensor
    residual: Tensor
    reached: Tensor
    stride: Tensor
    evaluations: int
    result: Result
    apart: bool = False

    def value(self) -> Tensor:
        """Return what a module gives out, `(B, ...)`: the state, one step on where that is free."""
        return self.state + per_sample(self.stride, self.state) * self.force.detach()


def land(
    solver: AbstractSolver, force: Force, start: Tensor, *, step: float, record: Force | None = None
) -> Landing:
    """Solve, evaluate the force one step further, and see to the samples that are not solved there.

    One that the step carried out of the tolerance goes back to where the solver had it, and one
    that falls short is solved on; for either the force is evaluated, and recorded, once more. The
    solves together evaluate the force no more often than the solver's limit allows.

    **Arguments:** `force`, `start`, `step`, those of `solver.solve`; `record`, the force for the
    evaluation after a solve, which autograd may record (`None`: as the others).
    """
    found = with_stride(solver.solve(force, start, step=step), solver, step)
    assert found.stride is not None
    tol, evaluate = solver.tol, record or force
    stepped = found.stride > 0
    state = found.value + per_sample(found.stride, start) * found.force
    if not bool(stepped.all()):  # where no step is taken, an infinite force moves nothing either
        state = torch.where(per_sample(stepped, start), state, found.value)
    landing = _evaluate(found, state, found.stride, evaluate, tol)
    if tol == 0:
        return landing
    # one lost sample must not cost its batch-mates what is left
    amiss = ~(landing.residual <= tol) & torch.isfinite(found.residual)
    back = amiss & stepped & ~(landing.residual <= found.residual)
    left = solver.max_steps - found.evaluations
    short = amiss & ~(found.residual <= tol) if left >= 1 else torch.zeros_like(amiss)
    anew = back | short
    if not bool(anew.any()):
        return landing
    landing = replace(landing, force=landing.force.detach())  # what was recorded there is over
    nearest = torch.where(per_sample(back, start), found.value, landing.state)
    last = replace(found, value=nearest, evaluations=0)
    if bool(short.any()):
        again = with_limits(solver, tol, left).solve(force, nearest, step=step)
        # what had arrived stays, whatever its batch-mates need
        value = torch.where(per_sample(short, start), again.value, nearest)
        residual = torch.where(short, again.residual, found.residual)
        last = replace(again, value=value, residual=residual)
    # no step is known to be worth taking from where the last one was not
    second = _evaluate(last, last.value, found.stride.masked_fill(anew, 0.0), evaluate, tol)
    return replace(second, evaluations=landing.evaluations + second.evaluations)


def _evaluate(
    solution: Solution, state: Tensor, stride: Tensor, evaluate: Force, tol: float
) -> Landing:
    """Evaluate and judge the force where a solution, and a step `stride` from it, have led."""
    state = state.detach()
    force = evaluate(state)
    residual = relative_residual(force.detach(), state, None)
    same = stride == 0  # the very state that the solver evaluated
    near = same & (residual <= _ROUNDED * tol)
    reached = torch.where(near, torch.minimum(solution.residual, residual), residual)
    result = conclude(reached, tol)
    if result is not Result.CONVERGED and Result.NON_FINITE in (result, solution.result):
        result = Result.NON_FINITE
    elif tol == 0:
        result = solution.result
    apart = False
    if tol > 0:
        # what the step did, another would do again
        grows = residual.square() > solution.residual * residual.clamp_min(tol)
        stride = stride.masked_fill(grows, 0.0)
        moved = same & (solution.residual <= tol) & ~near & torch.isfinite(residual)
        apart = result is not Result.CONVERGED and bool(moved.any())
    spent = solution.evaluations + 1
    return Landing(state, force, residual, reached, stride, spent, result, apart)

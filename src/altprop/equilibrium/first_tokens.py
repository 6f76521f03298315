"""A causal window's first tokens before the others, where theirs are the slow modes.

Attention that averages gives token `t` a `t`-th of its own feedback, so the first few tokens have
the slowest modes, and they see none of the others. `AbstractDynamics.prefix` asks for it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from altprop.equilibrium.dynamics.driven import Driven
from altprop.equilibrium.estimators.problem import Problem, Products, quietly
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Force,
    Solution,
    relative_residual,
    sample_norm,
    worst,
)


def approach(solver: AbstractSolver, system: Driven, start: Tensor) -> tuple[Solution, Tensor]:
    """Approach the free state from `start`, `(B, ...)`, where it helps first tokens before all.

    The others then start displaced as the first ones were on average. An evaluation of a part of
    the window counts as that part of one.
    """
    force, step = partial(quietly, system.force), system.step
    first = system.first() if solver.piecewise and solver.tol > 0 else None
    if first is None:
        return solver.approach(force, start, step=step)
    k, T = first.x.shape[1], start.shape[1]
    head = solver.solve(partial(quietly, first.force), start[:, :k], step=step)
    moved = (head.value - start[:, :k]).mean(1, keepdim=True)
    start = torch.cat([head.value, start[:, k:] + moved], 1)
    found, ahead = solver.approach(force, start, step=step)
    spent = found.evaluations + math.ceil(head.evaluations * k / T)
    return replace(found, evaluations=spent), ahead


def solve_later_first(
    problem: Problem, products: Products, cotangent: Tensor, tol: float, max_steps: int
) -> Solution:
    """Solve the adjoint of the later tokens, then that of the first ones, which it drives.

    Of a causal dynamics `J` is block-lower-triangular over tokens: the later tokens' adjoint does
    not depend on the first ones', and these have a Jacobian of their own. An evaluation of a part
    of the window counts as that part of one.
    """
    assert problem.first is not None
    k, linearise = problem.first
    own, start = linearise(), problem.step * cotangent
    one = torch.ones_like(sample_norm(cotangent))  # the cotangent is unit or zero by contract

    def solve(force: Force, start: Tensor) -> Solution:
        limit = tol / math.sqrt(2)
        return problem.solve(force, start, tol=limit, max_steps=max_steps, scale=one)

    nothing = torch.zeros_like(start[:, :k])
    last: list[Tensor] = []

    def later(a: Tensor) -> Tensor:
        pulled = products.vjp(torch.cat([nothing, a], 1))
        last[:] = [a, pulled[:, :k] + cotangent[:, :k]]
        return pulled[:, k:] + cotangent[:, k:]

    tail = solve(later, start[:, k:])
    evaluations = tail.evaluations
    if not torch.equal(last[0], tail.value):  # the best state was not the last one
        later(tail.value)
        evaluations += 1
    driving = last[1]
    head = solve(lambda a: own.vjp(a) + driving, problem.step * driving)
    share = (head.evaluations + 1) * k / cotangent.shape[1]
    force = torch.cat([head.force, tail.force], 1)
    return Solution(
        value=torch.cat([head.value, tail.value], 1),
        force=force,
        residual=relative_residual(force, force, one),
        evaluations=evaluations + math.ceil(share),
        result=worst(head.result, tail.result),
    )

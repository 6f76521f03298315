"""Nudged phases solved at a given nudge: both as one system, judged by their contrast, or one.

With `u± = m ∓ a` the residuals `ψ±` of the two phases have the contrast `c = (ψ⁻ − ψ⁺)/2`, which
moves `a`, and the mean `s = (ψ⁺ + ψ⁻)/2`, which moves `m`. An error in `m` enters the contrast only
multiplied by the curvature, so `s` need only be as small as the square root of what `c` must be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from altprop.equilibrium.estimators.correction import Antisymmetric, antisymmetry
from altprop.equilibrium.estimators.nudge import Map
from altprop.equilibrium.estimators.phases import Phases, displacement
from altprop.equilibrium.estimators.problem import Adjoint, step_on
from altprop.equilibrium.estimators.roundoff import floor_of, loud
from altprop.equilibrium.levels import choose, level_norms, relative_to_levels, worst_level
from altprop.equilibrium.solvers.solver import (
    Result,
    Solution,
    conclude,
    per_sample,
    sample_norm,
    worst,
)


def solve_pair(
    phases: Phases, start: Tensor, correction: Antisymmetric | None, linear: Solution | None
) -> Adjoint:
    """Solve both phases until their contrast is within the tolerance, and read the adjoint.

    No state is moved, and no residual judged, by what is below the round-off; but where the linear
    problem was not solved and that is more than `√tol`, the nudge was too small to be seen, which
    is no success.

    **Arguments:** `start`, the first `a`, `(B, ...)`; `correction`, `u ↦ (J − Jᵀ)u` at the free
    state; `None` to linearise anew at the phases' mean, wherever it is; `linear`, the solution of
    `Jᵀ a + g = 0`, or `None` if nobody has solved it.
    """
    problem, widths = phases.problem, phases.problem.widths
    weight = phases.tol**0.5  # so that ‖(c, weight · s)‖ ≤ tol says ‖c‖ ≤ tol and ‖s‖ ≤ √tol
    floor = floor_of(problem, phases.beta)
    size = per_sample(phases.beta, start)
    measured: list[Tensor] = []
    calls = 0

    def shown(pair: Tensor) -> tuple[Tensor, Tensor]:
        """Return contrast and mean of the phases' residuals."""
        nonlocal calls
        calls += 1
        a, m = pair[:, 0], pair[:, 1] / weight
        if correction is None:
            products = problem.linearise(problem.state + size * m)
            forward, transposed = products.jvp(a), products.vjp(a)
            measured[:] = [antisymmetry(forward, transposed)]
            of_a, of_m = forward - transposed, products.jvp(m) - products.vjp(m)
        else:
            of_m, of_a = correction(m), correction(a)  # what it measures is its last
        plus = phases.drive(1.0, m - a) - (of_m - of_a)
        minus = phases.drive(-1.0, m + a) - (of_m + of_a)
        return (minus - plus) / 2, (plus + minus) / 2

    def residual(pair: Tensor) -> Tensor:
        c, s = shown(pair)
        return torch.stack([loud(c, floor, widths), weight * loud(s, floor, widths)], 1)

    def inverse(pair: Tensor) -> Tensor:
        assert phases.inverse is not None
        return torch.stack([phases.inverse(part) for part in pair.unbind(1)], 1)

    both = torch.stack([start, torch.zeros_like(start)], 1)
    solution = problem.solve(
        residual,
        both,
        tol=phases.tol,
        max_steps=phases.max_steps,
        scale=torch.ones_like(phases.beta),
        solver=phases.solver,
        inverse=None if phases.inverse is None else inverse,
    )
    a, (c, s) = solution.value[:, 0], (solution.force[:, 0], solution.force[:, 1] / weight)
    moved = solution.value[:, 1] / weight
    furthest = torch.maximum(sample_norm(moved - a), sample_norm(moved + a))
    again = lambda: shown(solution.value)[0]  # noqa: E731
    left, certified, result = _judge(phases, a, c, again, solution, linear)
    last = replace(solution, value=a, force=c, residual=certified)
    return Adjoint(
        value=step_on(last, widths, problem.step),
        residual=certified,
        remainder=left,
        # the correction counts its own products
        evaluations=(2 if correction is not None else 7) * calls,
        result=result,
        beta=phases.beta,
        response=displacement(phases.beta, furthest, problem),
        nudged_residuals=torch.stack([sample_norm(s - c), sample_norm(s + c)]),
        antisymmetry=measured[0] if measured else None,
        floor=relative_to_levels(floor, a, widths).mT,
    )


def solve_one(phases: Phases, start: Tensor, correction: Map, linear: Solution | None) -> Adjoint:
    """Solve the positive phase alone, and read the adjoint off it, with a bias of order `β`.

    Round-off is treated as in a pair.

    **Arguments:** `start`, the first `u`, `(B, ...)`; the others as of `solve_pair`.
    """
    problem, widths = phases.problem, phases.problem.widths
    floor = floor_of(problem, phases.beta)
    calls = 0

    def shown(u: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return phases.drive(1.0, u) - correction(u)

    solution = phases.solve(
        lambda u: loud(shown(u), floor, widths), start, torch.ones_like(phases.beta)
    )
    a, c = -solution.value, -solution.force
    again = lambda: -shown(solution.value)  # noqa: E731
    left, certified, result = _judge(phases, a, c, again, solution, linear)
    last = replace(solution, value=a, force=c, residual=certified)
    return Adjoint(
        value=step_on(last, widths, problem.step),
        residual=certified,
        remainder=left,
        evaluations=calls,  # the correction counts its own products
        result=result,
        beta=phases.beta,
        response=displacement(phases.beta, sample_norm(a), problem),
        nudged_residuals=sample_norm(c).unsqueeze(0),
        floor=relative_to_levels(floor, a, widths).mT,
    )


def _judge(
    phases: Phases,
    a: Tensor,
    c: Tensor,
    again: Callable[[], Tensor],
    solution: Solution,
    linear: Solution | None,
) -> tuple[Tensor, Tensor, Result]:
    """Return what is left of the adjoint's equation, its residual, `(B,)`, and the outcome.

    Below the round-off it is what the linear problem left where the phases moved nothing, and all
    that the phases show elsewhere.

    **Arguments:** `a`; `c`, what the phases show there above the round-off; `again()`, all of it.
    """
    widths = phases.problem.widths
    silent = level_norms(c, widths) == 0
    known = torch.zeros_like(silent)
    if linear is not None:
        stayed = level_norms(a - linear.value, widths) == 0
        known = silent & stayed & (linear.residual <= phases.tol).unsqueeze(1)
    left = c if bool((known | ~silent).all()) else choose(silent, again(), c, widths)
    if linear is not None:
        left = choose(known, linear.force, left, widths)
    hidden = worst_level(left, a, widths)
    result = worst(solution.result, conclude(hidden, phases.tol**0.5))
    return left, torch.maximum(solution.residual, hidden), result

"""Both nudged phases as one system, judged by their contrast.

With `u± = m ∓ a` the residuals `ψ±` of the two phases have the contrast `c = (ψ⁻ − ψ⁺)/2`, which
moves `a`, and the mean `s = (ψ⁺ + ψ⁻)/2`, which moves `m`. An error in `m` enters the contrast only
multiplied by the curvature, so `s` need only be as small as the square root of what `c` must be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altprop.equilibrium.estimators.correction import Antisymmetric, antisymmetry
from altprop.equilibrium.estimators.estimator import Adjoint
from altprop.equilibrium.estimators.phases import Phases, displacement
from altprop.equilibrium.estimators.roundoff import (
    choose,
    floor_of,
    level_norms,
    relative_to_levels,
)
from altprop.equilibrium.solvers.solver import (
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

    def loud(v: Tensor) -> Tensor:
        """Return `v` without the levels that are below the round-off."""
        return choose(level_norms(v, widths) <= floor, torch.zeros_like(v), v, widths)

    def residual(pair: Tensor) -> Tensor:
        c, s = shown(pair)
        return torch.stack([loud(c), weight * loud(s)], 1)

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
    silent = level_norms(c, widths) == 0
    value = a + problem.step * c
    if linear is None or not bool((linear.residual <= phases.tol).all()):
        left = choose(silent, shown(solution.value)[0], c, widths)
    else:
        left = choose(silent, linear.force, c, widths)
    hidden = sample_norm(left)
    certified = torch.where(hidden <= weight, solution.residual, hidden)
    return Adjoint(
        value=value,
        residual=certified,
        remainder=left,
        # the correction counts its own products
        evaluations=(2 if correction is not None else 7) * calls,
        result=worst(solution.result, conclude(certified, weight)),
        beta=phases.beta,
        response=displacement(phases.beta, furthest, problem),
        nudged_residuals=torch.stack([sample_norm(s - c), sample_norm(s + c)]),
        antisymmetry=measured[0] if measured else None,
        floor=relative_to_levels(floor, a, widths).mT,
    )

"""Asymmetric equilibrium propagation: nudged phases corrected by `(J − Jᵀ)`.

Reference: Scurria et al., arXiv 2602.03670. Linearised, a phase of `F(z) − (J − Jᵀ)(z − z*) ∓ βg`
settles where `Jᵀ d = ±βg`, so the contrast is the exact adjoint for any Jacobian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from altprop.equilibrium.estimators.correction import Antisymmetric, antisymmetry
from altprop.equilibrium.estimators.estimator import (
    AbstractEstimator,
    Adjoint,
    Problem,
    check_own_solver,
    solve_adjoint,
)
from altprop.equilibrium.estimators.nudge import Nudge, check_nudge, nudge_at
from altprop.equilibrium.estimators.phases import (
    Phases,
    Sides,
    check_sides,
    contrast,
    displacement,
    extrapolate,
    response_beta,
)
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    check_counts,
    check_fields,
    per_sample,
    sample_norm,
)
from altprop.errors import ConfigError

# The linear start is solved this much below the tolerance, so that curvature and round-off, which
# cancel in the contrast but not in either phase, do not carry a phase's first residual over it.
_HEADROOM = 0.5


@dataclass(frozen=True)
class AEP(AbstractEstimator):
    """Contrast the equilibria of `F(z) − (J − Jᵀ)(z − z*) ∓ βg = 0`: exact as `β → 0`.

    The phases are solved, not merely relaxed for a fixed time, and the correction is never
    clipped: at the nudged equilibrium it is as large as the force itself. With `start="adjoint"`
    the phases start from the solution of their linearisation, which changes where they start and
    not where they end; each makes at least one nonlinear update.

    **Arguments:** `beta`, the nudge for a cotangent of unit norm per sample (`None`: chosen so that
    the state moves by `response` relative to its norm; below 1e-5 float32's round-off dominates,
    above 1e-2 the bias of order `β²`); `response`; `tol`, the residual of a nudged phase relative
    to the nudge; `max_steps`, the limit of evaluations per phase; `start`, `"adjoint"` or `"zero"`;
    `linearise`, where `J` is taken: `"free"`, at `z*` once for both phases, or `"tracking"`, at the
    running mean of the two phases, which are then relaxed together and linearised anew at every
    evaluation (of the same order in `β`, several times dearer); `sides`, 2 for the centred pair,
    with a bias of order `β²`, 1 for the positive nudge against the free state, of order `β`, or 4
    for pairs at `±β` and `±β/2`, extrapolated to order `β⁴`, at up to twice the cost: for states
    that are small against the nudge, in float64 and with a `tol` below the bias, without which
    nothing is gained; `nudge`, `"linear"` (the constant cotangent) or `"cost"` (`∇C` at the nudged
    state, as a physical system would: call the module with `cost=`; both agree to first order);
    `solver`, of the phases and of the linear problem that they start from (`None`: the module's
    own).
    """

    beta: float | None = None
    response: float = 1e-3
    tol: float = 5e-3
    max_steps: int = 100
    start: Literal["adjoint", "zero"] = "adjoint"
    linearise: Literal["free", "tracking"] = "free"
    sides: Sides = 2
    nudge: Nudge = "linear"
    solver: AbstractSolver | None = None

    def __post_init__(self) -> None:
        if self.beta is not None:
            check_fields("AEP", beta=self.beta)
        check_fields("AEP", response=self.response, tol=self.tol)
        check_counts("AEP", max_steps=self.max_steps)
        if self.start not in ("adjoint", "zero"):
            raise ConfigError(f"AEP: start is {self.start!r}, expected 'adjoint' or 'zero'")
        if self.linearise not in ("free", "tracking"):
            raise ConfigError(
                f"AEP: linearise is {self.linearise!r}, expected 'free' or 'tracking'"
            )
        check_sides("AEP", self.sides)
        if self.linearise == "tracking" and self.sides == 1:
            raise ConfigError(
                "AEP: linearise='tracking' follows the mean of two phases, and sides=1 has one: "
                "write sides=2, or linearise='free'"
            )
        check_nudge("AEP", self.nudge)
        check_own_solver("AEP", self.solver)

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        correction = Antisymmetric(problem.linearise())
        remainder = None
        if self.start == "adjoint":
            linear = solve_adjoint(
                problem,
                correction.linear,
                cotangent,
                _HEADROOM * self.tol,
                self.max_steps,
                self.solver,
            )
            guess, first = linear.value, -linear.value
            evaluations = linear.evaluations + 1
            correction.know_vjp(first, cotangent - linear.force)  # Jᵀa + g is the solve's residual
            remainder = linear.force
        else:
            guess, first = problem.step * cotangent, torch.zeros_like(cotangent)
            evaluations = 1
        if self.beta is None:
            beta = response_beta(problem, guess, self.response)
        else:
            beta = torch.full_like(sample_norm(cotangent), self.beta)
        nudge = nudge_at("AEP", self.nudge, problem, cotangent)
        inverse = correction.linear.inverse(transposed=True)
        phases = Phases(problem, nudge, beta, self.tol, self.max_steps, self.solver, inverse)
        if self.linearise == "tracking":
            out = _track(phases, first)
            if self.sides == 4:
                out = extrapolate(_track(phases.halved(), -out.value), out)
        else:
            out = _contrast(phases, first, correction, self.sides)
        if remainder is not None:
            # what the phases leave is this and, of the same size, the rounding of their forces,
            # whose direction says nothing about the Jacobian to whoever looks along a remainder
            out = replace(out, remainder=remainder)
        return replace(out, evaluations=out.evaluations + evaluations)


def _contrast(phases: Phases, first: Tensor, correction: Antisymmetric, sides: Sides) -> Adjoint:
    """Solve one phase after the other, with `J` frozen at the free state."""
    out = contrast(phases, phases.run(1.0, first, correction), sides, correction)
    return replace(
        out,
        evaluations=out.evaluations + correction.evaluations,
        antisymmetry=correction.measure(),
    )


def _track(phases: Phases, first: Tensor) -> Adjoint:
    """Solve both phases as one system, with `J` at the mean of their states wherever they are.

    A sample's pair, `(B, 2, ...)`, is one sample to the solver, for the mean couples its halves.
    """
    problem = phases.problem
    size = per_sample(phases.beta, first)
    last: list[Tensor] = []

    def residual(pair: Tensor) -> Tensor:
        products = problem.linearise(problem.state + size * pair.mean(1))
        out = []
        for sign, u in zip((1.0, -1.0), pair.unbind(1), strict=True):
            forward, transposed = products.jvp(u), products.vjp(u)
            out.append(phases.drive(sign, u) - (forward - transposed))
        last[:] = [antisymmetry(forward, transposed)]
        return torch.stack(out, 1)

    def invert(pair: Tensor) -> Tensor:
        assert inverse is not None
        return torch.stack([inverse(u) for u in pair.unbind(1)], 1)

    inverse = phases.inverse  # at the free state, which is near enough to correct defects with
    both = None if inverse is None else replace(phases, inverse=invert)
    # the pair's nudge has the norm of both together
    scale = math.sqrt(2) * torch.ones_like(phases.beta)
    solution = (both or phases).solve(residual, torch.stack([first, -first], 1), scale)
    (plus, minus), (up, down) = solution.value.unbind(1), solution.force.unbind(1)
    remainder = (down - up) / 2
    moved = torch.maximum(sample_norm(plus), sample_norm(minus))
    return Adjoint(
        value=(minus - plus) / 2 + problem.step * remainder,
        residual=solution.residual,
        remainder=remainder,
        # two forces, a linearisation, two JVPs and two VJPs each
        evaluations=7 * solution.evaluations,
        result=solution.result,
        beta=phases.beta,
        response=displacement(phases.beta, moved, problem),
        nudged_residuals=torch.stack([sample_norm(up), sample_norm(down)]),
        antisymmetry=last[0],
    )

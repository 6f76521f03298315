"""Asymmetric equilibrium propagation: nudged phases corrected by `(J − Jᵀ)`.

Reference: Scurria et al., arXiv 2602.03670. Linearised, a phase of `F(z) − (J − Jᵀ)(z − z*) ∓ βg`
settles where `Jᵀ d = ±βg`, so the contrast is the exact adjoint for any Jacobian.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from altprop.equilibrium.estimators.confirm import confirm
from altprop.equilibrium.estimators.correction import Antisymmetric
from altprop.equilibrium.estimators.estimator import (
    WITHOUT_STEP,
    AbstractAdjointEstimator,
    check_own_solver,
    relaxes,
    solve_adjoint,
)
from altprop.equilibrium.estimators.nudge import Nudge, check_nudge, nudge_at
from altprop.equilibrium.estimators.pair import solve_one, solve_pair
from altprop.equilibrium.estimators.phases import (
    Phases,
    Sides,
    check_sides,
    extrapolate,
    finest_response,
    response_beta,
)
from altprop.equilibrium.estimators.problem import Adjoint, Problem
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Solution,
    check_counts,
    check_fields,
    sample_norm,
)
from altprop.errors import ConfigError

# The linear start is solved this much below the tolerance, so that what the phases add to it does
# not carry their contrast's residual over it.
_HEADROOM = 0.5


@dataclass(frozen=True)
class AEP(AbstractAdjointEstimator):
    """Contrast the equilibria of `F(z) − (J − Jᵀ)(z − z*) ∓ βg = 0`: exact as `β → 0`.

    What is judged is the contrast of the phases, not either phase: curvature is even in `β` and
    cancels in it, so a phase may be a few per cent from its equilibrium where the contrast is exact
    to a thousandth. The correction is never clipped: at the nudged equilibrium it is as large as
    the force itself. What a contrast shows at or below the round-off of the force (per sample, and
    per level of a layered system) is not taken for a signal.

    By default the phases start from the solution of their linearisation, each makes one nonlinear
    update (none where the solver takes no plain steps, or too long ones), and nothing iterates: the
    nudge is as small as rounding allows, and smaller for a sample whose curvature shows in the
    contrast. With `beta`, `response`, `start="zero"` or `tracking` given, the phases are solved at
    that very nudge, both together, until their contrast is within
    `tol` and each of them within `√tol`.

    **Arguments:** `beta`, the nudge for a cotangent of unit norm per sample (`None`: chosen so that
    the state moves by `response` relative to its norm); `response` (`None`: 3.5e-4 in float32, the
    square root of its epsilon, and 1e-6 in float64, where round-off and the bias of order `β²` are
    both small); `tol`, the residual of the contrast relative to the nudge; `max_steps`, the limit
    of evaluations per phase, and of the linear problem; `start`, `"adjoint"` or `"zero"`;
    `linearise`, where `J` is taken: `"free"`, at `z*` once for both phases, or `"tracking"`, at the
    running mean of the two phases, linearised anew at every evaluation (of the same order in `β`,
    several times dearer); `sides`, 2 for the centred pair, with a bias of order `β²`, 1 for the
    positive nudge against the free state, of order `β`, or 4 for pairs at `±β` and `±β/2`,
    extrapolated to order `β⁴`, at up to twice the cost; `nudge`, `"linear"` (the constant
    cotangent) or `"cost"` (`∇C` at the nudged state, as a physical system would: call the module
    with `cost=`; both agree to first order); `solver`, of the phases and of the linear problem that
    they start from (`None`: the module's own).
    """

    beta: float | None = None
    response: float | None = None
    tol: float = 5e-3
    max_steps: int = 100
    start: Literal["adjoint", "zero"] = "adjoint"
    linearise: Literal["free", "tracking"] = "free"
    sides: Sides = 2
    nudge: Nudge = "linear"
    solver: AbstractSolver | None = None

    def __post_init__(self) -> None:
        for name in ("beta", "response"):
            value = getattr(self, name)
            if value is not None:
                check_fields("AEP", **{name: value})
        check_fields("AEP", tol=self.tol)
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
        nudge = nudge_at("AEP", self.nudge, problem, cotangent)
        linear = self._linear(problem, correction, cotangent) if self.start == "adjoint" else None
        guess = problem.step * cotangent if linear is None else linear.value
        first = torch.zeros_like(cotangent) if linear is None else -linear.value
        if self.beta is None:
            beta = response_beta(problem, guess, self.response or finest_response(guess))
        else:
            beta = torch.full_like(sample_norm(cotangent), self.beta)
        inverse = correction.linear.inverse(transposed=True)
        phases = Phases(problem, nudge, beta, self.tol, self.max_steps, self.solver, inverse)
        chosen = self.beta is None and self.response is None and self.linearise == "free"
        if linear is None or not chosen:
            out = self._solve(phases, first, correction, linear)
        else:
            # Jᵀa + g is the solve's residual, so one of the correction's products is known
            across = correction.beside(first, cotangent - linear.force)
            out = confirm(phases, linear, first, across, self.sides)
            if linear.result and not out.result:
                # some samples' phases do not find what they were started from
                assert out.beta is not None
                looked = out.evaluations
                out = self._solve(replace(phases, beta=out.beta), first, correction, linear)
                out = replace(out, evaluations=looked + out.evaluations)
        spent = out.evaluations + correction.evaluations + 1
        antisymmetry = out.antisymmetry if out.antisymmetry is not None else correction.measure()
        if linear is None:
            return replace(out, evaluations=spent, antisymmetry=antisymmetry)
        # what the phases leave is this and, of the same size, the rounding of their forces, whose
        # direction says nothing about the Jacobian to whoever looks along a remainder
        return replace(
            out,
            evaluations=spent + linear.evaluations,
            antisymmetry=antisymmetry,
            remainder=linear.force,
        )

    def _solve(
        self, phases: Phases, first: Tensor, correction: Antisymmetric, linear: Solution | None
    ) -> Adjoint:
        """Solve the phases at their very nudge, from `∓first`."""
        if self.sides == 1:
            return solve_one(phases, first, correction, linear)
        frozen = None if self.linearise == "tracking" else correction
        out = solve_pair(phases, -first, frozen, linear)
        if self.sides == 2:
            return out
        return extrapolate(solve_pair(phases.halved(), out.value, frozen, linear), out)

    def _linear(self, problem: Problem, correction: Antisymmetric, cotangent: Tensor) -> Solution:
        """Solve the phases' linearisation, `Jᵀ a + g = 0`."""
        by_inverse = self.solver is None and correction.linear.inverse(transposed=True) is not None
        steps = relaxes(problem, self.solver) or by_inverse
        return solve_adjoint(
            problem,
            correction.linear,
            cotangent,
            _HEADROOM * self.tol * (1 if steps else WITHOUT_STEP),
            self.max_steps,
            self.solver,
        )

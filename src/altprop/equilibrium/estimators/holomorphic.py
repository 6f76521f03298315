"""Holomorphic equilibrium propagation: nudges on a circle in the complex plane.

Reference: Laborieux and Zenke, "Holomorphic Equilibrium Propagation Computes Exact Gradients
Through Finite Size Oscillations", NeurIPS 2022 (arXiv 2209.00530). The state is an analytic
function of the nudge, so by Cauchy's formula the mean of `(z^β − z*)/β` over `N` points of a circle
is its derivative at 0 up to the order `β^N`. With the correction `(J − Jᵀ)(z − z*)` of asymmetric
equilibrium propagation (arXiv 2602.03670) that derivative is the exact adjoint for any `J`.
"""

from __future__ import annotations

import cmath
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from altprop.equilibrium.estimators.correction import Antisymmetric
from altprop.equilibrium.estimators.estimator import (
    AbstractAdjointEstimator,
    check_own_solver,
    solve_adjoint,
)
from altprop.equilibrium.estimators.phases import displacement, response_beta
from altprop.equilibrium.estimators.problem import Adjoint, Problem, step_on
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Solution,
    check_counts,
    check_fields,
    per_sample,
    sample_norm,
    worst,
)
from altprop.errors import ConfigError, RuleError


@dataclass(frozen=True)
class HolomorphicEP(AbstractAdjointEstimator):
    """Average `−(z^β − z*)/β` over `points` nudges on a circle: no bias up to `radius^points`.

    So the nudge may be large, and round-off small: use it where the nudge cannot be small. A finite
    radius must stay within the disc on which the state is analytic: softmax, layer norm and GELU
    have singularities in the complex plane, and past the nearest one the mean is wrong or a phase
    has no solution. Conjugate nudges have conjugate states, so `points/2 + 1` phases are solved.
    The dynamics needs an analytic force; `points=2` is `AEP`'s centred pair, `points=1` its one
    side.

    **Arguments:** `points`, `N`; `radius`, the size of the nudge for a cotangent of unit norm per
    sample (`None`: chosen so that the state moves by `response` relative to its norm); `response`;
    `tol`, the residual of a nudged phase relative to the nudge; `max_steps`, the limit of
    evaluations per phase; `solver`, of the phases and of the linear problem that they start from
    (`None`: the module's own). Solvers see a complex state as pairs of real numbers.

    **Raises:** `RuleError` where the dynamics has no analytic force, or one that is not its force.
    """

    points: int = 8
    radius: float | None = None
    response: float = 1e-2
    tol: float = 1e-3
    max_steps: int = 100
    solver: AbstractSolver | None = None

    def __post_init__(self) -> None:
        check_counts("HolomorphicEP", points=self.points, max_steps=self.max_steps)
        if self.radius is not None:
            check_fields("HolomorphicEP", radius=self.radius)
        check_fields("HolomorphicEP", response=self.response, tol=self.tol)
        check_own_solver("HolomorphicEP", self.solver)
        if self.points > 2 and self.points % 2:
            raise ConfigError(
                f"HolomorphicEP: points is {self.points}, expected 1 or an even number"
            )

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        analytic = problem.analytic
        correction = Antisymmetric(problem.linearise())
        linear = solve_adjoint(
            problem, correction.linear, cotangent, self.tol, self.max_steps, self.solver
        )
        if self.radius is None:
            radius = response_beta(problem, linear.value, self.response)
            # a state at zero has no size to stay small against, and a norm's disc is small there
            at_zero = sample_norm(problem.state) == 0
            radius = torch.where(at_zero, self.response * radius, radius)
        else:
            radius = torch.full_like(sample_norm(cotangent), self.radius)
        still = analytic(torch.complex(problem.state, torch.zeros_like(problem.state)))
        _check_continues(problem, still.real)

        def phase(nudge: complex, start: Tensor) -> Solution:
            beta = per_sample(radius, cotangent) * nudge

            def residual(pair: Tensor) -> Tensor:
                u = torch.view_as_complex(pair)
                moved = (analytic(problem.state + beta * u) - still) / beta - cotangent
                # a real nudge has a real state; the real part last, for the certificate
                across = correction(u.imag) if nudge.imag else torch.zeros_like(u.imag)
                return torch.view_as_real(moved - torch.complex(correction(u.real), across))

            return problem.solve(
                residual,
                start,
                tol=self.tol,
                max_steps=self.max_steps,
                scale=torch.ones_like(radius),
                solver=self.solver,
            )

        # every phase is the linear solution up to the order of the nudge, so each starts from the
        # neighbour's end
        at = torch.view_as_real(
            torch.complex(-linear.value, torch.zeros_like(linear.value))
        ).contiguous()
        value = remainder = torch.zeros_like(cotangent)
        solutions = []
        for k in range(self.points // 2 + 1):
            real = 2 * k % self.points == 0
            nudge = complex(1 - 2 * (k > 0)) if real else cmath.exp(2j * cmath.pi * k / self.points)
            solution = phase(nudge, at)
            solutions.append(solution)
            at = solution.value
            # the mean over a conjugate pair is the real part, and the other half need no solve
            weight = (1 if real else 2) / self.points
            value = value - weight * solution.value[..., 0]
            remainder = remainder - weight * solution.force[..., 0]
        residuals = torch.stack([s.residual for s in solutions])
        read = replace(
            solutions[0],
            value=value,
            force=remainder,
            residual=residuals.amax(0),
            stride=torch.stack([s.stride for s in solutions if s.stride is not None]).amin(0),
        )
        moved = torch.stack([sample_norm(s.value) for s in solutions]).amax(0)
        return Adjoint(
            value=step_on(read, problem.widths, problem.step),
            residual=read.residual,
            remainder=remainder,
            # a complex force is counted as one evaluation
            evaluations=linear.evaluations
            + 2
            + sum(s.evaluations for s in solutions)
            + correction.evaluations,
            result=worst(*(s.result for s in solutions)),
            beta=radius,
            response=displacement(radius, moved, problem),
            nudged_residuals=residuals,
            antisymmetry=correction.measure(),
        )


def _check_continues(problem: Problem, still: Tensor) -> None:
    """Refuse what should be the force at the free state, `(B, ...)`, and is another one.

    (A sample that is lost tells nothing.)
    """
    off = problem.step * sample_norm(still - problem.still)
    allowed = torch.finfo(still.dtype).eps ** 0.5 * sample_norm(problem.state)
    if bool((off > allowed).any()):
        raise RuleError(
            f"the analytic force is not the force: at the free state they differ by "
            f"{float(off.nan_to_num().max()):.1e}; where methods or hooks were put on a dynamics, "
            "or a part of another kind, give it an analytic(z, x) that equals its forward(z, x) on "
            "real states, or write estimator=AEP()"
        )

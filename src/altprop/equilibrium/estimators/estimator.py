"""What an estimator is: from the cotangent of an equilibrium to its adjoint state.

With `F(z*; x, θ) = 0` and `L = C(z*)`, `dL/dθ = aᵀ ∂F/∂θ` and `dL/dx = aᵀ ∂F/∂x`, where
`Jᵀ a = −∇C`. So an estimator only has to produce `a`; one recorded evaluation of the force then
carries it to the parameters and the input, whatever the number of relaxation steps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from altprop.assign import assign_adjoint
from altprop.equilibrium.call import Call
from altprop.equilibrium.dynamics.products import AbstractLinearisation
from altprop.equilibrium.estimators.problem import Adjoint, Certificate, Problem
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Solution,
    per_sample,
    sample_norm,
    scaled_norm,
)
from altprop.errors import ConfigError, RuleError, refuse_subclass
from altprop.rule import AbstractRule, Scope, Seam
from altprop.transforms import has_tangent

WITHOUT_STEP = 0.4  # of the tolerance, for the error of a solve that a step follows


class AbstractEstimator(AbstractRule):
    """Base of every estimator, a frozen dataclass; most derive from `AbstractAdjointEstimator`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_subclass(
            cls,
            AbstractEstimator,
            "hold a {name} and call its adjoint, or derive from AbstractAdjointEstimator",
        )

    seam: ClassVar[Seam] = "adjoint"

    @property
    def takes(self) -> frozenset[str]:
        return frozenset({"maps", "blocks"})

    def plan(self, scope: Scope) -> None:
        scope.stack()

    @abstractmethod
    def attach(self, call: Call) -> Tensor:
        """Return the equilibrium `(B, ...)`, differentiable in the way of this estimator."""


class AbstractAdjointEstimator(AbstractEstimator):
    """Base of every estimator whose `adjoint` turns the cotangent `g` into the adjoint state `a`.

    `scaled`: whether it is given `g` at unit norm per sample, and what it returns is scaled back.
    """

    scaled: ClassVar[bool] = True

    @abstractmethod
    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        """Return `a` with `Jᵀ a = −g` as well as this estimator can.

        **Arguments:** `problem`, the free state and what can be computed there; `cotangent`, `g`
        scaled to unit norm per sample (or zero), `(B, ...)`.
        """

    def attach(self, call: Call) -> Tensor:
        free = call.free()
        certificate = Certificate(
            result=free.result,
            free_residual=free.residual,
            free_evaluations=free.evaluations,
            state=free.state,
            input=call.system.x.detach(),
        )
        call.report(certificate)
        call.settle(free.result, free.reached)
        value = free.value()
        if has_tangent(free.force):
            raise RuleError(
                f"{type(self).__name__} gives an equilibrium's gradient, and what was asked for is "
                "its forward-mode derivative (torch.func.jvp, a probe of GrAPE, or an estimator's "
                "phases around it): write estimator=BPTT() for this one, or Implicit() and "
                "AEP() with its own defaults around it"
            )
        if not free.force.requires_grad:
            return value

        def pull(cotangent: Tensor) -> Tensor:
            with call.problem(free) as problem:
                adjoint = self.pull(problem, cotangent)
            call.complete(certificate, adjoint, cotangent, self.tolerance())
            return adjoint.value

        return assign_adjoint(free.force, value, pull)

    def tolerance(self) -> float:
        """Return the residual that this estimator aims at, relative to the nudge."""
        return float(getattr(self, "tol", math.inf))

    def pull(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        """Return the adjoint of any cotangent: scale each sample to unit norm, and back.

        So neither the loss's reduction nor a loss scale touches the result, and a sample without
        a cotangent gets `a = 0`. An overflowed cotangent stays visible as NaN.
        """
        if not self.scaled:
            return self.adjoint(problem, cotangent)
        size = scaled_norm(cotangent)
        usable = torch.isfinite(size) & (size > 0)
        unit = torch.where(
            per_sample(usable, cotangent),
            cotangent / per_sample(size, cotangent),
            torch.zeros_like(cotangent),
        )
        adjoint = self.adjoint(problem, unit)
        undo = torch.where(usable, size, size - size)
        return replace(adjoint, value=adjoint.value * per_sample(undo, cotangent))


def relaxes(problem: Problem, solver: AbstractSolver | None) -> bool:
    """Return whether one more step is free after a solve, which shrinks an error about threefold.

    **Arguments:** `solver`, an estimator's own, or `None` for the module's.
    """
    return bool((solver or problem.solver).stride(problem.step))


def solve_adjoint(
    problem: Problem,
    products: AbstractLinearisation,
    cotangent: Tensor,
    tol: float,
    max_steps: int,
    solver: AbstractSolver | None = None,
) -> Solution:
    """Solve `Jᵀ a + g = 0` by VJPs; the solution's force is the remaining residual."""
    return problem.solve(
        lambda a: products.vjp(a) + cotangent,
        cotangent if problem.step == 1 else problem.step * cotangent,
        tol=tol,
        max_steps=max_steps,
        scale=torch.ones_like(sample_norm(cotangent)),  # unit or zero by contract
        solver=solver,
        inverse=products.inverse(transposed=True),
    )


def check_own_solver(name: str, solver: AbstractSolver | None) -> None:
    """Refuse what is no solver where an estimator may have its own."""
    if solver is not None and not isinstance(solver, AbstractSolver):
        raise ConfigError(
            f"{name}: solver is {solver!r}, expected a solver such as GMRES(), or None for the "
            "module's own"
        )

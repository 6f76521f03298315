"""What an estimator is: from the cotangent of an equilibrium to its adjoint state.

With `F(z*; x, θ) = 0` and `L = C(z*)`, `dL/dθ = aᵀ ∂F/∂θ` and `dL/dx = aᵀ ∂F/∂x`, where
`Jᵀ a = −∇C`. So an estimator only has to produce `a`; one recorded evaluation of the force then
carries it to the parameters and the input, whatever the number of relaxation steps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from altprop.assign import assign_adjoint
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Force,
    Result,
    Solution,
    land,
    per_sample,
    relative_residual,
    sample_norm,
    worst,
)
from altprop.errors import ConfigError
from altprop.rule import AbstractRule, Seam


class Products(Protocol):
    """The Jacobian's products at the free state."""

    tells_tokens: ClassVar[bool]

    def vjp(self, a: Tensor) -> Tensor: ...

    def jvp(self, v: Tensor) -> Tensor: ...

    def own_vjp(self, a: Tensor) -> Tensor: ...

    def inverse(self, *, transposed: bool) -> Force | None: ...


class System(Protocol):
    """The dynamics of one call, under its input, its further arguments and its random draws."""

    x: Tensor
    step: float

    def force(self, z: Tensor) -> Tensor: ...

    def linearise(self, z: Tensor) -> Products: ...

    def record(self, z: Tensor) -> Tensor: ...

    def samples(self, rows: Tensor) -> System | None: ...

    def extend(self, cache: Any, x: Tensor) -> Any: ...


@dataclass
class Certificate:
    """What one call of an `Equilibrium` measured; the backward pass fills in the adjoint's part.

    `free_residual`: `‖F‖/‖z‖` per sample at the state that is recorded, `(B,)`. `free_evaluations`:
    force evaluations of the free phase, the recorded one included. `result`: its outcome. `state`,
    `input`: `z*` and `x`, detached, `(B, ...)`. `adjoint_residual`: of the linear problem, or of
    the nudged phases (AEP: of their contrast; the others: the worst of them), relative to the
    nudge, `(B,)`; in a layered system the worst level's, relative to what the unknown holds at
    that level. `adjoint_remainder`: the adjoint equation's residual as a vector, `(B, ...)`.
    `nudged_residuals`: each nudged phase's own, `(phases, B)`; None for an estimator without any.
    `antisymmetry`: `‖Jv − Jᵀv‖/‖Jv‖`, `(B,)`, along the adjoint, where the estimator has both
    products anyway: how wrong naive EP would be here. `adjoint_floor`: the round-off below which a
    contrast of phases tells nothing, relative to the nudge, `(1, B)`, or to the level's own adjoint
    in a layered system, `(levels, B)`; where it is above 1 the adjoint of that level is that of the
    linear problem alone. `adjoint_evaluations`: force, JVP and VJP products in the backward pass.
    `beta`: the nudge per sample for a cotangent of unit norm, `(B,)`. `response`: `‖z^β − z*‖ /
    ‖z*‖`, `(B,)`. `system`: what was solved, for whoever evaluates its force later; None after
    `extend`.
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
    beta: Tensor | None = None
    response: Tensor | None = None
    nudged_residuals: Tensor | None = None
    antisymmetry: Tensor | None = None
    adjoint_floor: Tensor | None = None
    system: System | None = None


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


Solve = Callable[..., Solution]
Cost = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """What an estimator receives in the backward pass.

    `state`: `z*`, `(B, ...)`. `still`: `F(z*)`, what the free phase left. `step`: the dynamics'
    `ε`. `solver`: the module's own. `force`: `F(·; x)` without recording. `linearise()`: the
    Jacobian's products at `z*`, or at the state it is given. `solve(force, start, tol=…,
    max_steps=…, scale=…, solver=None, inverse=None)`: drive a force to zero by `solver` if there is
    one, else by the `inverse` of minus its linear part if there is one, else by the module's own
    solver; each level by itself where there are levels. `cost`: `C(z)` where the caller gave it.
    `analytic`: `F(·; x)` continued to complex states; a `RuleError` says where there is none.
    `first`: where the adjoint of a causal window's later tokens is to be solved before that of the
    first ones, their number and their own Jacobian. `widths`: where the state is a stack of levels,
    the numbers per sample that each holds.
    """

    state: Tensor
    still: Tensor
    step: float
    solver: AbstractSolver
    force: Force
    linearise: Callable[..., Products]
    solve: Solve
    cost: Cost | None = None
    analytic: Force | None = None
    first: tuple[int, Callable[[], Products]] | None = None
    widths: tuple[int, ...] = ()


@dataclass
class Site:
    """What one call of an `Equilibrium` offers to its estimator's `attach`.

    `force`: `F(·; x)`, recorded wherever autograd is on. `record`: the same, keeping what the
    linearisation there can use. `free_phase()`: approach the free state, as a solver's `approach`
    does; `resume(solver, z)`: solve on from `z`. `problems(z, F(z))`: what is to be solved at `z`,
    some samples after the other. `finish(certificate)`: hand over what was measured.
    `settle(result, residual, tol, what)`: raise, warn or accept, as the module was told.
    """

    x: Tensor
    start: Tensor
    step: float
    force: Force
    record: Force
    solver: AbstractSolver
    free_phase: Callable[[], tuple[Solution, Tensor]]
    resume: Callable[[AbstractSolver, Tensor], Solution]
    problems: Callable[[Tensor, Tensor], Iterator[Problem]]
    finish: Callable[[Certificate], None]
    settle: Callable[[Result, Tensor, float, str], None]


class AbstractEstimator(AbstractRule):
    """Base of every estimator: a frozen dataclass whose `adjoint` turns `g` into `a`."""

    seam: ClassVar[Seam] = "adjoint"
    records: ClassVar[bool] = False
    """Whether its gradient is autograd's own, of a relaxation that it records."""

    @abstractmethod
    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        """Return `a` with `Jᵀ a = −g` as well as this estimator can.

        **Arguments:** `problem`, the free state and what can be computed there; `cotangent`, `g`
        scaled to unit norm per sample (or zero), `(B, ...)`.
        """

    def attach(self, site: Site) -> Tensor:
        """Return the equilibrium `(B, ...)`, differentiable in the way of this estimator."""
        tol = site.solver.tol
        # the solver's next state is free, and the evaluation that is recorded there certifies it
        found = land(site.free_phase(), site.record, site.resume, site.solver)
        z, force, still = found.state, found.force, found.force.detach()
        certificate = Certificate(
            result=found.result,
            free_residual=found.residual,
            free_evaluations=found.evaluations,
            state=z,
            input=site.x.detach(),
        )
        site.finish(certificate)
        site.settle(found.result, found.reached, tol, "free phase")
        value = z + site.step * still
        if not force.requires_grad:
            return value

        def pull(cotangent: Tensor) -> Tensor:
            done, parts = 0, []
            for problem in site.problems(z, still):
                rows = slice(done, done + len(problem.state))
                parts.append(self.pull(problem, cotangent[rows]))
                done = rows.stop
            adjoint = join(parts)
            certificate.adjoint_result = adjoint.result
            certificate.adjoint_residual = adjoint.residual
            certificate.adjoint_remainder = adjoint.remainder
            certificate.adjoint_evaluations += adjoint.evaluations
            certificate.beta, certificate.response = adjoint.beta, adjoint.response
            certificate.nudged_residuals = adjoint.nudged_residuals
            certificate.antisymmetry = adjoint.antisymmetry
            certificate.adjoint_floor = adjoint.floor
            site.finish(certificate)  # a recomputation (checkpointing) has put its own in place
            if adjoint.residual is not None:
                site.settle(adjoint.result, adjoint.residual, self.tolerance(), "adjoint")
            return adjoint.value

        return assign_adjoint(force, value, pull)

    def tolerance(self) -> float:
        """Return the residual that this estimator aims at, relative to the nudge."""
        return float(getattr(self, "tol", math.inf))

    def pull(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        """Return the adjoint of any cotangent: scale each sample to unit norm, and back.

        So neither the loss's reduction nor a loss scale touches the result, and a sample without
        a cotangent gets `a = 0`. An overflowed cotangent stays visible as NaN.
        """
        size = sample_norm(cotangent)
        usable = torch.isfinite(size) & (size > 0)
        unit = torch.where(
            per_sample(usable, cotangent),
            cotangent / per_sample(size, cotangent),
            torch.zeros_like(cotangent),
        )
        adjoint = self.adjoint(problem, unit)
        undo = torch.where(usable, size, size - size)
        return replace(adjoint, value=adjoint.value * per_sample(undo, cotangent))


_BY_PHASE = ("nudged_residuals", "floor")  # samples on the last axis


def join(parts: list[Adjoint]) -> Adjoint:
    """Return the adjoint of a batch from those of its parts, in order.

    `evaluations` are those of the part that needed most of them.
    """
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {}
    for name in (field.name for field in fields(Adjoint)):
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], Tensor):
            joined[name] = torch.cat(values, dim=values[0].dim() - 1 if name in _BY_PHASE else 0)
        else:
            joined[name] = values[0]
    joined["evaluations"] = max(part.evaluations for part in parts)
    joined["result"] = worst(*(part.result for part in parts))
    return Adjoint(**joined)


def solve_adjoint(
    problem: Problem,
    products: Products,
    cotangent: Tensor,
    tol: float,
    max_steps: int,
    solver: AbstractSolver | None = None,
) -> Solution:
    """Solve `Jᵀ a + g = 0` by VJPs; the solution's force is the remaining residual."""
    if problem.first is not None and solver is None:
        return _later_tokens_first(problem, products, cotangent, tol, max_steps)
    return problem.solve(
        lambda a: products.vjp(a) + cotangent,
        cotangent if problem.step == 1 else problem.step * cotangent,
        tol=tol,
        max_steps=max_steps,
        scale=torch.ones_like(sample_norm(cotangent)),  # unit or zero by contract
        solver=solver,
        inverse=products.inverse(transposed=True),
    )


def _later_tokens_first(
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
    limits = {"tol": tol / math.sqrt(2), "max_steps": max_steps, "scale": one}
    nothing = torch.zeros_like(start[:, :k])
    last: list[Tensor] = []

    def later(a: Tensor) -> Tensor:
        pulled = products.vjp(torch.cat([nothing, a], 1))
        last[:] = [a, pulled[:, :k] + cotangent[:, :k]]
        return pulled[:, k:] + cotangent[:, k:]

    tail = problem.solve(later, start[:, k:], **limits)
    evaluations = tail.evaluations
    if not torch.equal(last[0], tail.value):  # the best state was not the last one
        later(tail.value)
        evaluations += 1
    driving = last[1]
    head = problem.solve(lambda a: own.vjp(a) + driving, problem.step * driving, **limits)
    share = (head.evaluations + 1) * k / cotangent.shape[1]
    force = torch.cat([head.force, tail.force], 1)
    return Solution(
        value=torch.cat([head.value, tail.value], 1),
        force=force,
        residual=relative_residual(force, force, one),
        evaluations=evaluations + math.ceil(share),
        result=worst(head.result, tail.result),
    )


def check_own_solver(name: str, solver: AbstractSolver | None) -> None:
    """Refuse what is no solver where an estimator may have its own."""
    if solver is not None and not isinstance(solver, AbstractSolver):
        raise ConfigError(
            f"{name}: solver is {solver!r}, expected a solver such as GMRES(), or None for the "
            "module's own"
        )

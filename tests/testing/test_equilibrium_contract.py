"""The contracts of solvers, estimators and dynamics each catch a part that has one fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import altprop as ap
from altprop.equilibrium.dynamics.products import AutogradLinearisation
from altprop.equilibrium.estimators.problem import Adjoint, Problem
from altprop.equilibrium.solvers.solver import (
    Force,
    check_solver_fields,
    conclude,
    per_sample,
    relative_residual,
)
from altprop.testing import check_dynamics, check_estimator, check_solver
from systems import SymmetricMemory, damped, worst


def test_a_solver_may_write_into_its_own_state() -> None:
    """AEP remembers products at a tensor, so it must notice when that tensor is written into."""
    check_solver(InPlace())
    this = damped(scale=0.5)
    got = this.gradients(ap.AEP(start="zero", tol=1e-8), solver=InPlace(tol=1e-9, max_steps=3000))
    assert worst(got, this.gradients()) <= 1e-5


@dataclass(frozen=True)
class InPlace(ap.AbstractSolver):
    """Euler on one buffer; the base of the broken solvers below."""

    step: float = 0.2
    max_steps: int = 120
    tol: float = 0.0

    def __post_init__(self) -> None:
        check_solver_fields(self)

    @torch.no_grad()
    def solve(
        self, force: Force, start: Tensor, *, step: float, scale: Tensor | None = None
    ) -> ap.Solution:
        z = start.clone()
        for n in range(self.max_steps + 1):
            f = force(z)
            residual = relative_residual(f, z, scale)
            moving = ~(residual <= self.tol) & residual.isfinite()
            if n == self.max_steps or not bool(moving.any()):
                break
            z.addcmul_(f, per_sample(self.step * moving.to(z), z))
        return ap.Solution(z, f, residual, n + 1, conclude(residual, self.tol))


def _recorded(solver: Broken, force: Force, start: Tensor, **how: Any) -> ap.Solution:
    def loud(z: Tensor) -> Tensor:
        with torch.enable_grad():
            return force(z).detach()

    return solver.right(loud, start, **how)


@torch.no_grad()
def _gives_up(solver: Broken, force: Force, start: Tensor, **how: Any) -> ap.Solution:
    if not bool(force(start).isfinite().all()):  # one lost sample ends it for all
        solver = replace(solver, max_steps=1)
    found = solver.right(force, start, **how)
    return replace(found, evaluations=found.evaluations + 1)


@torch.no_grad()
def _mixes_samples(solver: Broken, force: Force, start: Tensor, **how: Any) -> ap.Solution:
    found = replace(solver, tol=solver.tol / 2).right(force, start, **how)
    z = found.value + 1e-9 * found.value.nan_to_num().flip(0)
    f = force(z)
    residual = relative_residual(f, z, how.get("scale"))
    return replace(found, value=z, force=f, residual=residual, evaluations=found.evaluations + 1)


def _into_start(solver: Broken, force: Force, start: Tensor, **how: Any) -> ap.Solution:
    found = solver.right(force, start, **how)
    start.copy_(found.value)
    return found


def _without_scale(solver: Broken, force: Force, start: Tensor, **how: Any) -> ap.Solution:
    return solver.right(force, start, **{**how, "scale": None})


def _without_limit(solver: Broken, force: Force, start: Tensor, **how: Any) -> ap.Solution:
    return replace(solver, max_steps=solver.max_steps + 2).right(force, start, **how)


def _changing(change: Callable[[ap.Solution], dict[str, Any]]) -> Callable[..., ap.Solution]:
    def solve(solver: Broken, force: Force, start: Tensor, **how: Any) -> ap.Solution:
        found = solver.right(force, start, **how)
        return replace(found, **change(found))

    return solve


SOLVER_FAULTS: dict[str, tuple[Callable[..., ap.Solution], str]] = {
    "records": (_recorded, "while autograd records"),
    "gives up": (_gives_up, "batch with a hard and a NaN sample"),
    "mixes samples": (_mixes_samples, "differs from the same one alone"),
    "writes into start": (_into_start, "writes into start"),
    "without scale": (_without_scale, "reported residual"),
    "without limit": (_without_limit, "max_steps=3 makes 6"),
    "rosy residual": (_changing(lambda s: {"residual": s.residual / 2}), "reported residual"),
    "stale force": (_changing(lambda s: {"force": s.force * 1.5 + 1e-6}), "force at value"),
    "miscounts": (_changing(lambda s: {"evaluations": s.evaluations - 1}), "evaluations are"),
    "always content": (_changing(lambda s: {"result": ap.Result.CONVERGED}), "NON_FINITE"),
    "always worried": (_changing(lambda s: {"result": ap.Result.MAX_STEPS}), "no convergence"),
    "downcasts": (_changing(lambda s: {"value": s.value.float()}), "value is torch.float32"),
}


@dataclass(frozen=True)
class Broken(InPlace):
    """A solver that does everything right but for one fault."""

    fault: str = ""

    def right(self, force: Force, start: Tensor, **how: Any) -> ap.Solution:
        return super().solve(force, start, **how)

    def solve(self, force: Force, start: Tensor, **how: Any) -> ap.Solution:
        return SOLVER_FAULTS[self.fault][0](self, force, start, **how)


@pytest.mark.parametrize("fault", SOLVER_FAULTS)
def test_the_contract_of_solvers_catches(fault: str) -> None:
    with pytest.raises(AssertionError, match=SOLVER_FAULTS[fault][1]):
        check_solver(Broken(fault=fault))


@dataclass(frozen=True)
class Careless(InPlace):
    """A solver that solves well and then goes too far."""

    def stride(self, step: float) -> float:
        return 30 * step


@dataclass(frozen=True)
class Limitless(InPlace):
    """A solver that takes more steps than it may where what is left is little."""

    def solve(self, force: Force, start: Tensor, **how: Any) -> ap.Solution:
        own = self if self.max_steps > 3 else replace(self, max_steps=self.max_steps + 2)
        return InPlace.solve(own, force, start, **how)


@pytest.mark.parametrize(
    ("solver", "complaint"),
    [
        (Careless(), "a step on by its stride leads out of the tolerance"),
        (Limitless(), "max_steps=3 makes"),
    ],
)
def test_the_contract_of_solvers_catches_a_careless_landing(
    solver: ap.AbstractSolver, complaint: str
) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_solver(solver)


@dataclass(frozen=True)
class Unchecked(InPlace):
    def __post_init__(self) -> None:
        pass


@dataclass
class Mutable(InPlace.__bases__[0]):
    tol: float = 0.0
    max_steps: int = 10

    def solve(self, force: Force, start: Tensor, **how: Any) -> ap.Solution:
        raise NotImplementedError


def test_the_contract_of_solvers_catches_fields_that_nobody_checks() -> None:
    with pytest.raises(AssertionError, match="tol=-1.0 is accepted"):
        check_solver(Unchecked())
    with pytest.raises(AssertionError, match="frozen=True"):
        check_solver(Mutable())


@dataclass(frozen=True)
class Faulty(ap.AbstractAdjointEstimator):
    """Implicit differentiation but for one fault."""

    fault: str = ""

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        return ap.Implicit(tol=1e-9, max_steps=300).adjoint(problem, cotangent)

    def pull(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        right = super().pull(problem, cotangent)
        change = ESTIMATOR_FAULTS[self.fault][0]
        return replace(right, **change(right, problem, cotangent))


calls = 0


def _drifts(right: Adjoint, *_: Any) -> dict[str, Any]:
    global calls
    calls += 1
    return {"value": right.value * (1 + 1e-6 * calls)}


ESTIMATOR_FAULTS: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
    "too long": (lambda r, p, g: {"value": 1.01 * r.value}, "is not the loss's"),
    "a remainder": (lambda r, p, g: {"value": r.value + 1e-9}, "that multiple|a zero cotangent"),
    "nonlinear": (lambda r, p, g: {"value": r.value * (1 + 1e-6 * g.norm())}, "that multiple"),
    "mixes samples": (
        lambda r, p, g: {"value": r.value + 1e-6 * r.value.flip(0)},
        "a sample outside the loss gets a gradient",
    ),
    "counts nothing": (lambda r, p, g: {"evaluations": 0}, "reports no evaluations"),
    "has no remainder": (lambda r, p, g: {"remainder": None}, "has no adjoint_remainder"),
    "is lost": (lambda r, p, g: {"value": r.value / 0}, "is not finite"),
    "drifts": (_drifts, "do not add up|do not accumulate"),
    "": (lambda r, p, g: {}, ""),
}


@pytest.mark.parametrize("fault", [name for name in ESTIMATOR_FAULTS if name])
def test_the_contract_of_estimators_catches(fault: str) -> None:
    with pytest.raises(AssertionError, match=ESTIMATOR_FAULTS[fault][1]):
        check_estimator(Faulty(fault), exact=True)


def test_the_contract_of_estimators_catches_a_bias() -> None:
    with pytest.raises(AssertionError, match="is not the loss's"):
        check_estimator(ap.EP(), exact=True)


class Untransposed(SymmetricMemory):
    """Claims a symmetric Jacobian that it does not have."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return super().forward(z, x) + 0.1 * z.cumsum(-1)

    def linearise(self, z: Tensor, x: Tensor) -> ap.AbstractLinearisation:
        return _Same(super().linearise(z, x))


class _Same(ap.AbstractLinearisation):
    def __init__(self, inner: ap.AbstractLinearisation) -> None:
        self.jvp = inner.jvp

    def vjp(self, a: Tensor) -> Tensor:
        return self.jvp(a)

    def jvp(self, v: Tensor) -> Tensor:
        raise NotImplementedError


class Coupled(SymmetricMemory):
    """Normalises over the batch."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return super().forward(z - z.mean(0), x)


class Random(SymmetricMemory):
    """Drops entries anew at every call."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return super().forward(torch.nn.functional.dropout(z), x)


class Closed(SymmetricMemory):
    """Has an evaluation in closed form, with a fault in it or none."""

    fault = ""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return super().forward(z, x)

    def evaluate(self, z: Tensor, x: Tensor) -> ap.AbstractEvaluation:
        return _Evaluation(self, z, x)


class _Evaluation(ap.AbstractEvaluation):
    """By automatic differentiation, so that nothing but the fault is wrong."""

    def __init__(self, dynamics: Closed, z: Tensor, x: Tensor) -> None:
        self.sources = (x, *dynamics.parameters())
        self._fault = dynamics.fault
        with torch.enable_grad():
            self._z, self._x = z.clone().requires_grad_(), x.detach().clone().requires_grad_()
            self._force = dynamics(self._z, self._x)
        self._own = (self._x, *dynamics.parameters())
        self.jvp = AutogradLinearisation(lambda s: dynamics(s, x.detach()), z).jvp

    def force(self) -> Tensor:
        return self._force.detach() * (1.001 if self._fault == "force" else 1)

    def vjp(self, a: Tensor) -> Tensor:
        return torch.autograd.grad(self._force, self._z, a, retain_graph=True)[0]

    def jvp(self, v: Tensor) -> Tensor:
        raise NotImplementedError

    def pull(self, a: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = torch.autograd.grad(self._force, self._own, a, retain_graph=True)
        if self._fault == "gradient":
            rest[0] = rest[0] * 1.001
        return (None if self._fault == "loses" else x, *rest)


@pytest.mark.parametrize(
    ("kind", "fault", "message"),
    [
        (Closed, "force", "is not the force"),
        (Closed, "gradient", "a wrong gradient"),
        (Closed, "loses", "loses the gradient of x"),
        (Untransposed, "", "vjp is wrong"),
        (Coupled, "", "depends on the others"),
        (Random, "", "call to call"),
    ],
)
def test_the_contract_of_dynamics_catches(
    kind: type[SymmetricMemory], fault: str, message: str
) -> None:
    x = torch.randn(2, 3, 6).double()
    check_dynamics(Closed(6, 3).double(), x)
    dynamics = kind(6, 3).double()
    dynamics.fault = fault
    with pytest.raises(AssertionError, match=message):
        check_dynamics(dynamics, x)

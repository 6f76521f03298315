"""What a solver is: it drives a force to zero and says honestly how far it came.

Shapes: a state is `(B, ...)`; every norm, weight and decision belongs to one sample of the first
axis, so that batch-mates change nothing beyond rounding.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from altprop.errors import ConfigError, RuleError, refuse_subclass

Force = Callable[[Tensor], Tensor]


class Result(enum.Enum):
    """The outcome of a solve; the value is its message."""

    CONVERGED = "the force residual of every sample is within the tolerance"
    FIXED_TIME = "the stated number of steps was made; there was no tolerance to reach"
    MAX_STEPS = "the limit of steps was reached before the tolerance"
    NON_FINITE = "the state became infinite or NaN"

    def __bool__(self) -> bool:
        return self in (Result.CONVERGED, Result.FIXED_TIME)


@dataclass(frozen=True)
class Solution:
    """What a solve returns.

    `value`: the state, `(B, ...)`. `force`: the force at `value`, same shape. `residual`: `‖force‖`
    per sample relative to the solve's scale, `(B,)`. `evaluations`: calls of the force. `result`:
    the outcome of the worst sample. `stride`: the `ε` of one more step that is worth taking, `(B,)`
    (None: the solver's own), for a solver whose samples may have been solved in several ways.
    """

    value: Tensor
    force: Tensor
    residual: Tensor
    evaluations: int
    result: Result
    stride: Tensor | None = None


class AbstractSolver(ABC):
    """Base of every solver. A concrete one is a frozen dataclass with `tol` and `max_steps`.

    Those of this library are final.

    `tol`: the largest accepted residual per sample, relative to the scale of the solve; 0 asks for
    exactly `max_steps` steps, which then cannot fail to converge but only to stay finite.
    `max_steps`: the limit of force evaluations (at least 1). `linear`: whether it solves linear
    forces only, and refuses others with a `RuleError`. `repeatable`: whether the force must be,
    since evaluations are compared with each other.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_subclass(
            cls, AbstractSolver, "hold a {name} and call its solve, or derive from AbstractSolver"
        )

    linear: ClassVar[bool] = False
    repeatable: ClassVar[bool] = True
    tol: float
    max_steps: int

    @abstractmethod
    def solve(
        self,
        force: Force,
        start: Tensor,
        *,
        step: float,
        scale: Tensor | None = None,
    ) -> Solution:
        """Seek `z` with `force(z) = 0`, without recording for autograd.

        **Arguments:** `force`, from a state to the force of the same shape `(B, ...)`; `start`, the
        first state; `step`, the `ε` for which `z + ε force(z)` is the natural fixed-point map;
        `scale`, the size `(B,)` that residuals are relative to (default: the state's own norm).
        """

    def stride(self, step: float) -> float:
        """Return the `ε` of one more step `z + εF(z)` that is worth taking; 0 for none.

        The force at a solution is known, so the step is free, and the evaluation that is recorded
        after it certifies the state (see `land`). A solution may know better (`Solution.stride`).

        **Arguments:** `step`, the `ε` of the natural fixed-point map.
        """
        return 0.0

    def unroll(self, force: Force, start: Tensor, *, step: float) -> Tensor:
        """Return the last state of a relaxation that autograd can record step by step.

        **Arguments:** as those of `solve`.

        **Raises:** `RuleError` for a solver that is no plain relaxation.
        """
        raise RuleError(
            f"BPTT differentiates a stated relaxation, and {type(self).__name__} is none: "
            "write Equilibrium(..., solver=Euler(step=0.1, max_steps=120), estimator=BPTT())"
        )


def is_positive(value: Any) -> bool:
    """Return whether `value` is a finite number above 0."""
    return isinstance(value, Real) and math.isfinite(value) and float(value) > 0


def is_count(value: Any) -> bool:
    """Return whether `value` is a whole number, at least 1."""
    return isinstance(value, Integral) and int(value) >= 1


def check_fields(name: str, **fields: float) -> None:
    """Refuse numbers that are not positive, naming their owner and the field."""
    for field_name, value in fields.items():
        if not is_positive(value):
            raise ConfigError(f"{name}: {field_name} is {value!r}, expected a number > 0")


def check_counts(name: str, **fields: int) -> None:
    """Refuse counts that are not whole numbers, at least 1, naming their owner and the field."""
    for field_name, value in fields.items():
        if not is_count(value):
            raise ConfigError(
                f"{name}: {field_name} is {value!r}, expected a whole number, at least 1"
            )


def with_limits(solver: AbstractSolver, tol: float, max_steps: int) -> AbstractSolver:
    """Return a solver like this one with another tolerance and limit."""
    return replace(solver, tol=tol, max_steps=max_steps)  # type: ignore[type-var]


def check_solver_fields(solver: AbstractSolver) -> None:
    """Refuse limits that no solve can honour."""
    name = type(solver).__name__
    if not (is_positive(solver.tol) or solver.tol == 0):
        raise ConfigError(f"{name}: tol is {solver.tol!r}, expected a number ≥ 0, such as 1e-3")
    check_counts(name, max_steps=solver.max_steps)


def in_rows(z: Tensor) -> Tensor:
    """Return each sample as a row, `(B, ...) → (B, n)`; one number is a row too."""
    return z.flatten(1) if z.dim() > 1 else z.unsqueeze(1)


def sample_norm(z: Tensor) -> Tensor:
    """Return the Euclidean norm of each sample, `(B, ...) → (B,)`."""
    return torch.linalg.vector_norm(in_rows(z), dim=1)


def scaled_norm(z: Tensor) -> Tensor:
    """Return the same also where squares leave the range of numbers, and elsewhere to the bit."""
    norm, range_ = sample_norm(z), torch.finfo(z.dtype)
    safe = (norm > range_.tiny**0.5 / range_.eps) & torch.isfinite(norm)
    if not z.numel() or bool(safe.all()):
        return norm
    power = power_below(in_rows(z).abs().amax(1))
    return sample_norm(z / per_sample(power, z)) * power


def power_below(size: Tensor) -> Tensor:
    """Return the power of 2 just below each number: to scale by it is exact.

    It is 1 for what is 0 or not finite.
    """
    size = torch.where((size > 0) & torch.isfinite(size), size, 1.0)
    return size / (2 * torch.frexp(size).mantissa)


def per_sample(s: Tensor, z: Tensor) -> Tensor:
    """Return `s`, `(B,)`, shaped so that it multiplies `z`, `(B, ...)`, sample by sample."""
    return s.reshape(-1, *([1] * (z.dim() - 1)))


def relative_residual(force: Tensor, state: Tensor, scale: Tensor | None) -> Tensor:
    """Return `‖F‖ / scale` per sample, `(B,)`; the scale is `max(‖z‖, tiny)` unless given."""
    size = sample_norm(state) if scale is None else scale
    norm = sample_norm(force)
    # a state at 0 is far from converged, which is not the same as lost: inf / inf is NaN
    return norm / torch.maximum(size.clamp_min(torch.finfo(norm.dtype).tiny), 1e-30 * norm)


def conclude(residual: Tensor, tol: float) -> Result:
    """Return the outcome of a solve that ended with these residuals, `(B,)`.

    A tolerance of 0 asks for a fixed time and not for convergence.
    """
    if not bool(torch.isfinite(residual).all()):
        return Result.NON_FINITE
    if tol == 0:
        return Result.FIXED_TIME
    return Result.CONVERGED if bool((residual <= tol).all()) else Result.MAX_STEPS


def better_of(old: Solution, new: Solution) -> Solution:
    """Return the better state of each sample, and the sum of the evaluations."""
    # not `new < old`: a state that is lost must lose to any other
    better = (new.residual < old.residual) | ~torch.isfinite(old.residual)
    shaped = per_sample(better, old.value)
    stride = None
    if old.stride is not None and new.stride is not None:
        stride = torch.where(better, new.stride, old.stride)
    return Solution(
        value=torch.where(shaped, new.value, old.value),
        force=torch.where(shaped, new.force, old.force),
        residual=torch.where(better, new.residual, old.residual),
        evaluations=old.evaluations + new.evaluations,
        result=new.result,
        stride=stride,
    )


def with_stride(found: Solution, solver: AbstractSolver, step: float) -> Solution:
    """Return a solution that says which further step is worth taking from it.

    **Arguments:** `solver`, which found it; `step`, the `ε` of the natural fixed-point map.
    """
    if found.stride is not None:
        return found
    return replace(found, stride=torch.full_like(found.residual, solver.stride(step)))


@dataclass(frozen=True)
class Point:
    """Where an iteration stands, `(B, ...)`, and the best that each sample has seen, `(B, ...)`.

    `residual`, `least`: of `value` and of `best`, `(B,)`.
    """

    value: Tensor
    force: Tensor
    residual: Tensor
    best: Tensor
    best_force: Tensor
    least: Tensor


@torch.no_grad()
def iterate(
    force: Force,
    start: Tensor,
    propose: Callable[[Point], Tensor | None],
    *,
    tol: float,
    max_steps: int,
    scale: Tensor | None = None,
    latest: bool = False,
) -> Solution:
    """Go from state to state until each sample is within the tolerance; return its best state.

    A sample that converged or blew up stays where it is, and the others go on: no sample's result
    depends on its batch-mates.

    **Arguments:** `propose`, from where the iteration stands to the next states, or to `None` where
    there is nothing left to try; `max_steps`, the limit of force evaluations; `latest`, whether the
    last state counts and not the best one; the others are those of `AbstractSolver.solve`.
    """
    z, f = start, force(start)
    residual = relative_residual(f, z, scale)
    at = Point(z, f, residual, z, f, residual)
    evaluations = 1
    while evaluations < max_steps:
        moving = ~(at.least <= tol) & torch.isfinite(at.residual)
        count = int(moving.sum())
        ahead = propose(at) if count else None
        if ahead is None:
            break
        if count < len(z):
            ahead = torch.where(per_sample(moving, z), ahead, z)
        z = ahead
        f = force(z)
        evaluations += 1
        residual = relative_residual(f, z, scale)
        best, best_f, least = z, f, residual
        if not (latest or bool((better := residual < at.least).all())):
            shaped = per_sample(better, z)
            best = torch.where(shaped, z, at.best)
            best_f = torch.where(shaped, f, at.best_force)
            least = torch.where(better, residual, at.least)
        at = Point(z, f, residual, best, best_f, least)
    lost = ~torch.isfinite(at.residual) & ~(at.least <= tol)
    result = Result.NON_FINITE if bool(lost.any()) else conclude(at.least, tol)
    return Solution(at.best, at.best_force, at.least, evaluations, result)


def worst(*results: Result) -> Result:
    """Return the worst of several outcomes."""
    order = (Result.CONVERGED, Result.FIXED_TIME, Result.MAX_STEPS, Result.NON_FINITE)
    return max(results, key=order.index)

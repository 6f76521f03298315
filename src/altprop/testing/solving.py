"""The contract of a solver: it drives any force to zero, and says honestly how far it came."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from altprop.equilibrium.solvers.landing import land
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Force,
    Result,
    Solution,
    per_sample,
    relative_residual,
    sample_norm,
    with_limits,
    with_stride,
)
from altprop.errors import ConfigError, RuleError
from altprop.testing.contract import check_value, close, randn, require

LIMIT = 5000  # steps that any of the systems below may take, with room for small Euler steps


def check_solver(solver: AbstractSolver) -> None:
    """Check that `solver` keeps the contract of `AbstractSolver`.

    The systems are a contraction (which a solver of linear forces must refuse), one that rotates
    (eigenvalues `−1 ± 1.5i`, so a relaxation needs a step below 0.6) and a linear one with real
    eigenvalues; all have a known answer. `tol` and `max_steps` of the given value are replaced,
    everything else is used as it is.

    **Raises:** `AssertionError`, naming the promise that is broken.
    """
    check_value(solver)
    bad: list[tuple[str, Any]] = [("tol", v) for v in (-1.0, math.nan, math.inf)]
    for name, value in [*bad, ("max_steps", 0), ("max_steps", -3), ("max_steps", 2.5)]:
        try:
            replace(solver, **{name: value})  # type: ignore[type-var]
        except ConfigError:
            continue
        require(False, f"{name}={value} is accepted, expected a ConfigError")
    for dtype, tol in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
        for system in (_contraction(dtype), _rotation(dtype), _damping(dtype)):
            if system.linear or not solver.linear:
                _check_solution(with_limits(solver, tol, LIMIT), system, tol)
                _check_landing(with_limits(solver, tol, LIMIT), system, tol)
            else:
                _check_refusal(solver, system)
    _check_independence(solver)
    _check_limits(solver)


@dataclass(frozen=True)
class _System:
    """A force with a known root; `step` is its natural step, `slack` bounds `‖J⁻¹‖`.

    `linear`: whether the force is.
    """

    name: str
    force: Force
    start: Tensor
    root: Tensor
    step: float
    slack: float
    linear: bool = True


def _contraction(dtype: torch.dtype) -> _System:
    """`F(z) = 0.6 tanh(zQ) + b − z` with an orthogonal `Q`, and `b` such that a known `z*` fits."""
    generator = torch.Generator().manual_seed(1)
    like = torch.empty(0, dtype=dtype)
    q = torch.linalg.qr(randn((6, 6), generator, like)).Q
    root = randn((3, 2, 6), generator, like)  # (B, T, C): norms run over all but the first axis
    b = root - 0.6 * torch.tanh(root @ q)
    start = randn(root.shape, generator, like)
    return _System(
        "a contraction", lambda z: 0.6 * torch.tanh(z @ q) + b - z, start, root, 1.0, 2.5, False
    )


def _linear(
    name: str, jacobian: Tensor, root: Tensor, start: Tensor, step: float, slack: float
) -> _System:
    return _System(name, lambda z: (z - root) @ jacobian.T, start, root, step, slack)


def _rotation(dtype: torch.dtype) -> _System:
    """`F(z) = J(z − z*)` with three rotating planes, `J = −1 ± 1.5i`."""
    generator = torch.Generator().manual_seed(2)
    turn = torch.tensor([[-1.0, -1.5], [1.5, -1.0]], dtype=dtype)
    root, start = (randn((3, 6), generator, turn) for _ in range(2))
    return _linear("a rotating system", torch.block_diag(turn, turn, turn), root, start, 0.5, 1.0)


def _damping(dtype: torch.dtype) -> _System:
    """`F(z) = −Q diag(0.3 … 2) Qᵀ (z − z*)`."""
    generator = torch.Generator().manual_seed(3)
    like = torch.empty(0, dtype=dtype)
    q = torch.linalg.qr(randn((6, 6), generator, like)).Q
    jacobian = -(q * torch.linspace(0.3, 2, 6, dtype=dtype)) @ q.T
    root, start = (randn((3, 6), generator, like) for _ in range(2))
    return _linear("a linear system", jacobian, root, start, 0.5, 1 / 0.3)


class _Counted:
    """The force of a system, which counts its calls and wants none of them recorded."""

    def __init__(self, system: _System) -> None:
        self._force = system.force
        self._start, self._before = system.start, system.start.clone()
        self._weight = torch.ones((), dtype=system.start.dtype, requires_grad=True)
        self.calls = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        out = self._weight * self._force(z)
        require(not out.requires_grad, "the solver calls the force while autograd records")
        return out

    def check_start(self, where: str) -> None:
        same = torch.equal(self._start, self._before)
        require(same, f"the solver writes into start {where}")


def _check_solution(solver: AbstractSolver, system: _System, tol: float) -> None:
    size = torch.full((len(system.start),), 50.0, dtype=system.start.dtype)
    for scale in (None, size):
        counted = _Counted(system)
        found = solver.solve(counted, system.start, step=system.step, scale=scale)
        where = f"on {system.name} in {system.start.dtype}"
        require(
            found.result is Result.CONVERGED,
            f"no convergence {where}: {found.result.value}, residual {found.residual.max():.3g}",
        )
        _check_honest(counted, found, system, scale, where)
        require(bool((found.residual <= tol).all()), f"converged above the tolerance {where}")
        _check_distance(found.value, system, tol, scale, where)


def _check_honest(
    counted: _Counted, found: Solution, system: _System, scale: Tensor | None, where: str
) -> None:
    """Check that what a solution says of its value is so."""
    counted.check_start(where)
    require(
        counted.calls == found.evaluations,
        f"{found.evaluations} evaluations are reported and {counted.calls} were made {where}",
    )
    start = system.start
    for name in ("value", "force", "residual"):
        part = getattr(found, name)
        require(not part.requires_grad, f"{name} is recorded for autograd {where}")
        require(part.dtype == start.dtype, f"{name} is {part.dtype} {where}")
    require(found.value.shape == start.shape, f"value is {found.value.shape} {where}")
    require(found.residual.shape == start.shape[:1], f"residual must be (B,) {where}")
    again = system.force(found.value)
    # the root is where both vanish: compare on the scale of the state
    size = float(sample_norm(found.value).max())
    eps = 50 * torch.finfo(start.dtype).eps
    require(
        bool(((found.force - again).abs() <= eps * size).all()),
        f"force is not the force at value {where}",
    )
    residual = relative_residual(again, found.value, scale)
    require(
        bool(((found.residual - residual).abs() <= 1e-3 * residual + eps).all()),
        f"the reported residual {found.residual} is not that of value, {residual}, {where}",
    )


def _check_distance(
    z: Tensor, system: _System, tol: float, scale: Tensor | None, where: str
) -> None:
    size = sample_norm(z)
    allowed = tol * system.slack * (size if scale is None else scale)
    error = sample_norm(z - system.root)
    eps = 50 * torch.finfo(z.dtype).eps
    require(
        bool((error <= 1.1 * allowed + eps * float(size.max())).all()),
        f"value is {error} from the known root {where}, allowed {allowed}",
    )


def _check_landing(solver: AbstractSolver, system: _System, tol: float) -> None:
    """Check what a module does: solve, evaluate the force a step further, go on if need be."""
    counted = _Counted(system)
    with torch.no_grad():
        found = land(solver, counted, system.start, step=system.step)
    where = f"after a landing on {system.name} in {system.start.dtype}"
    require(found.result is Result.CONVERGED, f"no convergence {where}: {found.result.value}")
    require(bool((found.reached <= tol).all()), f"converged above the tolerance {where}")
    require(
        found.evaluations == counted.calls,
        f"{found.evaluations} evaluations are reported and {counted.calls} were made {where}",
    )
    _check_distance(found.state, system, tol, None, where)
    end = with_stride(
        solver.solve(system.force, system.start, step=system.step), solver, system.step
    )
    assert end.stride is not None
    ahead = end.value + per_sample(end.stride, end.value) * end.force
    require(
        bool((relative_residual(system.force(ahead), ahead, None) <= 1.1 * tol).all()),
        f"a step on by its stride leads out of the tolerance {where}",
    )


def _check_refusal(solver: AbstractSolver, system: _System) -> None:
    try:
        with_limits(solver, 1e-8, LIMIT).solve(system.force, system.start, step=system.step)
    except RuleError:
        return
    require(False, f"a solver of linear forces takes {system.name}, expected a RuleError")


def _check_independence(solver: AbstractSolver) -> None:
    """Solve four samples together and alone: easy, hard, easy and one that is NaN."""
    generator = torch.Generator().manual_seed(4)
    like = torch.empty(0, dtype=torch.float64)
    q = torch.linalg.qr(randn((4, 6, 6), generator, like)).Q
    rates = torch.stack([torch.linspace(low, 1.2, 6).double() for low in (0.8, 0.05, 0.6, 0.7)])
    jacobian = -(q * rates.unsqueeze(1)) @ q.transpose(1, 2)
    b, start = (randn((4, 6), generator, like) for _ in range(2))
    b[3] = math.nan

    def force_of(samples: list[int]) -> Force:
        return lambda z: torch.einsum("bij,bj->bi", jacobian[samples], z) + b[samples]

    tight = with_limits(solver, 1e-8, LIMIT)
    whole = list(range(4))
    together = tight.solve(force_of(whole), start, step=1.0)
    landed = land(tight, force_of(whole), start, step=1.0)
    for result in (together.result, landed.result):
        require(
            result is Result.NON_FINITE,
            f"one sample is NaN and the result is {result.name}, expected NON_FINITE",
        )
    for i in (0, 1, 2):
        alone = tight.solve(force_of([i]), start[[i]], step=1.0)
        require(bool(alone.result), f"a sample with rates down to {rates[i, 0]} is not solved")
        own = land(tight, force_of([i]), start[[i]], step=1.0)
        what = f"sample {i} of a batch with a hard and a NaN sample differs from the same one alone"
        close(together.value[[i]], alone.value, 1e-10, what)
        close(landed.state[[i]], own.state, 1e-10, f"after a landing {what}")


def _check_limits(solver: AbstractSolver) -> None:
    system = _damping(torch.float64)

    def run(force: Force, tol: float, max_steps: int) -> Solution:
        return with_limits(solver, tol, max_steps).solve(force, system.start, step=system.step)

    early = run(system.force, 1e-14, 3)
    require(
        early.result is Result.MAX_STEPS,
        f"3 steps to 1e-14 end with {early.result.name}, expected MAX_STEPS",
    )
    require(early.evaluations <= 4, f"max_steps=3 makes {early.evaluations} evaluations")
    require(bool((early.residual > 1e-14).all()), "a residual below tol with MAX_STEPS")
    for tol, limit in ((1e-14, 3), (0.0, 7)):
        counted = _Counted(system)
        with torch.no_grad():
            land(with_limits(solver, tol, limit), counted, system.start, step=system.step)
        require(
            counted.calls <= limit + 2,
            f"max_steps={limit}, tol={tol:g} makes {counted.calls} evaluations until it lands",
        )
    fixed = run(system.force, 0.0, 7)
    require(
        fixed.result is Result.FIXED_TIME,
        f"tol=0 ends with {fixed.result.name}, expected FIXED_TIME",
    )
    require(fixed.evaluations in (7, 8), f"tol=0, max_steps=7 makes {fixed.evaluations} calls")
    for tol in (0.0, 1e-6):
        lost = run(lambda z: torch.full_like(z, math.nan), tol, 20)
        require(
            lost.result is Result.NON_FINITE,
            f"a NaN force with tol={tol} ends with {lost.result.name}, expected NON_FINITE",
        )

"""A module whose output is an equilibrium: `Equilibrium(dynamics, solver, estimator)`.

The free phase is solved without recording. One recorded evaluation of the force then certifies the
state and, in the backward pass, carries the estimator's adjoint to parameters and input.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from altprop.equilibrium.dynamics import AbstractDynamics
from altprop.equilibrium.estimators.aep import AEP
from altprop.equilibrium.estimators.estimator import (
    AbstractEstimator,
    Certificate,
    Cost,
    Problem,
    Site,
)
from altprop.equilibrium.solvers.anderson import Anderson
from altprop.equilibrium.solvers.solver import AbstractSolver, Force, Result, Solution
from altprop.errors import ConfigError, ConvergenceError

OnFailure = Literal["raise", "warn", "accept"]


class Equilibrium(nn.Module):
    """Return the equilibrium of a dynamics, and give it an estimator's gradient.

    `block(x)` solves `F(z; x) = 0` and returns `z*`; `.backward()` through it is the estimator's.
    Training, evaluation and generation use this same definition of the state. Everything inside
    runs in float32 or float64 whatever the autocast state, for bf16's round-off is as large as a
    nudge. Memory does not depend on the number of relaxation steps (except under `BPTT`).

    **Arguments:** `dynamics`; `solver`, of the free phase, whose kind also solves the estimator's
    phases; `estimator`; `on_failure`, what to do when a solve misses its tolerance even after one
    more attempt from where it stopped: `"raise"` a `ConvergenceError`, `"warn"`, or `"accept"`.
    `certificate` holds what the last call measured.

    **Shapes:** `x` is `(B, ...)`, and so is the result; samples never interact.

    Sources: mathematics of the adjoint, Bai et al. 2019 and Scurria et al. (arXiv 2602.03670).
    """

    certificate: Certificate | None

    def __init__(
        self,
        dynamics: AbstractDynamics,
        solver: AbstractSolver | None = None,
        estimator: AbstractEstimator | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        self.dynamics = _expect(dynamics, AbstractDynamics, "dynamics", "GatedBlock(128, heads=4)")
        self.solver = _expect(solver or Anderson(), AbstractSolver, "solver", "Anderson()")
        self.estimator = _expect(estimator or AEP(), AbstractEstimator, "estimator", "AEP()")
        if on_failure not in ("raise", "warn", "accept"):
            raise ConfigError(f"on_failure is {on_failure!r}, expected 'raise', 'warn' or 'accept'")
        self.on_failure: OnFailure = on_failure
        self.certificate = None

    def forward(self, x: Tensor, *, cost: Cost | None = None) -> Tensor:
        """Return the equilibrium `z*` under input `x`, both `(B, ...)`.

        **Arguments:** `cost`, `z ↦ C(z)` (a scalar), for estimators that nudge with the cost's own
        gradient; it must be the loss that is differentiated afterwards.

        **Raises:** `ConvergenceError` as `on_failure` says; `ConfigError` for an input in half
        precision outside autocast.
        """
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.float()
        if not x.is_floating_point() or torch.finfo(x.dtype).bits < 32:
            raise ConfigError(
                f"Equilibrium was given {x.dtype}: its nudges are smaller than that precision's "
                "round-off; keep the block in float32 and use torch.autocast around the model"
            )
        with torch.autocast(kind, enabled=False):
            return self.estimator.attach(self._site(x, cost))

    def _site(self, x: Tensor, cost: Cost | None) -> Site:
        start = self.dynamics.start(x)

        def quiet(z: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                return self.dynamics(z, x)

        def solve(
            force: Force, start: Tensor, *, tol: float, max_steps: int, scale: Tensor
        ) -> Solution:
            with torch.autocast(x.device.type, enabled=False):
                solver = replace(self.solver, tol=tol, max_steps=max_steps)
                return _persist(solver, force, start, self.dynamics.step, scale)

        def problem(z: Tensor, still: Tensor) -> Problem:
            def linearise() -> Any:
                with torch.autocast(x.device.type, enabled=False):
                    return self.dynamics.linearise(z, x)

            return Problem(z, still, self.dynamics.step, quiet, linearise, solve, cost)

        def finish(certificate: Certificate) -> None:
            self.certificate = certificate

        return Site(
            x=x,
            start=start,
            step=self.dynamics.step,
            force=lambda z: self.dynamics(z, x),
            solver=self.solver,
            free_phase=lambda: _persist(
                self.solver, quiet, start.detach(), self.dynamics.step, None
            ),
            problem=problem,
            finish=finish,
            settle=self._settle,
        )

    def _settle(self, result: Result, residual: Tensor, tol: float, what: str) -> None:
        if result or self.on_failure == "accept":
            return
        text = (
            f"{what}: {result.value} (worst residual {float(residual.max()):.2e}, tolerance "
            f"{tol:.0e}); raise max_steps or tol, stabilise the dynamics (JacobianHinge), or pass "
            "on_failure='accept' and check certificate"
        )
        if self.on_failure == "raise":
            raise ConvergenceError(text)
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        # what was measured in one process is no part of the module that is copied or pickled
        return {**super().__getstate__(), "certificate": None}

    def extra_repr(self) -> str:
        return f"solver={self.solver}, estimator={self.estimator}, on_failure={self.on_failure!r}"


def equilibria(model: nn.Module) -> Iterator[tuple[str, Equilibrium]]:
    """Yield every `Equilibrium` in `model` with its path."""
    for path, module in model.named_modules():
        if isinstance(module, Equilibrium):
            yield path, module


@contextmanager
def using(
    model: nn.Module,
    estimator: AbstractEstimator | None = None,
    solver: AbstractSolver | None = None,
    on_failure: OnFailure | None = None,
) -> Iterator[None]:
    """Run the equilibria of `model` with another estimator, solver or policy for a while."""
    before = [(m, m.estimator, m.solver, m.on_failure) for _, m in equilibria(model)]
    try:
        for module, *_ in before:
            module.estimator = estimator or module.estimator
            module.solver = solver or module.solver
            module.on_failure = on_failure or module.on_failure
        yield
    finally:
        for module, own_estimator, own_solver, own_policy in before:
            module.estimator, module.solver = own_estimator, own_solver
            module.on_failure = own_policy


def _persist(
    solver: AbstractSolver, force: Force, start: Tensor, step: float, scale: Tensor | None
) -> Solution:
    """Solve, and once more from where the first attempt stopped if that was too early."""
    first = solver.solve(force, start, step=step, scale=scale)
    if first.result is not Result.MAX_STEPS or solver.tol == 0:
        return first
    second = solver.solve(force, first.value, step=step, scale=scale)
    return replace(second, evaluations=first.evaluations + second.evaluations)


def _expect(value: Any, kind: type, name: str, example: str) -> Any:
    if isinstance(value, kind):
        return value
    if isinstance(value, type) and issubclass(value, kind):
        given = f"the class {value.__name__}"
    else:
        given = f"{type(value).__name__} {value!r}"
    raise ConfigError(f"{name} is {given}, expected an {kind.__name__}: write {name}={example}")

"""A module whose output is an equilibrium: `Equilibrium(dynamics, solver, estimator)`.

The free phase is solved without recording. One recorded evaluation of the force then certifies the
state and, in the backward pass, carries the estimator's adjoint to parameters and input.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from altprop.equilibrium.conduct import refuse_sharded, refuse_unrepeatable
from altprop.equilibrium.driven import Driven
from altprop.equilibrium.dynamics import AbstractDynamics
from altprop.equilibrium.estimators.aep import AEP
from altprop.equilibrium.estimators.estimator import (
    AbstractEstimator,
    Certificate,
    Cost,
    Problem,
    Site,
)
from altprop.equilibrium.levels import solve_by_levels
from altprop.equilibrium.solvers.anderson import Anderson
from altprop.equilibrium.solvers.defect import defect_correction
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Force,
    Result,
    Solution,
    conclude,
    is_count,
    land,
    relative_residual,
    with_limits,
)
from altprop.equilibrium.solving import approach_freely, join, quiet, whole
from altprop.errors import ConfigError, ConvergenceError, RuleError
from altprop.transforms import refuse_vmap

OnFailure = Literal["raise", "warn", "accept"]
STACK = "_altprop_stack"  # where a module keeps the equilibrium that its blocks were made into


class Equilibrium(nn.Module):
    """Return the equilibrium of a dynamics, and give it an estimator's gradient.

    `block(x)` solves `F(z; x) = 0` and returns `z*`; `.backward()` through it is the estimator's.
    Training, evaluation and generation use this same definition of the state. Everything inside
    runs in float32 or float64 whatever the autocast state, for bf16's round-off is as large as a
    nudge. Memory does not depend on the number of relaxation steps (except under `BPTT`).

    **Arguments:** `dynamics`; `solver`, of the free phase, whose kind also solves the estimator's
    phases; `estimator`; `on_failure`, what to do when a solve misses its tolerance:
    `"raise"` a `ConvergenceError`, `"warn"`, or `"accept"`.
    `certificate` holds what the last call measured.

    **Shapes:** `x` is `(B, ...)`, and so is the result; samples never interact.

    Sources: mathematics of the adjoint, Bai et al. 2019 and Scurria et al. (arXiv 2602.03670).
    """

    certificate: Certificate | None
    opaque_to_rules = True  # a rule inside the dynamics would falsify its Jᵀ: convert refuses it

    def __init__(
        self,
        dynamics: AbstractDynamics,
        solver: AbstractSolver | None = None,
        estimator: AbstractEstimator | None = None,
        on_failure: OnFailure = "raise",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.dynamics = _expect(dynamics, AbstractDynamics, "dynamics", "GatedBlock(128, heads=4)")
        self.solver = _expect(
            Anderson() if solver is None else solver, AbstractSolver, "solver", "Anderson()"
        )
        self.estimator = _expect(
            AEP() if estimator is None else estimator, AbstractEstimator, "estimator", "AEP()"
        )
        self.on_failure: OnFailure = _expect_policy(on_failure)
        if not (chunk is None or is_count(chunk)):
            raise ConfigError(f"chunk is {chunk!r}, expected a whole number of samples, or None")
        self.chunk = chunk
        self.certificate = None

    def forward(self, x: Tensor, *args: Any, cost: Cost | None = None, **kwargs: Any) -> Tensor:
        """Return the equilibrium `z*` under input `x`, both `(B, ...)`.

        **Arguments:** `cost`, `z ↦ C(z)` (a scalar), for estimators that nudge with the cost's own
        gradient; it must be the loss that is differentiated afterwards. What else is given goes to
        the dynamics as it is (a mask, say).

        **Raises:** `ConvergenceError` as `on_failure` says; `ConfigError` for an input in half
        precision outside autocast; `RuleError` for a force in which samples interact, and others
        that have no gradient here.
        """
        if torch.compiler.is_compiling():
            return _outside_graph(self, x, cost, args, kwargs)
        return self._relax(x, cost, args, kwargs)

    def _relax(
        self, x: Tensor, cost: Cost | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        refuse_vmap(x, "an Equilibrium cannot be solved")
        x = _exact_enough(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.relax(self.dynamics.under(x, *args, **kwargs), cost)

    def relax(self, driven: Driven, cost: Cost | None = None) -> Tensor:
        """Return what `driven`, a dynamics under its input, settles to; `forward` is built on it.

        It is for callers that have the dynamics under an input already.
        """
        if driven.fresh:
            refuse_unrepeatable(self.solver, getattr(self.estimator, "solver", None))
        return driven.read(self.estimator.attach(self._site(driven, cost)))

    @torch.no_grad()
    def extend(self, x: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Return the equilibrium of new tokens after those in a cache, and the cache with them.

        Earlier tokens' states never depend on later ones, so this is exact: it solves the new
        tokens alone, by the same solver to the same tolerance (now relative to the new tokens'
        own state, so never looser). It records nothing for autograd.

        **Arguments:** `x`, the new tokens' input, `(B, t, C)`; `cache`, what the last call
        returned, or `None` for no earlier tokens. A cache is never changed, so it can be extended
        twice.

        **Raises:** `RuleError` for a dynamics that keeps no cache; `ConvergenceError` as
        `on_failure` says.
        """
        x = _exact_enough(x)
        with torch.autocast(x.device.type, enabled=False):
            force, remember = self.dynamics.extend(cache, x)
            step = self.dynamics.step
            tol = self.solver.tol
            near = self.solver.approach(force, self.dynamics.start(x), step=step)

            def again(solver: AbstractSolver, z: Tensor) -> Solution:
                return solver.solve(force, z, step=step)

            found = land(near, force, again, self.solver)
            self.certificate = Certificate(
                found.result, found.residual, found.evaluations, state=found.state, input=x
            )
            self._settle(found.result, found.reached, tol, "free phase")
            value = found.state + step * found.force
            return value, remember(value)

    def _site(self, driven: Driven, cost: Cost | None) -> Site:
        start, chunk = driven.start(), self.chunk
        held = tuple(self.dynamics.parameters())
        parts = [driven]  # as many as are solved one after the other

        def pieces(z: Tensor) -> tuple[Tensor, ...]:
            return (z,) if len(parts) == 1 else z.split([len(part.x) for part in parts])

        def record(z: Tensor) -> Tensor:
            force = whole([part.record(own) for part, own in zip(parts, pieces(z), strict=True)])
            if force.requires_grad:
                for part, own in zip(parts, pieces(z), strict=True):
                    part.check_apart(own)
            return force

        def problems(z: Tensor, still: Tensor) -> Iterator[Problem]:
            if any(p is not q for p, q in zip(held, self.dynamics.parameters(), strict=True)):
                raise RuleError(
                    "the dynamics' parameters are not those of the forward pass (functional_call "
                    "puts its own in place only until the call returns), so the adjoint would be "
                    "that of another system: load them with load_state_dict, or use BPTT()"
                )
            if driven.coarse:
                still = quiet(driven)(z)
            seen = _read_cost(cost, driven)
            if len(parts) == 1:
                driven.split(chunk)  # refuses what cannot be split
            elif seen is not None:
                raise RuleError(
                    f"chunk is {chunk}, but a cost= is a function of the whole batch: write "
                    "chunk=None"
                )
            for part, state, left in zip(parts, pieces(z), pieces(still), strict=True):
                yield self._problem(part, state, left, seen)

        def free_phase() -> tuple[Solution, Tensor]:
            refuse_sharded(self.dynamics)
            state = driven.settled()
            if state is None:
                parts[:] = driven.split(chunk)
                begin = pieces(start.detach())
                near = [
                    approach_freely(self.solver, part, own)
                    for part, own in zip(parts, begin, strict=True)
                ]
                driven.check_split(chunk, parts)
                return join([found for found, _ in near]), whole([state for _, state in near])
            rest = state - state  # zero, or NaN where the state is not finite
            residual = relative_residual(rest, state, None)
            result = conclude(residual, self.solver.tol or 1.0)
            return Solution(state, rest, residual, 0, result), state

        def resume(solver: AbstractSolver, z: Tensor) -> Solution:
            return join(
                [
                    solver.solve(quiet(part), own, step=part.step)
                    for part, own in zip(parts, pieces(z), strict=True)
                ]
            )

        def finish(certificate: Certificate) -> None:
            certificate.system = certificate.system or driven.kept()
            self.certificate = certificate

        return Site(
            x=driven.x,
            start=start,
            step=driven.step,
            force=driven.force,
            record=record,
            solver=self.solver,
            free_phase=free_phase,
            resume=resume,
            problems=problems,
            finish=finish,
            settle=self._settle,
        )

    def _problem(self, driven: Driven, z: Tensor, still: Tensor, cost: Cost | None) -> Problem:
        kind = driven.x.device.type

        def solve(
            force: Force,
            start: Tensor,
            *,
            tol: float,
            max_steps: int,
            scale: Tensor,
            solver: AbstractSolver | None = None,
            inverse: Force | None = None,
        ) -> Solution:
            own = with_limits(solver or self.solver, tol, max_steps)

            def attempt(force: Force, start: Tensor, inverse: Force | None) -> Solution:
                if inverse is None:
                    return own.solve(force, start, step=driven.step, scale=scale)
                return defect_correction(
                    force, inverse, start, tol=tol, max_steps=max_steps, scale=scale
                )

            given = inverse if solver is None else None
            with torch.autocast(kind, enabled=False):
                return solve_by_levels(attempt, force, start, given, tol, driven.widths)

        def linearise(at: Tensor | None = None) -> Any:
            with torch.autocast(kind, enabled=False):
                return driven.linearise(z if at is None else at)

        def analytic(at: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast(kind, enabled=False):
                return driven.analytic(at)

        first = driven.first() if self.solver.piecewise else None
        tokens = 0 if first is None else first.x.shape[1]
        return Problem(
            z,
            still,
            driven.step,
            self.solver,
            quiet(driven),
            linearise,
            solve,
            cost,
            analytic,
            None if first is None else (tokens, partial(first.linearise, z[:, :tokens])),
            driven.widths,
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
        return (
            f"solver={self.solver}, estimator={self.estimator}, on_failure={self.on_failure!r}, "
            f"chunk={self.chunk}"
        )


def _exact_enough(x: Tensor) -> Tensor:
    """Return the input in at least float32, under autocast by widening it."""
    if x.is_meta:
        raise ConfigError(
            "Equilibrium was given a tensor on the meta device, which has no numbers to relax: "
            "build it there if you like, but call it after to_empty(...) and load_state_dict(...)"
        )
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.itemsize < 4:
        x = x.float()
    if not x.is_floating_point() or torch.finfo(x.dtype).bits < 32:
        raise ConfigError(
            f"Equilibrium was given {x.dtype}: its nudges are smaller than that precision's "
            "round-off; keep the block in float32 and use torch.autocast around the model"
        )
    return x


def _read_cost(cost: Cost | None, driven: Driven) -> Cost | None:
    """Turn a cost of what the module gives out into a cost of the whole state."""
    return None if cost is None else lambda z: cost(driven.read(z))


def _outside_graph(
    block: Equilibrium, x: Tensor, cost: Cost | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Relax outside the graph of a compiled model, and compile nothing that is called meanwhile.

    What the relaxation iterates over can be compiled by itself: `block.dynamics.compile()`.
    (`disable` is looked up here, for it imports the compiler, which takes as long as torch.)
    """
    relax = torch.compiler.disable(block._relax, reason="its length depends on the data")
    return relax(x, cost, args, kwargs)


def equilibria(model: nn.Module) -> Iterator[tuple[str, Equilibrium]]:
    """Yield every `Equilibrium` in `model` with its path, those of converted stacks included."""
    for path, module in model.named_modules():
        if isinstance(module, Equilibrium):
            yield path, module
        stack = module.__dict__.get(STACK)
        if stack is not None:
            yield f"{path}.{stack.name}".strip("."), stack.equilibrium


@contextmanager
def using(
    model: nn.Module,
    estimator: AbstractEstimator | None = None,
    solver: AbstractSolver | None = None,
    on_failure: OnFailure | None = None,
) -> Iterator[None]:
    """Run the equilibria of `model` with another estimator, solver or policy for a while.

    **Raises:** `ConfigError` as `Equilibrium` does, and then nothing is changed.
    """
    if estimator is not None:
        _expect(estimator, AbstractEstimator, "estimator", "AEP()")
    if solver is not None:
        _expect(solver, AbstractSolver, "solver", "Anderson()")
    if on_failure is not None:
        _expect_policy(on_failure)
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


def _expect(value: Any, kind: type, name: str, example: str) -> Any:
    if isinstance(value, kind):
        return value
    if isinstance(value, type) and issubclass(value, kind):
        given = f"the class {value.__name__}"
    else:
        given = f"{type(value).__name__} {value!r}"
    raise ConfigError(f"{name} is {given}, expected an {kind.__name__}: write {name}={example}")


def _expect_policy(value: Any) -> OnFailure:
    if value in get_args(OnFailure):
        return value
    raise ConfigError(f"on_failure is {value!r}, expected 'raise', 'warn' or 'accept'")

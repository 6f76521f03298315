"""A module whose output is an equilibrium: `Equilibrium(dynamics, solver, estimator)`.

The free phase is solved without recording. One recorded evaluation of the force then certifies the
state and, in the backward pass, carries the estimator's adjoint to parameters and input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from altprop.equilibrium.call import Call, OnFailure, settle
from altprop.equilibrium.dynamics.conduct import refuse_unrepeatable
from altprop.equilibrium.dynamics.dynamics import AbstractDynamics
from altprop.equilibrium.dynamics.system import System
from altprop.equilibrium.estimators.aep import AEP
from altprop.equilibrium.estimators.estimator import AbstractEstimator
from altprop.equilibrium.estimators.problem import Certificate, Cost
from altprop.equilibrium.solvers.anderson import Anderson
from altprop.equilibrium.solvers.landing import land
from altprop.equilibrium.solvers.solver import AbstractSolver
from altprop.errors import ConfigError, RuleError
from altprop.transforms import refuse_vmap

CONVERTED = "_altprop"  # where a module keeps its record of `convert`, stacks of blocks among it


class Equilibrium(nn.Module):
    """Return the equilibrium of a dynamics, and give it an estimator's gradient.

    `block(x)` solves `F(z; x) = 0` and returns `z*`; `.backward()` through it is the estimator's.
    Training, evaluation and generation use this same definition of the state. Everything inside
    runs in float32 or float64 whatever the autocast state, with further arguments widened as the
    input is, for bf16's round-off is as large as a nudge. Memory does not depend on the number of
    relaxation steps (except under `BPTT`).

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
    ) -> None:
        super().__init__()
        self.dynamics = _expect(dynamics, AbstractDynamics, "dynamics", "GatedBlock(128, heads=4)")
        if ruled := [path for path, m in dynamics.named_modules() if _has_rule(m)]:
            raise RuleError(
                f"{ruled[0] or 'the dynamics'} has a learning rule, which would falsify the "
                "equilibrium's adjoint: write revert(...) first (an nn.Linear for a LocalLinear)"
            )
        self.solver = _expect(
            Anderson() if solver is None else solver, AbstractSolver, "solver", "Anderson()"
        )
        self.estimator = _expect(
            AEP() if estimator is None else estimator, AbstractEstimator, "estimator", "AEP()"
        )
        self.on_failure: OnFailure = _expect_policy(on_failure)
        self.certificate = None

    def forward(self, x: Tensor, *args: Any, cost: Cost | None = None, **kwargs: Any) -> Tensor:
        """Return the equilibrium `z*` under input `x`, both `(B, ...)`.

        **Arguments:** `cost`, `z ↦ C(z)` (a scalar), for estimators that nudge with the cost's own
        gradient; it must be the loss that is differentiated afterwards, with the same draws where
        it draws (dropout behind the block): what it draws is taken to be drawn right after this
        call. What else is given goes to the dynamics as it is (a mask, say).

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
        if torch.is_autocast_enabled(x.device.type):
            args, kwargs = _widened((args, kwargs))
        with torch.autocast(x.device.type, enabled=False):
            return self.relax(self.dynamics.under(x, *args, **kwargs), cost)

    def relax(self, system: System, cost: Cost | None = None) -> Tensor:
        """Return what a dynamics under its input settles to; `forward` is built on it.

        It is for callers that have the dynamics under an input already.
        """
        if system.fresh:
            refuse_unrepeatable(self.solver, getattr(self.estimator, "solver", None))
        call = Call(self.dynamics, system, self.solver, self.on_failure, cost, self._keep)
        z = system.read(self.estimator.attach(call))
        call.leave()
        return z

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
            found = land(self.solver, force, self.dynamics.start(x), step=self.dynamics.step)
            self.certificate = Certificate(
                found.result, found.residual, found.evaluations, state=found.state, input=x
            )
            settle(self.on_failure, found.result, found.reached, self.solver.tol, "free phase")
            value = found.value()
            return value, remember(value)

    def _keep(self, certificate: Certificate) -> None:
        self.certificate = certificate

    def __getstate__(self) -> dict[str, Any]:
        # what was measured in one process is no part of the module that is copied or pickled
        return {**super().__getstate__(), "certificate": None}

    def extra_repr(self) -> str:
        return f"solver={self.solver}, estimator={self.estimator}, on_failure={self.on_failure!r}"


def _has_rule(module: nn.Module) -> bool:
    """Tell whether a module itself was converted, or is a `LocalLinear` of another rule."""
    return CONVERTED in module.__dict__ or module.__dict__.get("_site") is not None


def _exact_enough(x: Tensor) -> Tensor:
    """Return the input in at least float32, under autocast by widening it."""
    if x.is_meta:
        raise ConfigError(
            "Equilibrium was given a tensor on the meta device, which has no numbers to relax: "
            "build it there if you like, but call it after to_empty(...) and load_state_dict(...)"
        )
    if torch.is_autocast_enabled(x.device.type):
        x = _widened(x)
    if not x.is_floating_point() or torch.finfo(x.dtype).bits < 32:
        raise ConfigError(
            f"Equilibrium was given {x.dtype}: its nudges are smaller than that precision's "
            "round-off; keep the block in float32 and use torch.autocast around the model"
        )
    return x


def _widened(given: Any) -> Any:
    """Return what holds tensors with those in half precision, which autocast made, in float32.

    What holds none is returned itself, for a force may write into what it is given.
    """
    if not any(isinstance(leaf, Tensor) and _is_half(leaf) for leaf in tree_leaves(given)):
        return given
    return tree_map_only(Tensor, lambda t: t.float() if _is_half(t) else t, given)


def _is_half(x: Tensor) -> bool:
    return x.is_floating_point() and x.itemsize < 4


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
        record = module.__dict__.get(CONVERTED)
        for stack in () if record is None else record.stacks:
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

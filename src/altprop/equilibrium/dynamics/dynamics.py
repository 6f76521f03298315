"""What an equilibrium relaxes: a force `F(z; x)` with parameters, and its products at one state.

Shapes: `B` samples, `T` tokens, `C` channels, `H` heads; states and inputs are `(B, T, C)` for the
transformers here, and `(B, ...)` in general. Samples never interact.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from altprop.equilibrium.dynamics.conduct import Conduct, Draws, check_draws
from altprop.equilibrium.dynamics.plain import FORCE, is_changed, is_overridden, is_watched
from altprop.equilibrium.dynamics.products import (
    AbstractEvaluation,
    AbstractLinearisation,
    AutogradLinearisation,
    record,
)
from altprop.equilibrium.dynamics.surroundings import Surroundings
from altprop.equilibrium.dynamics.system import Extension, System, detached
from altprop.errors import RuleError, refuse_subclass


class AbstractDynamics(nn.Module, ABC):
    """Base of every dynamics: `dynamics(z, x)` is the force `F(z; x, θ)`.

    Those of this library are final. The parameters are the module's. `step` is the `ε` for which
    `z + εF(z)` is the natural fixed-point map, `g(z)` in the stabiliser's terms.
    """

    step: float = 1.0
    draws: bool | Literal["replayed", "fresh"] = False
    """What random numbers in the force mean: `"replayed"` (or True), the same ones in all
    evaluations of a call, as dropout's always are, or `"fresh"`, noise that is new in each."""
    feedforward: bool = False
    """Whether nothing feeds back, so that the fixed point cannot be lost."""
    margin: float = 0.5
    """How large the gain `‖J_gᵀv‖` may grow before a stabiliser pushes it back."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_subclass(
            cls,
            AbstractDynamics,
            "hold a {name} and call it, as in ap.from_function(lambda z, x: inner(z, x) - 0.1 * z, "
            "inner), or derive from AbstractDynamics",
        )

    @property
    def gate(self) -> nn.Parameter | None:
        """The parameter that all feedback is multiplied by, where there is one."""
        return None

    @abstractmethod
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the force at state `z` under input `x`, both `(B, ...)`."""

    def uses(self) -> Iterable[nn.Module]:
        """Return the modules that the force calls: its own, and any that it closes over."""
        return self.modules()

    @cached_property
    def conduct(self) -> Conduct:
        """What was found out about the force so far."""
        return Conduct()

    def under(self, x: Tensor, *args: Any, **kwargs: Any) -> System:
        """Return this dynamics under one input; what else is given goes to every force."""
        return Driven(self, x, *_told(self.forward, args, kwargs))

    def extend(self, cache: Any, x: Tensor) -> Extension:
        """Return what solves new tokens alone, where earlier ones do not depend on them.

        **Arguments:** `cache`, of the earlier tokens (`None`: there are none); `x`, the new
        tokens' input, `(B, t, C)`.

        **Raises:** `RuleError` for a dynamics that is not causal or has no cache.
        """
        raise RuleError(
            f"{type(self).__name__} keeps no cache of earlier tokens: solve the whole window "
            "anew, or give the dynamics an extend(cache, x) method"
        )

    def start(self, x: Tensor) -> Tensor:
        """Return the state that the free phase starts from; `x` itself unless overridden."""
        return x

    def evaluate(self, z: Tensor, x: Tensor) -> AbstractEvaluation | None:
        """Return the force, its products and all its gradients at `z`; `None` for no closed form.

        Override it where closed forms are cheaper than automatic differentiation. Where methods
        were put on an instance, or there are hooks, it is not asked.
        """
        return None

    def linearise(self, z: Tensor, x: Tensor) -> AbstractLinearisation:
        """Return the Jacobian's products at `z`; override it for closed forms of these alone."""
        x = x.detach()
        made = None if is_changed(self) else self.evaluate(z.detach(), x)
        return AutogradLinearisation(lambda state: self(state, x), z) if made is None else made

    def record(self, z: Tensor, x: Tensor) -> tuple[Tensor, Callable[[], AbstractLinearisation]]:
        """Return the force at `z`, recorded for autograd, and what linearises it there."""
        z = z.detach()
        changed = is_overridden(self, FORCE | {"linearise"}) or is_watched(self)
        made = None if changed else self.evaluate(z, x)
        if made is None:
            return self(z, x), partial(self.linearise, z, x.detach())
        return record(made, partial(self.linearise, z, x))

    def analytic(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the force continued analytically to a complex state `z`, under a real input `x`.

        Only `HolomorphicEP` asks for it. On real states it must equal the force, and complex
        conjugates nowhere enter it; `altprop.equilibrium.dynamics.analytic` has the parts.

        **Raises:** `RuleError` where a dynamics has none, which is the default.
        """
        raise RuleError(
            f"{type(self).__name__} has no analytic force: HolomorphicEP relaxes complex states, "
            "on which torch defines no softmax, layer norm, GELU or fused attention, and relu has "
            "no continuation at all; give the dynamics a method analytic(z, x) made of the parts "
            "in altprop.equilibrium.dynamics.analytic, or write estimator=AEP()"
        )


class Driven(System):
    """A dynamics under one input.

    Where the force draws random numbers, it draws the same ones in every evaluation of one call:
    else a nudged phase would contrast two different systems. (Unless it says that it wants them
    fresh.)

    **Arguments:** `dynamics`; `x`, the input, `(B, ...)`; `args`, `kwargs`, further arguments of
    the force.
    """

    def __init__(
        self, dynamics: AbstractDynamics, x: Tensor, args: Any = (), kwargs: Any = None
    ) -> None:
        check_draws(dynamics.draws)
        self.x, self.step = x, dynamics.step
        self.fresh = dynamics.draws == "fresh"
        self._dynamics, self._args = dynamics, args
        self._kwargs: Mapping[str, Any] = kwargs or {}
        self._begun = False
        self._around = Surroundings()
        self._draws: Draws | None = None  # of the first evaluation, if it drew anything

    def start(self) -> Tensor:
        return self._dynamics.start(self.x)

    def force(self, z: Tensor) -> Tensor:
        if not self._begun:
            return self._begin(z)
        with nullcontext() if self._draws is None else self._draws.again():
            return self._evaluate(z)

    def _evaluate(self, z: Tensor) -> Tensor:
        force: Tensor = self._dynamics(z, self.x, *self._args, **self._kwargs)
        return force

    def _begin(self, z: Tensor) -> Tensor:
        """Make the first evaluation, which tells what the force draws and what it changes."""
        draws, dynamics = Draws(self.x.device), self._dynamics
        self._around.give(self.x)
        self._around.give_more(self._args, self._kwargs)
        uses = list(dynamics.uses())
        with self._around.first(uses), dynamics.conduct.unchanged(dynamics, uses):
            force = self._evaluate(z)
        self._begun = True
        if self.fresh or not draws.moved():
            return force
        self._draws = draws

        def drawn() -> bool:
            with torch.no_grad(), draws.again():
                before = Draws(self.x.device)
                self._evaluate(z.detach())
                return before.moved()

        if not dynamics.draws:
            name = type(dynamics).__name__
            dynamics.conduct.announce_draws(name, uses, drawn)
        return force

    def recalled(self) -> AbstractContextManager[None]:
        return self._around.again()

    def record(self, z: Tensor) -> tuple[Tensor, Callable[[], AbstractLinearisation]]:
        alone = self._by_input_alone()
        recorded = self._dynamics.record(z, self.x) if alone else super().record(z)
        self._around.leave()
        return recorded

    def check_apart(self, z: Tensor, linearise: Callable[[], AbstractLinearisation]) -> None:
        dynamics = self._dynamics
        dynamics.conduct.check_apart(dynamics.parameters, z, linearise)

    def linearise(self, z: Tensor) -> AbstractLinearisation:
        if self._by_input_alone():
            return self._dynamics.linearise(z, self.x)
        return AutogradLinearisation(self.once().force, z)

    def once(self) -> Driven:
        """Return the same with the draws of its first evaluation in all of them."""
        if not self.fresh:
            return self
        once = Driven(self._dynamics, self.x, self._args, self._kwargs)
        once.fresh = False
        return once

    def kept(self) -> Driven:
        args, kwargs = detached((self._args, self._kwargs))
        kept = Driven(self._dynamics, self.x.detach(), args, kwargs)
        kept.fresh, kept._begun, kept._draws = self.fresh, self._begun, self._draws
        kept._around = self._around.kept()
        return kept

    def samples(self, rows: Tensor) -> Driven | None:
        alone = self._by_input_alone()
        return Driven(self._dynamics, self.x.detach()[rows]) if alone else None

    def extend(self, cache: Any, x: Tensor) -> Extension:
        self._refuse_more("extends a window")
        return self._dynamics.extend(cache, x)

    def analytic(self, z: Tensor) -> Tensor:
        self._refuse_more("has an analytic force", ": write estimator=AEP()")
        return self._dynamics.analytic(z, self.x)

    def _refuse_more(self, what: str, hint: str = "") -> None:
        if not self._by_input_alone():
            raise RuleError(
                f"{type(self._dynamics).__name__} {what} under its input alone, not with further "
                f"arguments or random draws{hint}"
            )

    def _by_input_alone(self) -> bool:
        """Tell whether a part of the input drives that part of the state, and nothing else does."""
        said = self._dynamics.draws and self._dynamics.training
        noisy = self._dynamics.draws == "fresh"  # of one realisation too
        random = noisy or said or self._draws is not None
        return not (self._args or self._kwargs or random)


def _told(
    force: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return further arguments without each `None` that is there by default: that tells nothing."""
    if all(value is not None for value in (*args, *kwargs.values())):
        return args, kwargs
    known = inspect.signature(force).parameters
    idle = {name for name, p in known.items() if p.default is None}
    named = {name: v for name, v in kwargs.items() if v is not None or name not in idle}
    places = list(known)[2:]  # after the state and the input
    while args and args[-1] is None and len(args) <= len(places) and places[len(args) - 1] in idle:
        args = args[:-1]
    return args, named

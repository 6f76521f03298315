"""A dynamics under one input: all that one call of an `Equilibrium` needs of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from altprop.equilibrium.dynamics.conduct import (
    Draws,
    announce_draws,
    check_apart,
    check_draws,
    unchanged,
)
from altprop.equilibrium.dynamics.products import AbstractLinearisation, AutogradLinearisation
from altprop.errors import RuleError

if TYPE_CHECKING:
    from altprop.equilibrium.dynamics.dynamics import AbstractDynamics, Extension


class Driven:
    """A dynamics under one input: all that one call of an `Equilibrium` needs of it.

    Where the force draws random numbers, it draws the same ones in every evaluation of one call:
    else a nudged phase would contrast two different systems. (Unless it says that it wants them
    fresh.)

    **Arguments:** `dynamics`; `x`, the input, `(B, ...)`; `args`, `kwargs`, further arguments of
    the force.
    """

    coarse: bool = False
    """Whether the recorded force has less precision than the one that phases evaluate."""
    widths: tuple[int, ...] = ()
    """Where the state is a stack of levels, `(B, n)`, the numbers per sample that each holds."""
    fresh: bool = False
    """Whether every evaluation of the force draws random numbers of its own."""

    def __init__(
        self, dynamics: AbstractDynamics, x: Tensor, args: Any = (), kwargs: Any = None
    ) -> None:
        check_draws(dynamics.draws)
        self.x, self.step = x, dynamics.step
        self.fresh = dynamics.draws == "fresh"
        self._dynamics, self._args = dynamics, args
        self._kwargs: Mapping[str, Any] = kwargs or {}
        self._begun = False
        self._draws: Draws | None = None  # of the first evaluation, if it drew anything

    def start(self) -> Tensor:
        """Return the state that the free phase starts from."""
        return self._dynamics.start(self.x)

    def settled(self) -> tuple[Tensor, Tensor] | None:
        """Return the free state and the recorded force there, where no solver has to find it."""
        return None

    def force(self, z: Tensor) -> Tensor:
        """Return the force at `z`, `(B, ...)`, recorded wherever autograd is on."""
        if not self._begun:
            return self._begin(z)
        with nullcontext() if self._draws is None else self._draws.again():
            return self._evaluate(z)

    def _evaluate(self, z: Tensor) -> Tensor:
        return self._dynamics(z, self.x, *self._args, **self._kwargs)

    def _begin(self, z: Tensor) -> Tensor:
        """Make the first evaluation, which tells what the force draws and what it changes."""
        draws = Draws(self.x.device)
        with unchanged(self._dynamics):
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

        announce_draws(self._dynamics, drawn)
        return force

    def record(self, z: Tensor) -> tuple[Tensor, Callable[[], AbstractLinearisation]]:
        """Return the force at `z`, `(B, ...)`, and what returns the Jacobian's products there.

        Whether autograd records or not, the force is the same to the last bit.
        """
        if self._separable():
            force, linearise = self._dynamics.record(z, self.x)
        else:
            force, linearise = self.force(z), partial(self.linearise, z)
        return force, linearise

    def check_apart(self, z: Tensor, linearise: Callable[[], AbstractLinearisation]) -> None:
        """Refuse a force in which samples interact, as far as its Jacobian at `z` tells.

        **Arguments:** `z`, where it was recorded, `(B, ...)`; `linearise`, what `record` gave.
        """
        if type(self) is Driven:
            check_apart(self._dynamics, z, linearise)

    def linearise(self, z: Tensor) -> AbstractLinearisation:
        """Return the Jacobian's products at `z`."""
        if self._by_input_alone():
            return self._dynamics.linearise(z, self.x)
        return AutogradLinearisation((self._once() if self.fresh else self).force, z)

    def _once(self) -> Driven:
        """Return the same with the draws of its first evaluation: one linearisation has one."""
        once = Driven(self._dynamics, self.x, self._args, self._kwargs)
        once.fresh = False
        return once

    def kept(self) -> Driven:
        """Return the same without anything of autograd's: what may outlive the call."""
        args, kwargs = detached((self._args, self._kwargs))
        kept = Driven(self._dynamics, self.x.detach(), args, kwargs)
        kept._begun, kept._draws = self._begun, self._draws
        return kept

    def extend(self, cache: Any, x: Tensor) -> Extension:
        """Return what solves new tokens beside a cache, as the dynamics does."""
        if not self._by_input_alone():
            raise RuleError(
                f"{type(self._dynamics).__name__} extends a window under its input alone, not with "
                "further arguments or random draws"
            )
        return self._dynamics.extend(cache, x)

    def samples(self, rows: Tensor) -> Driven | None:
        """Return what drives some samples alone, where they can be told apart.

        **Arguments:** `rows`, which of them, `(B,)`.
        """
        return Driven(self._dynamics, self.x.detach()[rows]) if self._separable() else None

    def _separable(self) -> bool:
        """Tell whether a part of the input drives that part of the state, and nothing else does."""
        return type(self) is Driven and self._by_input_alone()

    def _by_input_alone(self) -> bool:
        said = self._dynamics.draws and self._dynamics.training
        random = self.fresh or said or self._draws is not None
        return not (self._args or self._kwargs or random)

    def analytic(self, z: Tensor) -> Tensor:
        """Return the force continued analytically to a complex state `z`, `(B, ...)`.

        **Raises:** `RuleError` for a dynamics that has none, or under further arguments.
        """
        if not self._by_input_alone():
            raise RuleError(
                f"{type(self._dynamics).__name__} has an analytic force under its input alone, not "
                "with further arguments or random draws: write estimator=AEP()"
            )
        return self._dynamics.analytic(z, self.x)

    def read(self, z: Tensor) -> Tensor:
        """Return what the module gives out, from a state `(B, ...)`; differentiable."""
        return z


def detached(given: tuple[Any, ...]) -> Any:
    """Return what a force was given, with all tensors in it cut off from autograd's graph."""
    return tree_map_only(Tensor, Tensor.detach, given) if any(given) else given

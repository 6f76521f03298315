"""What is solved in one call: a dynamics under its input, further arguments and random draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map_only

from altprop.equilibrium.dynamics.products import AbstractLinearisation
from altprop.errors import RuleError


class System(ABC):
    """All that one call of an `Equilibrium` needs of its dynamics; a dynamics' `under` makes it.

    **Fields:** `x`, the input, `(B, ...)`; `step`, the `ε` of the natural fixed-point map.
    """

    x: Tensor
    step: float
    coarse: bool = False
    """Whether the recorded force has less precision than the one that phases evaluate."""
    widths: tuple[int, ...] = ()
    """Where the state is a stack of levels, `(B, n)`, the numbers per sample that each holds."""
    fresh: bool = False
    """Whether every evaluation of the force draws random numbers of its own."""

    @abstractmethod
    def start(self) -> Tensor:
        """Return the state that the free phase starts from."""

    @abstractmethod
    def force(self, z: Tensor) -> Tensor:
        """Return the force at `z`, `(B, ...)`, recorded wherever autograd is on."""

    @abstractmethod
    def linearise(self, z: Tensor) -> AbstractLinearisation:
        """Return the Jacobian's products at `z`."""

    @abstractmethod
    def kept(self) -> System:
        """Return the same without anything of autograd's: what may outlive the call."""

    @abstractmethod
    def analytic(self, z: Tensor) -> Tensor:
        """Return the force continued analytically to a complex state `z`, `(B, ...)`.

        **Raises:** `RuleError` where there is no such continuation.
        """

    @abstractmethod
    def check_apart(self, z: Tensor, linearise: Callable[[], AbstractLinearisation]) -> None:
        """Refuse a force in which samples interact, as far as its Jacobian at `z` tells.

        **Arguments:** `z`, where it was recorded, `(B, ...)`; `linearise`, what `record` gave.
        """

    def recalled(self) -> AbstractContextManager[None]:
        """Return a context in which the force finds what it found when the module was called.

        **Raises:** `RuleError` where that is lost.
        """
        return nullcontext()

    def record(self, z: Tensor) -> tuple[Tensor, Callable[[], AbstractLinearisation]]:
        """Return the force at `z`, `(B, ...)`, and what returns the Jacobian's products there.

        Whether autograd records or not, the force is the same to the last bit.
        """
        return self.force(z), lambda: self.linearise(z)

    def settled(self) -> tuple[Tensor, Tensor] | None:
        """Return the free state and the recorded force there, where no solver has to find it."""
        return None

    def extend(self, cache: Any, x: Tensor) -> Extension:
        """Return what solves new tokens beside a cache, as the dynamics does.

        **Raises:** `RuleError` where tokens have no states of their own.
        """
        raise RuleError(f"{type(self).__name__} keeps no cache of earlier tokens")

    def samples(self, rows: Tensor) -> System | None:
        """Return what drives some samples alone, where they can be told apart.

        **Arguments:** `rows`, which of them, `(B,)`.
        """
        return None

    def once(self) -> System:
        """Return one realisation of the force, whose evaluations differ by the state alone.

        What multiplies with a Jacobian, or takes differences, needs it; it is the system itself
        where no evaluation draws anew.
        """
        return self

    def read(self, z: Tensor) -> Tensor:
        """Return what the module gives out, from a state `(B, ...)`; differentiable."""
        return z


class Extension(NamedTuple):
    """New tokens beside a cache.

    `force`: of the new tokens alone, `(B, t, C) → (B, t, C)`. `remember`: from their equilibrium to
    the cache with them in it; the cache that was given stays as it is.
    """

    force: Callable[[Tensor], Tensor]
    remember: Callable[[Tensor], Any]


def detached(given: tuple[Any, ...]) -> Any:
    """Return what a force was given, with all tensors in it cut off from autograd's graph."""
    return tree_map_only(Tensor, Tensor.detach, given) if any(given) else given

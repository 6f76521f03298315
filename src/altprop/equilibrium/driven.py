"""A dynamics under one input: all that one call of an `Equilibrium` needs of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from altprop.equilibrium.products import AbstractLinearisation, AutogradLinearisation
from altprop.errors import RuleError

if TYPE_CHECKING:
    from altprop.equilibrium.dynamics import AbstractDynamics


class Driven:
    """A dynamics under one input: all that one call of an `Equilibrium` needs of it.

    Where the force draws random numbers, it draws the same ones in every evaluation of one call:
    else a nudged phase would contrast two different systems.

    **Arguments:** `dynamics`; `x`, the input, `(B, ...)`; `args`, `kwargs`, further arguments of
    the force.
    """

    coarse: bool = False
    """Whether the recorded force has less precision than the one that phases evaluate."""
    widths: tuple[int, ...] = ()
    """Where the state is a stack of levels, `(B, n)`, the numbers per sample that each holds."""

    def __init__(
        self, dynamics: AbstractDynamics, x: Tensor, args: Any = (), kwargs: Any = None
    ) -> None:
        self.x, self.step = x, dynamics.step
        self._dynamics, self._args = dynamics, args
        self._kwargs: Mapping[str, Any] = kwargs or {}
        self._draws: Draws | None = None
        self._recorded: _Recorded | None = None

    def start(self) -> Tensor:
        """Return the state that the free phase starts from."""
        return self._dynamics.start(self.x)

    def settled(self) -> Tensor | None:
        """Return the free state where it is known without a solver."""
        return None

    def force(self, z: Tensor) -> Tensor:
        """Return the force at `z`, `(B, ...)`, recorded wherever autograd is on."""
        if not (self._dynamics.draws and self._dynamics.training):
            return self._dynamics(z, self.x, *self._args, **self._kwargs)
        if self._draws is None:
            self._draws = Draws(self.x.device)
            return self._dynamics(z, self.x, *self._args, **self._kwargs)
        with self._draws.again():
            return self._dynamics(z, self.x, *self._args, **self._kwargs)

    def record(self, z: Tensor) -> Tensor:
        """Return the force at `z`, `(B, ...)`, and keep what its linearisation there can use.

        Whether autograd records or not, the force is the same to the last bit.
        """
        if not self._separable():
            return self.force(z)
        force, linearise = self._dynamics.record(z, self.x)
        if torch.is_grad_enabled():
            self._recorded = _Recorded(z, z._version, linearise)
        return force

    def linearise(self, z: Tensor) -> AbstractLinearisation:
        """Return the Jacobian's products at `z`."""
        if self._recorded is not None and self._recorded.at(z):
            return self._recorded.linearise()
        if self._args or self._kwargs or self._draws is not None:
            return AutogradLinearisation(self.force, z)
        return self._dynamics.linearise(z, self.x)

    def split(self, chunk: int | None) -> list[Driven]:
        """Return what drives at most `chunk` samples at a time, in order; itself if that is all.

        **Raises:** `RuleError` where samples cannot be told apart.
        """
        if chunk is None or chunk >= len(self.x):
            return [self]
        if not self._separable():
            raise RuleError(
                f"chunk is {chunk}, but layers, or a force with further arguments or random draws, "
                "are solved for the whole batch: write chunk=None"
            )
        return [Driven(self._dynamics, x) for x in self.x.split(chunk)]

    def first(self) -> Driven | None:
        """Return what drives the first tokens alone, where they are to be solved first."""
        k = self._dynamics.prefix if self._separable() else 0
        if not 0 < 8 * k <= self.x.shape[1]:  # in a shorter window they are no cheaper
            return None
        return Driven(self._dynamics, self.x.detach()[:, :k])

    def _separable(self) -> bool:
        """Tell whether a part of the input drives that part of the state, and nothing else does."""
        return type(self) is Driven and self._by_input_alone()

    def _by_input_alone(self) -> bool:
        random = self._dynamics.draws and self._dynamics.training
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


class _Recorded(NamedTuple):
    """Where a force was recorded, `(B, ...)`, in which version, and what linearises it there."""

    state: Tensor
    version: int
    linearise: Callable[[], AbstractLinearisation]

    def at(self, z: Tensor) -> bool:
        """Tell whether `z` is that state, unchanged, or a view of the whole of it."""
        at = self.state
        same = z.data_ptr() == at.data_ptr() and z.shape == at.shape and z.stride() == at.stride()
        return same and z._version == self.version


class Draws:
    """Where the random generators stood at one moment, so that the same can be drawn again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        own = device.type != "cpu"
        self._own = torch.get_device_module(device).get_rng_state(device) if own else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw inside as was drawn from that moment on, and leave the generators as they were."""
        own = [] if self._own is None else [self._device.index or 0]
        with torch.random.fork_rng(own, device_type=self._device.type if own else "cuda"):
            torch.set_rng_state(self._cpu)
            if self._own is not None:
                torch.get_device_module(self._device).set_rng_state(self._own, self._device)
            yield

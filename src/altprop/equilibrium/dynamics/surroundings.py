"""What a force reads beside its state, as the forward pass found it.

A backward pass evaluates the force anew, long after the forward pass. Its adjoint is that of the
same system only if the force then finds what it found: modules in the modes they had, under the
same names the same tensors, and in these the same numbers. Modes and names are put back while the
force is evaluated, as draws are; numbers that were written over are lost, so that is refused, as
autograd refuses it for what it has saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from altprop.errors import RuleError

_ANY_MODULE = frozenset(vars(nn.Module()))  # attributes that every module has
_NOTHING = object()


class Written(NamedTuple):
    """A tensor, with what it counted of writing into it at one moment."""

    tensor: Tensor
    version: int

    @classmethod
    def now(cls, tensor: Tensor) -> Written:
        """Return the tensor as it is at this moment, which keeps no graph alive."""
        return cls(tensor.detach(), version_of(tensor))

    def changed(self) -> bool:
        """Tell whether anything was written into it since."""
        return version_of(self.tensor) != self.version


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written into; those of inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version


class _Held(NamedTuple):
    """A tensor that a module has under a name: a buffer, or a plain attribute."""

    module: nn.Module
    name: str
    buffer: bool
    tensor: Tensor
    version: int

    def place(self) -> dict[str, Any]:
        names: dict[str, Any] = self.module._buffers if self.buffer else vars(self.module)
        return names

    def moved(self) -> bool:
        return self.place().get(self.name) is not self.tensor

    def changed(self) -> bool:
        return version_of(self.tensor) != self.version


class Surroundings:
    """What one call's force reads beside the state, to be found again by later evaluations."""

    def __init__(self) -> None:
        self._modes: list[tuple[nn.Module, bool]] = []
        self._held: list[_Held] = []
        self._given: list[tuple[str, Written]] = []

    @contextmanager
    def first(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Look at some modules around the first evaluation of a force that calls them."""
        found = list(modules)
        self._modes += [(m, m.training) for m in found]
        self._held += [one for m in found for one in _tensors_of(m)]
        yield
        self.leave()

    def leave(self) -> None:
        """Leave to the force what its evaluations have changed by themselves so far."""
        self._held = [one for one in self._held if not (one.moved() or one.changed())]

    def give(self, x: Tensor) -> None:
        """Look at the input, `(B, ...)`."""
        self._given.append(("the input", Written.now(x)))

    def give_more(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Look at what the force is given beside state and input."""
        named = [(f"further argument {i}", value) for i, value in enumerate(args, 1)]
        named += [(f"the argument {name}", value) for name, value in kwargs.items()]
        self._given += [
            (name, Written.now(t))
            for name, value in named
            for t in ((value,) if isinstance(value, Tensor) else tree_leaves(value))
            if isinstance(t, Tensor)
        ]

    def kept(self) -> Surroundings:
        """Return what may outlive the call: modes, and whether what was given is as it was."""
        kept = Surroundings()
        kept._modes, kept._given = self._modes, self._given
        return kept

    @contextmanager
    def again(self) -> Iterator[None]:
        """Put modes and names back inside; afterwards all is as it was before.

        **Raises:** `RuleError` where a tensor has been written into.
        """
        self._refuse_changed()
        turned = [(m, then, m.training) for m, then in self._modes if m.training is not then]
        moved = [(one, one.place().get(one.name, _NOTHING)) for one in self._held if one.moved()]
        for m, then, _ in turned:
            m.training = then
        for one, _ in moved:
            one.place()[one.name] = one.tensor
        try:
            yield
        finally:
            for m, _, now in turned:
                m.training = now
            for one, other in moved:
                one.place()[one.name] = other
                if other is _NOTHING:
                    del one.place()[one.name]

    def _refuse_changed(self) -> None:
        names = [name for name, written in self._given if written.changed()]
        # DDP writes the same numbers into buffers anew whenever its model is called
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        names += [
            f"{type(one.module).__name__}.{one.name}"
            for one in self._held
            if one.changed() and not (one.buffer and parallel)
        ]
        if names:
            raise RuleError(
                f"{', '.join(dict.fromkeys(names))} changed in place after the forward pass, so "
                "the force would now be that of another system: give the block what nothing else "
                "writes into (x.clone()), or write into it after the backward pass"
            )


def _tensors_of(m: nn.Module) -> Iterator[_Held]:
    own = vars(m)
    for name, value in own.items():
        if name not in _ANY_MODULE and isinstance(value, Tensor):
            yield _Held(m, name, False, value, version_of(value))
    for name, buffer in own.get("_buffers", {}).items():
        if buffer is not None:
            yield _Held(m, name, True, buffer, version_of(buffer))

"""What is found out about a stack's blocks while they run: who the samples are, who overwrites.

Nothing tells beforehand on which axis a block keeps the samples apart (torch's own layers put time
first), nor whether it overwrites its input. Both show: the Jacobian's product with a cotangent of
one sample alone must vanish in all others, and a tensor counts what is written into it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from altprop.equilibrium.dynamics.conduct import Asked, seeing, unnoticed
from altprop.equilibrium.dynamics.products import AbstractLinearisation


@dataclass(frozen=True)
class Layout:
    """How levels of any shape lie in one state, `(B, n)`.

    `axis`: where all levels have their samples; None where samples interact, so that all of them
    are one sample to the solvers, whose state is `(1, n)`.
    """

    axis: int | None

    def fits(self, shapes: Sequence[torch.Size]) -> bool:
        """Tell whether all levels have that axis, beside another, and as many samples on it."""
        if self.axis is None:
            return True
        if any(len(shape) <= max(1, self.axis + (self.axis > 0)) for shape in shapes):
            return False
        return len({shape[self.axis] for shape in shapes}) == 1

    def width(self, shape: torch.Size) -> int:
        """Return how many numbers one sample has in a level."""
        return math.prod(n for i, n in enumerate(shape) if i != self.axis)

    def flat(self, h: Tensor) -> Tensor:
        """Return a level's value, of its own shape, as rows, `(B, ...) → (B, n)`."""
        if self.axis is None:
            return h.reshape(1, -1)
        return h.movedim(self.axis, 0).flatten(1)

    def shaped(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Return a level's value in its own shape from its rows."""
        if not self.axis:
            return rows.reshape(shape).contiguous()
        first = (shape[self.axis], *(n for i, n in enumerate(shape) if i != self.axis))
        return rows.reshape(first).movedim(0, self.axis).contiguous()


@dataclass
class Habits:
    """What was found out so far.

    `pure`: the levels that leave their input as it is. `calm`: levels, and whether in training
    mode, that left their buffers as they were. `single`: the levels that give one tensor and
    nothing beside it.
    """

    pure: set[int] = field(default_factory=set)
    calm: set[Hashable] = field(default_factory=set)
    single: set[int] = field(default_factory=set)
    _axes: dict[int, int | None] = field(default_factory=dict)
    _asked: dict[int, Asked] = field(default_factory=dict)
    _met: set[tuple[int, int | None]] = field(default_factory=set)
    """The axes, of states with so many, along which some pass has shown samples to interact."""

    def layout(
        self,
        shapes: Sequence[torch.Size],
        linearise: Callable[[Layout], tuple[AbstractLinearisation, Tensor]],
        parameters: Callable[[], Iterable[Tensor]],
    ) -> Layout:
        """Return how these levels lie in a state. The Jacobian is asked as `Asked` says.

        **Arguments:** `shapes`, of the levels; `linearise`, from a layout to the products with the
        stack's Jacobian and the state there, `(B, n)`; `parameters`, the blocks'.
        """
        kind = len(shapes[0])
        known = Layout(self._axes.get(kind, 0))
        asked = self._asked.setdefault(kind, Asked())
        if known.fits(shapes) and not asked.due(parameters):
            asked.count(parameters)
            return known
        with unnoticed():
            for axis in (0, 1, None):
                found = Layout(axis)
                if not found.fits(shapes) or (kind, axis) in self._met:
                    continue
                if axis is None or seeing(*linearise(found)) is None:
                    break
                self._met.add((kind, axis))
        # one sample, or those without numbers, tell nothing
        if all(shape.numel() and shape[found.axis or 0] > 1 for shape in shapes if shape):
            self._axes[kind] = found.axis
            asked.count(parameters)
        return found

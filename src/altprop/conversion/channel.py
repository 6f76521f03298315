"""The way of one error to the taps of one rule: what `convert` fixed of it, and who listens now.

One autograd node takes the error's place and every tap (`assign.assign_taps`). What a single pass
collects for it is not here but in that pass (`passes.py`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from altprop.errors import RuleError
from altprop.layouts import OTHERWISE, SEVERAL, Fit, Layout, Shape, fit, fits, misfit, undecided
from altprop.recording import in_backward
from altprop.rule import AbstractBroadcast, Site

Call = tuple[nn.Module, Any, Any]
"""The module whose forward a pass is, its arguments and its keyword arguments."""
Kind = tuple[int, int, int, bool]
"""A site, the axes of its error and its tap, and whether they have as many positions: what has one
layout in every pass. (The mean over tokens has another than the tokens.)"""


def kind_of(index: int, error: Shape, tap: Shape) -> Kind:
    many = math.prod(error[:-1]) == math.prod(tap[:-1])
    return index, len(error), len(tap), many


def refuse_outside(path: str) -> None:
    """Refuse a recorded pass that no error can reach; let recomputations through."""
    if torch.is_grad_enabled() and not in_backward():
        raise RuleError(
            f"{path} ran outside the forward of the model that was converted, so no error can "
            "reach it: call the whole model, or wrap the call in rules_off or torch.no_grad()"
            ", or revert this part"
        )


class Tap(Protocol):
    """A place that hears the error; `on`, whether its rule is in force."""

    site: Site
    index: int
    on: bool

    def turned(self, y: Tensor) -> Tensor:
        """Return what the module computes with its axes as the module's caller has them."""

    def feedback(self, module: nn.Module, weights: Iterable[Tensor]) -> Tensor | None:
        """Return the tap's own feedback, if it has any."""


class Run(ABC):
    """A forward pass that a channel's places report to: one that is collected, or a probe."""

    def __init__(self, channel: Channel, call: Call) -> None:
        self.channel, self.call = channel, call

    @abstractmethod
    def map(
        self, tap: Tap, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None, rows: slice | None
    ) -> Tensor:
        """Return a tapped map's value; `rows`, which of the map `W` is, if not all."""

    @abstractmethod
    def cut(self, tap: Tap, m: nn.Module, hidden: Tensor) -> Tensor:
        """Return what goes on from a tapped output."""

    @abstractmethod
    def rest(self, tap: Tap, m: nn.Module, extra: Tensor) -> Tensor:
        """Return what goes on from a further tensor that a tapped module put out."""

    @abstractmethod
    def join(self, error: Tensor) -> Tensor:
        """Return the tensor at the error's place."""

    @abstractmethod
    def missed(self, path: str, weights: Iterable[Tensor]) -> None:
        """Hear that a part with these weights runs unrecorded."""


class Channel:
    """The way of one error to the taps of one rule."""

    def __init__(
        self, rule: AbstractBroadcast, seed: int, shared: str, layouts: tuple[Layout, ...]
    ) -> None:
        self.rule = rule
        self.seed = seed
        self.shared = shared  # the root's attribute that all taps slice, or ""
        self.layouts = layouts  # the user's, of which the first that fits counts; or none
        # those that shapes and probes have left, of the passes so far; none if it has several
        self.known_layouts: dict[Kind, frozenset[Layout]] = {}
        self.last_shapes: dict[int, tuple[Shape, Shape]] = {}  # of error and tap, by site
        self.members: list[Tap] = []
        self.running: Run | None = None
        self.heard = False  # whether a pass has told which members run
        self.exact = False  # whether the last pass was, which a checkpoint's recomputation repeats

    @property
    def sites(self) -> list[Site]:
        """The sites of all taps, each at its tap's `index`."""
        return [tap.site for tap in self.members]

    @property
    def on(self) -> bool:
        """Whether any tap is in force."""
        return any(tap.on for tap in self.members)

    def forget(self, tap: Tap) -> None:
        """Let a tap go, whose place is on backprop from now on."""
        self.members.remove(tap)
        self.known_layouts.clear()
        self.last_shapes.clear()
        for index, left in enumerate(self.members):
            left.index = index

    def join(self, error: Tensor) -> Tensor:
        """Return the tensor at the error's place, as the running pass wants it."""
        return error if self.running is None else self.running.join(error)

    def ways(self, error: Shape, tap: Shape) -> list[list[Fit]]:
        """Return the ways to lay an error on a tap that the shapes, or the user, leave open."""
        have, want = tuple(error[:-1]), tuple(tap[:-1])
        if not self.layouts:
            return fits(have, want)
        found = [fit(have, want, layout) for layout in self.layouts]
        return [[f] for f in found if f is not None][:1]

    def choose(
        self,
        ways: list[list[Fit]],
        index: int,
        error: Shape,
        tap: Shape,
        measure: Callable[[], None],
    ) -> Fit:
        """Return that of the `ways` by which an error lies on the tap of a site.

        **Arguments:** `measure`, what fills `known_layouts` where shapes do not tell.
        **Raises:** `RuleError` if none fits, or if it stays open which axis counts samples.
        """
        path = self.sites[index].path
        if not ways:
            raise misfit(path, error, tap, self.layouts)
        if len(ways) == 1:
            # what the user said needs no proof, and what the last pass told is known
            if not (self.layouts or torch.compiler.is_compiling()):
                if self.last_shapes.get(index) != (error, tap):
                    self.last_shapes[index] = (error, tap)
                    if all(size > 1 for size in ways[0][0].fine):  # one hides which layout it is
                        self.learn(kind_of(index, error, tap), [fit.layout for fit in ways[0]])
            return ways[0][0]
        kind = kind_of(index, error, tap)
        found = self._left(kind, ways)
        if len(found) != 1 and self.known_layouts.get(kind) != frozenset():
            measure()
            found = self._left(kind, ways)
        if len(found) != 1:
            why = SEVERAL if kind in self.known_layouts else OTHERWISE
            raise undecided(path, error, tap, why)
        return found[0]

    def learn(self, kind: Kind, told: Iterable[Layout]) -> None:
        """Keep of the layouts that were possible those that this pass allows too."""
        told = frozenset(told)
        known = self.known_layouts.get(kind)
        self.known_layouts[kind] = told if known is None else known & told

    def _left(self, kind: Kind, ways: list[list[Fit]]) -> list[Fit]:
        """Return a fit of each way that what is known allows."""
        known = self.known_layouts.get(kind, frozenset())
        allowed = ([fit for fit in way if fit.layout in known] for way in ways)
        return [way[0] for way in allowed if way]

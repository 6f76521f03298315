"""Backprop: the weight's own transpose carries the cotangent; the name for "leave this alone"."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from altprop.rule import AbstractTransport, Scope


@dataclass(frozen=True)
class Backprop(AbstractTransport):
    """Keep a place on exact gradients: in a mapping of patterns, the exception to a rule."""

    @property
    def takes(self) -> frozenset[str]:
        return frozenset({"maps", "blocks"})

    def plan(self, scope: Scope) -> None:
        for place in scope.maps():
            scope.keep(place)

    def matrix(self, W: Tensor, B: Tensor | None, noise: Tensor | None) -> Tensor:
        return W

"""What a tapped module puts out: one tensor that hears the error, and whatever stands beside it.

The first tensor is the tap. Nothing else may carry a gradient past it: what only reports, such as
the weights of an attention, goes on as it is, and a cotangent that gets on from there is an error.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from altprop.assign import assign_adjoint
from altprop.errors import RuleError
from altprop.transforms import transforming

Change = Callable[[Tensor], Tensor]


def on_first(change: Change, out: Any, path: str, rest: Change | None = None) -> Any:
    """Return what a module put out with its first tensor, or itself if it is one, changed.

    **Arguments:** `out`, a tensor, or a tuple, named tuple, list or dict that holds one; `path`,
    the module's, for errors; `rest`, the change of every other tensor in it.
    """
    if isinstance(out, Tensor):
        return change(out)
    items = _items(out)
    first = next((value for _, value in items if isinstance(value, Tensor)), None)
    if first is None:
        raise RuleError(
            f"{path} returned a {type(out).__name__} without a tensor that could be its tap: "
            "return a tensor, or a tuple, list or dict whose first tensor goes on"
        )
    changed = change(first)

    def other(value: Any) -> Any:
        if value is first:
            return changed
        if isinstance(value, Tensor):
            return value if rest is None or not value.requires_grad else rest(value)
        return _rebuilt(value, [(key, other(v)) for key, v in _items(value)])

    return _rebuilt(out, [(key, other(value)) for key, value in items])


def _items(out: Any) -> list[tuple[Any, Any]]:
    if isinstance(out, dict):
        return list(out.items())
    return list(enumerate(out)) if isinstance(out, tuple | list) else []


def _rebuilt(out: Any, items: list[tuple[Any, Any]]) -> Any:
    """Return a container like `out` with these items, or itself if they are its own."""
    if all(value is out[key] for key, value in items):
        return out
    if type(out) is dict:
        return dict(items)
    if isinstance(out, dict):  # a ModelOutput has its keys as attributes too
        twin = copy.copy(out)
        for key, value in items:
            twin[key] = value
        return twin
    values = [value for _, value in items]
    return out._make(values) if hasattr(out, "_make") else type(out)(values)


@dataclass(frozen=True)
class _Guard:
    """What a gradient meets at a further output of a tapped module, on its way back."""

    path: str
    own: frozenset[int]
    """The identities of the module's own parameters."""
    node: Any
    """Where autograd goes on from here."""

    def __call__(self, cotangent: Tensor) -> Tensor:
        if leaves([self.node], self._ends) <= self.own:
            return cotangent
        raise RuleError(
            f"{self.path} is tapped at its first output, and a gradient reached another one, by "
            "which the exact one would get past every tap: return one tensor (the sum of a hidden "
            "state and its residual), detach the other, or write "
            'DirectFeedback(granularity="matmul")'
        )

    @staticmethod
    def _ends(node: Any) -> bool:
        return isinstance(getattr(node, "adjoint", None), _Guard)  # which looks for itself


def closed(extra: Tensor, path: str, module: nn.Module) -> Tensor:
    """Return a further output of a tapped module such that no gradient leaves the module by it.

    One that ends at the module's own parameters may come: that of T5's table of positions, which
    all blocks are handed. (What torch compiles or transforms cannot look at its graph.)
    """
    if torch.compiler.is_compiling() or transforming():
        return extra
    own = frozenset(map(id, module.parameters()))
    return assign_adjoint(extra, extra.detach(), _Guard(path, own, origin(extra)))


def origin(tensor: Tensor) -> Any:
    """Return the node of the graph that a tensor comes from, be it a leaf."""
    return get_gradient_edge(tensor).node


def leaves(nodes: Iterable[Any], ends: Callable[[Any], bool] = lambda node: False) -> set[int]:
    """Return the identities of the leaves that the graph leads to from these nodes.

    **Arguments:** `ends`, whether not to go on from a node.
    """
    found: set[int] = set()
    left = list(nodes)
    seen = set(left)
    while left:
        node = left.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        for further, _ in () if ends(node) else node.next_functions:
            if further is not None and further not in seen:
                seen.add(further)
                left.append(further)
    return found


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Let what autograd saves in here stay with it, and none of it go to a checkpoint around."""

    def pack(saved: Tensor) -> tuple[Tensor, int]:
        return saved, saved._version

    def unpack(packed: tuple[Tensor, int]) -> Tensor:
        saved, version = packed
        if saved._version != version:  # as autograd itself would say
            raise RuntimeError(
                "a feedback matrix that the backward pass needs was modified by an inplace "
                f"operation: it is at version {saved._version}, expected version {version}"
            )
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield

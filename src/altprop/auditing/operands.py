"""What an operation of torch is given: where its tensors lie, and which of them it needs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cache
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def opened(given: Any) -> list[Tensor]:
    """Return the tensors that a module is given, also in an object that is no plain container."""
    found = []
    for leaf in tree_leaves(given):
        inside = [] if isinstance(leaf, Tensor | nn.Module) else getattr(leaf, "__dict__", [])
        found += tensors([leaf, dict(leaf) if isinstance(leaf, Mapping) else inside])
    return found


def unwrapped(t: Tensor) -> Tensor:
    """Return the tensor of a transform of functions, such as `torch.func.vmap`."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def counts(t: Tensor) -> bool:
    """Tell whether a tensor may be what a weight is multiplied with: not an index or a scale."""
    return t.dim() > 0 and (t.is_floating_point() or t.is_complex())


def computed_anew() -> bool:
    """Tell whether activation checkpointing runs a forward pass within the innermost backward.

    Neither the grad mode nor a module's hooks say so: a function of somebody's own switches
    autograd off while it runs forward, and what is checkpointed may be no module.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_engine_run_backward":
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


def one_by_one(args: tuple[Any, ...], out: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield what an operation on lists does to each of their members, and what it makes of it."""
    made = args[0] if out is None else out  # None: it wrote into the first list
    for index, one in enumerate(made):
        yield tuple(a[index] if isinstance(a, list | tuple) else a for a in args), one


def place_of(t: Tensor) -> tuple[int, int, int] | None:
    """Return a tensor's storage and the bytes in it, or nothing if it has no memory of its own."""
    try:
        key = int(t.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return None
    if not t.numel():
        return None
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    low = int(t.storage_offset()) * t.itemsize
    return key, low, low + int(extent) * t.itemsize


@cache
def writes_first(func: Any) -> bool:
    arguments = func._schema.arguments
    return bool(arguments) and cast(bool, getattr(arguments[0].alias_info, "is_write", False))


def unread_of(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    """Return the operands that a backward formula is given and does not need.

    Of a layer whose input has no gradient no weight is read, and of a norm's bias nothing ever.
    """
    first = args[-1][0] if args and isinstance(args[-1], list | tuple) and args[-1] else True
    if name == "convolution_backward":
        return [] if first else [args[2]]
    if name == "native_layer_norm_backward":
        out = [args[6]] if first else [args[5], args[6]]
        return [t for t in out if t is not None]
    return []

"""How a rule's autograd functions live under the transforms of `torch.func`: each has a twin.

A transform wants a function's forward and what it saves apart, as `setup_context`, which costs
torch a call of `inspect` at every use. So a function is written in two halves, and only a running
transform is given the twin that has them apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from altprop.errors import RuleError


def transforming() -> bool:
    """Say whether a transform of `torch.func` (grad, vjp, vmap, ...) is running."""
    return bool(torch._C._are_functorch_transforms_active())


def wants_gradient(t: torch.Tensor) -> bool:
    """Say whether a gradient may reach a tensor, from any of the transforms around it.

    What `vmap` batches says itself that it requires none, whatever it wraps.
    """
    return t.requires_grad or (transforming() and _wraps_gradient(t))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _wraps_gradient(t: torch.Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t) and not t.requires_grad:
        t = functorch.get_unwrapped(t)
    return t.requires_grad


def has_tangent(t: torch.Tensor) -> bool:
    """Say whether a forward-mode derivative is being taken of what a tensor was computed from."""
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(t).tangent is not None


def refuse_transforms(what: str) -> None:
    """Raise `RuleError`, which begins with `what`, inside a transform of `torch.func`."""
    if transforming():
        raise RuleError(
            f"{what} inside a transform of torch.func (grad, vmap, ...): call loss.backward() or "
            "torch.autograd.grad outside one instead"
        )


def refuse_vmap(x: torch.Tensor, what: str) -> None:
    """Raise `RuleError`, which begins with `what`, for an input that `torch.func.vmap` batches."""
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            raise RuleError(
                f"{what} inside vmap, since when a solve ends depends on its numbers: give all "
                "samples at once, (B, ...)"
            )
        x = functorch.get_unwrapped(x)


def in_halves(kind: type[Any]) -> type[Any]:
    """Make a function's forward of `value(*inputs)` and `keep(ctx, inputs, output)`, and a twin."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = kind.value(*inputs)
        kind.keep(ctx, inputs, output)
        return output

    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuleError(
            "a learning rule has no forward-mode derivative: it says what a backward pass writes; "
            "take the forward pass's own, inside torch.no_grad() or altprop.rules_off(model)"
        )

    kind.forward = staticmethod(forward)
    halves = {"forward": staticmethod(kind.value), "setup_context": staticmethod(kind.keep)}
    body = {**halves, "jvp": staticmethod(jvp), "generate_vmap_rule": True}
    kind.twin = type(kind.__name__, (kind,), body)
    return kind


def applied(kind: type[Any], *inputs: Any) -> Any:
    """Apply a function of two halves, or its twin where a transform is running."""
    return _transformed(kind, *inputs) if transforming() else kind.apply(*inputs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _transformed(kind: type[Any], *inputs: Any) -> Any:
    """Apply a twin, uncompiled: the compiler has no `vmap` of it, nor a gradient through one."""
    return kind.twin.apply(*inputs)

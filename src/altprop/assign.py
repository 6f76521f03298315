"""The one place where gradients are replaced: small autograd functions that know no rule.

A learning rule never touches the forward pass; it hands one of these functions a callable, and
the function's backward writes what the callable returns in place of autograd's own cotangent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _AssignAdjoint(torch.autograd.Function):
    """`(F, value) ↦ value`, whose backward sends `adjoint(g)` into `F` instead of `g`."""

    @staticmethod
    def forward(
        ctx: Any, force: Tensor, value: Tensor, adjoint: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(force)
        ctx.adjoint = adjoint
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        # Under activation checkpointing this recomputes the module first, so that what the adjoint
        # measures is recorded after, and not before, what the recomputation records.
        (force,) = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(cotangent.device.type, enabled=False):
            a = ctx.adjoint(cotangent)
        if torch.is_grad_enabled():  # the caller said create_graph=True
            a = _OnceOnly.apply(a, cotangent, force)
        return a, None, None


class _OnceOnly(torch.autograd.Function):
    """`(a, *sources) ↦ a`, where differentiating `a` with respect to any source is an error.

    The adjoint depends on the cotangent and on all that the force depends on, and none of that is
    recorded. (`once_differentiable` refuses only where the cotangent itself requires a gradient,
    and not for `torch.autograd.grad`, which prunes the node that would raise.)
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, *sources: Tensor) -> Tensor:
        return a.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "a learning rule's gradient cannot be differentiated again: how its adjoint depends on "
            "parameters and input is not recorded. Drop create_graph=True, or use a rule that "
            "records its computation, such as Equilibrium(..., solver=Euler(), estimator=BPTT())"
        )


def assign_adjoint(force: Tensor, value: Tensor, adjoint: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `value` such that its cotangent `g` reaches the graph of `force` as `adjoint(g)`.

    With `L = C(z*)` and `F(z*; x, θ) = 0` the gradient is `dL/dθ = aᵀ ∂F/∂θ`, so one evaluation of
    the force that autograd recorded, together with the adjoint state `a`, gives every gradient.

    **Arguments:** `force`, a recorded evaluation of the force, any shape; `value`, what the module
    returns, same shape, not differentiated; `adjoint`, from the cotangent `g` to `a`, same shape,
    called without recording and outside autocast, whatever the caller of `backward` has set.

    **Raises:** `RuntimeError` when the result is differentiated twice.
    """
    return _AssignAdjoint.apply(force, value, adjoint)

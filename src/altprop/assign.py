"""The one place where gradients are replaced: small autograd functions that know no rule.

A learning rule never touches the forward pass; it hands one of these functions a callable, and
the function's backward writes what the callable returns in place of autograd's own cotangent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _AssignAdjoint(torch.autograd.Function):
    """`(F, value) ↦ value`, whose backward sends `adjoint(g)` into `F` instead of `g`."""

    @staticmethod
    def forward(
        ctx: Any, force: Tensor, value: Tensor, adjoint: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.adjoint = adjoint
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            return ctx.adjoint(cotangent), None, None


def assign_adjoint(force: Tensor, value: Tensor, adjoint: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `value` such that its cotangent `g` reaches the graph of `force` as `adjoint(g)`.

    With `L = C(z*)` and `F(z*; x, θ) = 0` the gradient is `dL/dθ = aᵀ ∂F/∂θ`, so one evaluation of
    the force that autograd recorded, together with the adjoint state `a`, gives every gradient.

    **Arguments:** `force`, a recorded evaluation of the force, any shape; `value`, what the module
    returns, same shape, not differentiated; `adjoint`, from the cotangent `g` to `a`, same shape.

    **Raises:** `RuntimeError` when the result is differentiated twice.
    """
    return _AssignAdjoint.apply(force, value, adjoint)

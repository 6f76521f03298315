"""What a learning rule wrote is differentiated once only: a second derivative is an error.

How a rule's gradient depends on parameters and input is not recorded, so that autograd would take
it for a constant, silently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from altprop.transforms import applied, in_halves

Grads = tuple[Tensor | None, ...]


@in_halves
class OnceOnly(torch.autograd.Function):
    """`(a, *sources) ↦ a`, where differentiating `a` with respect to any source is an error.

    The adjoint depends on the cotangent and on all that the force depends on, and none of that is
    recorded. (`once_differentiable` refuses only where the cotangent itself requires a gradient,
    and not for `torch.autograd.grad`, which prunes the node that would raise.)
    """

    @staticmethod
    def value(a: Tensor, *sources: Tensor) -> Tensor:
        return a.clone()

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "a learning rule's gradient cannot be differentiated again: how it depends on "
            "parameters and input is not recorded. Drop create_graph=True, or use a rule that "
            "records its computation, such as Equilibrium(..., solver=Euler(), estimator=BPTT())"
        )


def once_only(grads: Grads, *sources: Tensor | None) -> Grads:
    """Make it an error to differentiate any of these gradients with respect to any source."""
    known = [source for source in sources if source is not None]
    return tuple(None if g is None else applied(OnceOnly, g, *known) for g in grads)

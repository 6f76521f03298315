"""What pushes a nudged phase: the constant cotangent, or the cost's own gradient at its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from altprop.equilibrium.estimators.problem import Problem
from altprop.equilibrium.solvers.solver import in_rows, per_sample, scaled_norm
from altprop.errors import ConfigError, RuleError

Nudge = Literal["linear", "cost"]
Map = Callable[[Tensor], Tensor]


def check_nudge(name: str, nudge: str) -> None:
    """Refuse a kind of nudge that does not exist."""
    if nudge not in get_args(Nudge):
        raise ConfigError(f"{name}: nudge is {nudge!r}, expected 'cost' or 'linear'")


def nudge_at(name: str, kind: Nudge, problem: Problem, cotangent: Tensor) -> Map:
    """Return the nudge as a function of the state, in the cotangent's units, `(B, ...)`.

    `linear`: the cotangent, wherever the state is, as fits any loss behind the block. `cost`: `∇C`
    at the state, as a physical system feels it, scaled to agree with the cotangent at `z*`.
    """
    if kind == "linear":
        return lambda z: cotangent
    gradient, scale = cost_gradient(name, problem, cotangent)
    return lambda z: per_sample(scale, z) * gradient(z)


def cost_gradient(name: str, problem: Problem, cotangent: Tensor) -> tuple[Map, Tensor]:
    """Return `z ↦ ∇C(z)`, and the multiple of `∇C(z*)` that the cotangent is per sample, `(B,)`.

    The loss may be the cost times a number (accumulation, a loss scale, a weight per sample), and
    an estimator may have scaled the cotangent: the multiple carries that over.

    **Raises:** `RuleError` without a cost, or for one that is not the loss that was differentiated.
    """
    cost = problem.cost
    if cost is None:
        raise RuleError(
            f"{name}(nudge='cost') needs the cost as a function of the state: call the module as "
            "block(x, cost=lambda z: loss_fn(head(z), y)), or write nudge='linear'"
        )

    def gradient(z: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            (out,) = torch.autograd.grad(cost(leaf), leaf)
        return out

    own = gradient(problem.state)
    size = scaled_norm(own)
    along = (in_rows(own) * in_rows(cotangent)).sum(1)
    scale = torch.where(size > 0, along / size / size, torch.zeros_like(size))
    if float((cotangent - per_sample(scale, own) * own).norm()) > 0.05 * float(cotangent.norm()):
        raise RuleError(
            "the cost given to the module is not the loss that was differentiated (their "
            "gradients at the free state differ): pass that same loss as cost=, and where it draws "
            "random numbers, as dropout does, let nothing else draw between the call and the loss"
        )
    return gradient, scale

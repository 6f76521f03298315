"""Asymmetric equilibrium propagation as published, written from scratch: the figure to beat.

It follows Scurria et al., arXiv 2602.03670, as anyone would write it from the paper: Euler
relaxations of fixed length, the cost's gradient at the nudged state, the correction
`(J − Jᵀ)(z − z*)` clipped as a whole to the norm of the force, and `Jv` by differentiating a
backward pass twice. Nothing of the library's estimators, solvers or linearisations is in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from problems import Gradients, Problem

STEP, FREE_STEPS, NUDGED_STEPS, BETA = 0.1, 120, 20, 0.02
# a force, a JVP and a VJP per nudged step of either phase, and the contrast's own force
EVALUATIONS = FREE_STEPS, 2 * NUDGED_STEPS * 3 + 1


def published_aep(problem: Problem) -> Gradients:
    """Return the gradients of the dynamics' parameters and of the input, by name."""
    dynamics = problem.dynamics
    x = problem.x.detach().requires_grad_()

    def force(z: Tensor) -> Tensor:
        return dynamics(z, x.detach())

    free = problem.x
    with torch.no_grad():
        for _ in range(FREE_STEPS):
            free = free + STEP * force(free)
        plus, minus = (nudged(force, problem.cost, free, sign * BETA) for sign in (1.0, -1.0))
    contrast = (minus - plus) / (2 * BETA)
    named = {"x": x, **dict(dynamics.named_parameters())}
    grads = torch.autograd.grad(dynamics(free, x), list(named.values()), contrast)
    return dict(zip(named, grads, strict=True))


def nudged(
    force: Callable[[Tensor], Tensor], cost: Callable[[Tensor], Tensor], free: Tensor, beta: float
) -> Tensor:
    """Return the state after a nudged phase from the free state, both `(B, T, C)`."""
    z = free
    for _ in range(NUDGED_STEPS):
        drive = force(z) - beta * slope(cost, z)
        moved = z - free
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            _, forward = torch.autograd.functional.jvp(force, free, moved)
            _, transposed = torch.autograd.functional.vjp(force, free, moved)
        correction = forward - transposed
        clip = (drive.norm() / correction.norm().clamp_min(1e-30)).clamp_max(1.0)
        z = z + STEP * (drive - clip * correction)
    return z


def slope(cost: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Return `∇C(z)`."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(cost(leaf), leaf)[0]

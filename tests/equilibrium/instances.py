"""Small seeded systems in float64, the gradients that estimators give on them, dense oracles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import altprop as ap

TIGHT = ap.Anderson(tol=1e-12, max_steps=300)


@dataclass(frozen=True)
class System:
    """A dynamics, its input `(B, T, C)` and the weights of its cost's linear part."""

    dynamics: ap.AbstractDynamics
    x: Tensor
    w: Tensor

    def cost(self, z: Tensor) -> Tensor:
        return (self.w * z + z**2 / 2 + torch.sin(2 * z)).sum()

    def places(self) -> list[Tensor]:
        return [self.x, *self.dynamics.parameters()]


def system(kind: str, seed: int, heads: int = 2, tokens: int = 3) -> System:
    torch.manual_seed(seed)
    if kind == "damped":
        dynamics: ap.AbstractDynamics = ap.DampedAttention(4, heads, scale=0.5)
    elif kind.startswith("thick"):
        norms = {"norm": "rms", "qk_norm": True} if "rms" in kind else {}
        dynamics = ap.ThickBlock(4, heads, scale=0.4, damping=0.5, init_std=0.3, **norms)  # type: ignore[arg-type]
    else:
        dynamics = ap.GatedBlock(4, heads, expansion=2, init_std=0.25)
        torch.nn.init.normal_(dynamics.alpha, std=0.25)
    x = torch.randn(2, tokens, 4, dtype=torch.float64)
    return System(dynamics.double(), x, torch.randn_like(x))


@st.composite
def systems(draw: st.DrawFn) -> System:
    kind = draw(st.sampled_from(["damped", "gated"]))
    return system(
        kind,
        seed=draw(st.integers(0, 999)),
        heads=draw(st.sampled_from([1, 2])),
        tokens=draw(st.integers(2, 4)),
    )


def gradient(
    s: System, estimator: ap.AbstractEstimator, solver: ap.AbstractSolver = TIGHT
) -> tuple[Tensor, ap.Certificate]:
    """Return the gradient of the cost by input and parameters, flat, and its certificate."""
    block = ap.Equilibrium(s.dynamics, solver, estimator)
    x = s.x.clone().requires_grad_()
    z = block(x, cost=s.cost)
    parts = torch.autograd.grad(s.cost(z), [x, *s.dynamics.parameters()])
    assert block.certificate is not None
    return torch.cat([p.flatten() for p in parts]), block.certificate


def exact(s: System) -> Tensor:
    return gradient(s, ap.Implicit(tol=1e-12, max_steps=300))[0]


def error(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def dense(s: System) -> tuple[Tensor, Tensor]:
    """Return `z*`, `(B, T, C)`, and the Jacobian of the whole batch at it, `(n, n)`."""
    with torch.no_grad():
        z = ap.Equilibrium(s.dynamics, TIGHT, ap.Implicit())(s.x)
    jacobian = torch.autograd.functional.jacobian(lambda v: s.dynamics(v, s.x), z)
    return z, jacobian.reshape(z.numel(), z.numel()).detach()


def from_adjoint(s: System, z: Tensor, a: Tensor) -> Tensor:
    """Return the gradient that an adjoint state gives, `aᵀ ∂F/∂(x, θ)`, flat."""
    x = s.x.clone().requires_grad_()
    force = s.dynamics(z, x)
    parts = torch.autograd.grad(force, [x, *s.dynamics.parameters()], a.reshape(z.shape))
    return torch.cat([p.flatten() for p in parts])


def cotangent(s: System, z: Tensor) -> Tensor:
    leaf = z.detach().clone().requires_grad_()
    return torch.autograd.grad(s.cost(leaf), leaf)[0]

"""Small seeded systems in float64, what estimators give on them, and the oracles beside them.

Shapes: `B` samples, `T` tokens, `C` channels, `H` heads, `n` numbers of a state. A `System` has
states `(B, T, C)`; a `Case`, whose adjoint state can be read off, and plain forces have `(B, n)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from hypothesis import strategies as st
from torch import Tensor, nn

import altprop as ap

Gradients = dict[str, Tensor]
Force = Callable[[Tensor], Tensor]
TIGHT = ap.Anderson(tol=1e-12, max_steps=500)
EXACT = ap.Implicit(tol=1e-12, max_steps=500)
NEAR = {"response": 1e-4, "tol": 1e-8, "max_steps": 500}
KINDS = ["damped", "gated"]
PLAIN = ap.Euler(step=0.5, max_steps=60)
SOLVERS = [  # one of every kind, and so the estimators
    PLAIN,
    ap.Euler(step=0.5, max_steps=60, tol=1e-4),
    ap.FixedPoint(),
    ap.Anderson(),
    ap.NewtonKrylov(),
    ap.Adaptive(),
    ap.Scattered(),
    ap.Fallback(),
]
ESTIMATORS = [
    ap.AEP(),
    ap.AEP(start="zero", sides=4),
    ap.AEP(linearise="tracking"),
    ap.AEP(nudge="cost"),
    ap.AEP(sides=1),
    ap.EP(sides=1),
    ap.EP(sides=4),
    ap.Implicit(),
    ap.Implicit(solver=ap.GMRES()),
    ap.OneStep(k=3, certify=True),
    ap.DyadicEP(),
    ap.HolomorphicEP(),
    ap.PublishedEP(),
    ap.PublishedAEP(),
    ap.BPTT(),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def size(z: Tensor) -> Tensor:
    """Return the norm of each sample."""
    return z.flatten(1).norm(dim=1)


def error(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


def worst(found: Gradients, wanted: Gradients) -> float:
    """Return the largest relative error of any gradient."""
    assert found.keys() == wanted.keys()
    return max(error(found[k].to(w), w) for k, w in wanted.items())


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def flat(parts: Any) -> Tensor:
    """Return tensors, or the values of a mapping, as one vector."""
    return torch.cat([p.flatten() for p in (parts.values() if isinstance(parts, dict) else parts)])


# attention blocks and other dynamics with states `(B, T, C)`


@dataclass
class System:
    """A dynamics with an input and a cost of its equilibrium."""

    dynamics: ap.AbstractDynamics
    x: Tensor
    cost: Callable[[Tensor], Tensor]
    solver: ap.AbstractSolver = TIGHT

    def block(self, estimator: ap.AbstractEstimator = EXACT, **changes: Any) -> ap.Equilibrium:
        return ap.Equilibrium(
            self.dynamics, **{"solver": self.solver, **changes, "estimator": estimator}
        )

    def gradients(self, estimator: ap.AbstractEstimator = EXACT, **changes: Any) -> Gradients:
        """Return the gradients by the input `x` and by the parameters."""
        return gradients(self.block(estimator, **changes), self.x, self.cost)

    @torch.no_grad()
    def loss(self) -> float:
        return float(self.cost(self.block()(self.x)))

    def named(self) -> dict[str, Tensor]:
        return {"x": self.x, **{k: p.data for k, p in self.block().named_parameters()}}

    def places(self) -> list[Tensor]:
        return [self.x, *self.dynamics.parameters()]


def gradients(block: nn.Module, x: Tensor, cost: Callable[[Tensor], Tensor]) -> Gradients:
    """Return what one backward pass of `cost` writes into the parameters and into the input."""
    leaf = x.detach().clone().requires_grad_()
    block.zero_grad()
    cost(block(leaf, cost=cost)).backward()
    named = {"x": leaf, **dict(block.named_parameters())}
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


def gradient(
    s: System, estimator: ap.AbstractEstimator, solver: ap.AbstractSolver = TIGHT
) -> tuple[Tensor, ap.Certificate]:
    """Return the gradients of one backward pass as one vector, and its certificate."""
    block = s.block(estimator, solver=solver)
    return flat(gradients(block, s.x, s.cost)), block.certificate


def exact(s: System) -> Tensor:
    return gradient(s, EXACT)[0]


def system(kind: str, seed: int, heads: int = 2, tokens: int = 3) -> System:
    """Return a tiny system whose cost bends: a gated block, a damped or a thick one."""
    torch.manual_seed(seed)
    if kind == "damped":
        dynamics: ap.AbstractDynamics = ap.DampedAttention(4, heads, scale=0.5)
    elif kind == "gated":
        dynamics = ap.GatedBlock(4, heads, expansion=2, init_std=0.25)
        nn.init.normal_(dynamics.alpha, std=0.25)
    else:
        more = {"norm": "rms", "qk_norm": True} if "rms" in kind else {}
        more |= {"channel_gain": True} if "gains" in kind else {}
        dynamics = ap.ThickBlock(4, heads, scale=0.4, damping=0.5, init_std=0.3, **more)
        if "gains" in kind:
            nn.init.normal_(dynamics.scale, 0.4, 0.1)
    x = torch.randn(2, tokens, 4, dtype=torch.float64)
    w = torch.randn_like(x)
    return System(dynamics.double(), x, lambda z: (w.to(z) * z + z**2 / 2 + torch.sin(2 * z)).sum())


@st.composite
def systems(draw: st.DrawFn) -> System:
    return system(
        draw(st.sampled_from(KINDS)),
        seed=draw(st.integers(0, 999)),
        heads=draw(st.sampled_from([1, 2])),
        tokens=draw(st.integers(2, 4)),
    )


def task(dynamics: ap.AbstractDynamics, B: int, T: int, seed: int = 0) -> System:
    """Return a system whose cost reads every entry of the state."""
    C = next(p for p in dynamics.parameters()).shape[-1]
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(B, T, C, generator=generator).double() for _ in range(2))
    read = torch.randn(C, C, generator=generator).double() / C**0.5
    return System(dynamics.double(), x, lambda z: (weight * torch.tanh(z @ read)).sum())


def damped(B: int = 2, T: int = 5, C: int = 8, H: int = 2, seed: int = 0, **how: float) -> System:
    torch.manual_seed(seed)
    return task(ap.DampedAttention(C, H, **how), B, T, seed)


def gated(
    B: int = 2, T: int = 5, C: int = 8, H: int = 2, seed: int = 0, gate: float = 0.4
) -> System:
    torch.manual_seed(seed)
    return task(open_gate(ap.GatedBlock(C, H, expansion=2, init_std=0.3), gate), B, T, seed)


def open_gate(block: ap.GatedBlock, gate: float) -> ap.GatedBlock:
    """Return `block` with no parameter at a special point."""
    nn.init.uniform_(block.alpha, -gate, gate)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 0, 0.2)
    for layer in (block.up, block.down):
        nn.init.normal_(layer.bias, 0, 0.2)
    return block


def reference_problem(seed: int, B: int = 4, T: int = 64, C: int = 128, H: int = 4) -> System:
    """Return the reference problem in float32: small embeddings, fixed head, mean cross-entropy."""
    torch.manual_seed(seed)
    dynamics, V = ap.DampedAttention(C, H), 65
    x, head = 0.02 * torch.randn(B, T, C), torch.randn(V, C) / C**0.5
    y = torch.randint(0, V, (B, T))

    def cost(z: Tensor) -> Tensor:
        return nnf.cross_entropy((z @ head.to(z).T).flatten(0, 1), y.flatten())

    return System(dynamics, x, cost, solver=ap.Anderson())


class SymmetricMemory(ap.AbstractDynamics):
    """`F = x − z + tanh(zW) Wᵀ / 2`, minus the gradient of an energy: its Jacobian is symmetric.

    (One memory per direction at most, with `‖W‖ = 1`, so that it contracts.)
    """

    def __init__(self, C: int, memories: int) -> None:
        super().__init__()
        W = torch.randn(memories, C)
        self.W = nn.Parameter(W / torch.linalg.matrix_norm(W, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x - z + torch.tanh(z @ self.W.T) @ self.W / 2


def jacobian(dynamics: ap.AbstractDynamics, z: Tensor, x: Tensor) -> Tensor:
    """Return `∂F/∂z` as a matrix, `(n, n)` with `n` the number of entries of `z`."""
    whole = torch.autograd.functional.jacobian(lambda s: dynamics(s, x), z)
    return whole.reshape(z.numel(), z.numel()).detach()


def dense(s: System) -> tuple[Tensor, Tensor, Tensor]:
    """Return `z*`, the Jacobian of the whole batch at it, and the cost's gradient as a vector."""
    with torch.no_grad():
        z = s.block()(s.x)
    leaf = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(s.cost(leaf), leaf)
    return z, jacobian(s.dynamics, z, s.x), g.flatten()


def from_adjoint(s: System, z: Tensor, a: Tensor) -> Tensor:
    """Return the gradient that an adjoint state gives, `aᵀ ∂F/∂(x, θ)`, as one vector."""
    x = s.x.clone().requires_grad_()
    force = s.dynamics(z, x)
    return flat(torch.autograd.grad(force, [x, *s.dynamics.parameters()], a.reshape(z.shape)))


# a force `x − z + tanh(z Aᵀ)` whose input's gradient is the adjoint state itself

B, N = 2, 6


@dataclass
class Case:
    """A dynamics, an input and a cotangent that is as large as it is told."""

    gain: float = 0.7
    step: float = 0.8
    scale: float = 1.0

    @property
    def matrix(self) -> Tensor:
        return self.gain * randn(N, N, seed=1) / math.sqrt(N)  # nowhere near symmetric

    def force(self, z: Tensor, x: Tensor) -> Tensor:
        return x - z + torch.tanh(z @ self.matrix.T)

    def jacobian(self, z: Tensor) -> Tensor:
        """Return `∂F/∂z` of each sample, `(B, n, n)`."""
        slope = 1 - torch.tanh(z @ self.matrix.T) ** 2
        return slope[:, :, None] * self.matrix - torch.eye(N, dtype=z.dtype)

    def root(self, x: Tensor, near: Tensor) -> Tensor:
        """Return the equilibrium by Newton's method with the dense Jacobian."""
        z = near
        for _ in range(30):
            z = z - torch.linalg.solve(self.jacobian(z), self.force(z, x))
        return z

    def run(
        self,
        estimator: ap.AbstractEstimator,
        solver: ap.AbstractSolver = TIGHT,
        weights: Tensor | float = 1.0,
    ) -> Run:
        x = randn(B, N, seed=2).requires_grad_()
        dynamics = ap.from_function(self.force, step=self.step)
        block = ap.Equilibrium(dynamics, solver, estimator, on_failure="accept")

        def costs(z: Tensor) -> Tensor:
            return (z * randn(B, N, seed=3) + z**3 / 3).sum(1, keepdim=True)

        z = block(x, cost=lambda z: costs(z).sum())
        z.retain_grad()
        (self.scale * weights * costs(z)).sum().backward()
        return Run(self, x.detach(), z.grad, x.grad, block.certificate)


@dataclass
class Run:
    """The input, the cotangent and the adjoint of one backward pass, and its certificate."""

    case: Case
    x: Tensor
    g: Tensor
    a: Tensor
    said: ap.Certificate

    @property
    def J(self) -> Tensor:
        return self.case.jacobian(self.said.state)

    def left(self, at: Tensor | None = None) -> Tensor:
        """Return what the adjoint equation leaves, `Jᵀa + g` in units of `‖g‖`, `(B, n)`."""
        J = self.case.jacobian(self.said.state if at is None else at)
        return (torch.einsum("bji,bj->bi", J, self.a) + self.g) / size(self.g)[:, None]


# plain forces for solvers


def contraction(B: int = 2, n: int = 8) -> Force:
    q = torch.linalg.qr(randn(n, n, seed=1)).Q
    b = randn(B, n, seed=2)
    return lambda z: 0.8 * torch.tanh(z @ q) + b - z


def linear(B: int = 2, n: int = 12, shift: float = -1.2) -> tuple[Force, Tensor, Tensor]:
    """Return a force `A z + b` per sample, `A` and `b`."""
    a = randn(B, n, n, seed=3) / math.sqrt(n) + shift * torch.eye(n, dtype=torch.float64)
    b = randn(B, n, seed=4)
    return lambda z: torch.einsum("bij,bj->bi", a, z) + b, a, b


def watched(force: Force) -> tuple[Force, list[Tensor]]:
    """Return a force that keeps every state it is asked for."""
    seen: list[Tensor] = []

    def wrapped(z: Tensor) -> Tensor:
        seen.append(z.clone())
        return force(z)

    return wrapped, seen

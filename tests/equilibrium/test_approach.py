"""A solver that foresees its next residual stops one evaluation earlier, and is held to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from instances import error, exact, gradient, system
from torch import Tensor

import altprop as ap
from altprop.equilibrium.solvers.solver import Force, land, with_limits


@dataclass(frozen=True)
class Hopeful(ap.AbstractSolver):
    """A solver that expects far too much of its next step."""

    tol: float = 1e-3
    max_steps: int = 100

    def solve(self, force: Force, start: Tensor, **how: Any) -> ap.Solution:
        return ap.Anderson(tol=self.tol, max_steps=self.max_steps).solve(force, start, **how)

    def approach(self, force: Force, start: Tensor, **how: Any) -> tuple[ap.Solution, Tensor]:
        found = with_limits(self, 1e3 * self.tol, self.max_steps).solve(force, start, **how)
        return found, found.value + how["step"] * found.force


def contraction(B: int = 6, n: int = 32) -> tuple[Force, Tensor]:
    """Return `F(z) = 0.35 tanh(zQ) + b − z` in float64, and a start."""
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    b, start = torch.randn(2, B, n, dtype=torch.float64)
    return lambda z: 0.35 * torch.tanh(z @ q) + b - z, start


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-8])
def test_what_is_foreseen_saves_an_evaluation_and_nearly_always_holds(tol: float) -> None:
    solver, resumed, saved = ap.Anderson(tol=tol), 0, 0
    for seed in range(20):
        torch.manual_seed(seed)
        force, start = contraction()
        whole = solver.solve(force, start, step=1.0)
        found = land(
            solver.approach(force, start, step=1.0),
            force,
            lambda own, z, force=force: own.solve(force, z, step=1.0),
            solver,
        )
        assert found.result is ap.Result.CONVERGED and float(found.reached.max()) <= tol
        resumed += found.evaluations > whole.evaluations + 1
        saved += found.evaluations == whole.evaluations
    assert resumed <= 2 and saved >= 12, (resumed, saved)


def test_what_falls_short_is_solved_on_and_what_had_arrived_stays() -> None:
    s = system("gated", seed=3)
    block = ap.Equilibrium(s.dynamics, Hopeful(tol=1e-6), ap.Implicit(tol=1e-8))
    tight = ap.Equilibrium(s.dynamics, ap.Anderson(tol=1e-10), ap.Implicit(tol=1e-8))
    x = s.x * torch.linspace(0.2, 2, len(s.x), dtype=s.x.dtype).view(-1, 1, 1)
    with torch.no_grad():
        whole, wanted = block(x), tight(x)
    seen = block.certificate
    assert seen is not None and seen.result is ap.Result.CONVERGED
    assert float(seen.free_residual.max()) <= 1e-6
    assert float((whole - wanted).norm()) <= 1e-5 * float(wanted.norm())
    for i in range(len(x)):
        assert torch.allclose(block(x[i : i + 1])[0].detach(), whole[i], rtol=0, atol=1e-11)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = s.dynamics.register_forward_hook(count)
    block(x)
    hook.remove()
    assert block.certificate is not None and block.certificate.free_evaluations == calls


def test_a_failure_to_arrive_is_told() -> None:
    s = system("gated", seed=3)
    block = ap.Equilibrium(s.dynamics, ap.Anderson(tol=1e-9, max_steps=4), on_failure="accept")
    block(s.x)
    seen = block.certificate
    assert seen is not None and seen.result is ap.Result.MAX_STEPS
    assert seen.free_evaluations == 4 + 1  # the limit, and what is recorded
    with pytest.raises(ap.ConvergenceError, match="free phase"):
        ap.Equilibrium(s.dynamics, ap.Anderson(tol=1e-9, max_steps=4))(s.x)


def test_gradients_do_not_care() -> None:
    s = system("damped", seed=4)
    for solver in (Hopeful(tol=1e-8), ap.Anderson(tol=1e-8)):
        assert error(gradient(s, ap.Implicit(tol=1e-8), solver)[0], exact(s)) < 1e-6


def test_a_step_out_of_the_domain_is_taken_back() -> None:
    """Where only the state to go on to is lost, the sample is solved from the one before it."""
    solver, tried = ap.Anderson(tol=1e-2), 0
    for seed in range(100):
        torch.manual_seed(seed)
        w, x = 0.5 * torch.randn(3, 3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
        seen: list[float] = []

        def force(z: Tensor, w: Tensor = w, x: Tensor = x, seen: list[float] = seen) -> Tensor:
            seen.append(float(z[0, 0]))
            return torch.tanh(z @ w) + x - z

        near, ahead = solver.approach(force, x, step=1.0)
        visited, last = max(seen), float(ahead[0, 0])
        root = ap.NewtonKrylov(tol=1e-12).solve(force, x, step=1.0).value
        inside = max(visited, float(root[0, 0]))
        if not inside < last:
            continue
        tried += 1
        bound = (inside + last) / 2

        def bounded(z: Tensor, force: Force = force, bound: float = bound) -> Tensor:
            return torch.where(z[:, :1] > bound, torch.nan, force(z))

        found = land(
            solver.approach(bounded, x, step=1.0),
            bounded,
            lambda own, z, bounded=bounded: own.solve(bounded, z, step=1.0),
            solver,
        )
        assert found.evaluations > near.evaluations + 1 and bool(found.state.isfinite().all())
        assert found.result is ap.Result.CONVERGED
    assert tried >= 2, tried


@pytest.mark.parametrize("own", [True, False])
def test_what_no_plain_step_solves_gets_none(own: bool) -> None:
    """`Implicit`'s residual is that of what it returns, where the solver needs no stable step."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    J = -(q * torch.linspace(5, 100, 24, dtype=torch.float64)) @ q.T
    dynamics = ap.from_function(lambda z, x: z @ J.T + x)
    x, w = torch.randn(2, 3, 24, dtype=torch.float64)
    x.requires_grad_()
    solver = ap.GMRES() if own else None
    block = ap.Equilibrium(dynamics, ap.NewtonKrylov(tol=1e-10), ap.Implicit(solver=solver))
    (block(x) * w).sum().backward()
    assert x.grad is not None and block.certificate is not None
    residual = (x.grad @ J + w).norm(dim=1) / w.norm(dim=1)
    assert block.certificate.adjoint_residual is not None
    assert torch.allclose(residual, block.certificate.adjoint_residual, rtol=1e-6)


@pytest.mark.parametrize("kind", ["damped", "gated"])
def test_the_value_is_one_natural_step_past_the_state_that_is_certified(kind: str) -> None:
    s = system(kind, seed=1)
    block = ap.Equilibrium(s.dynamics, ap.Anderson(tol=1e-2))
    with torch.no_grad():
        z, state = block(s.x), block.certificate.state
        ahead = state + s.dynamics.step * s.dynamics(state, s.x)
    assert torch.allclose(z, ahead, rtol=1e-12) and not torch.allclose(z, state, rtol=1e-6)

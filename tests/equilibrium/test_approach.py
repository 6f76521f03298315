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
class Hopeful(ap.Anderson):
    """A solver that expects far too much of its next step."""

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
            lambda z, force=force: solver.solve(force, z, step=1.0),
            1.0,
            tol,
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
    assert seen.free_evaluations == 2 * (4 + 1)  # two attempts, each with its landing
    with pytest.raises(ap.ConvergenceError, match="free phase"):
        ap.Equilibrium(s.dynamics, ap.Anderson(tol=1e-9, max_steps=4))(s.x)


def test_gradients_do_not_care() -> None:
    s = system("damped", seed=4)
    for solver in (Hopeful(tol=1e-8), ap.Anderson(tol=1e-8)):
        assert error(gradient(s, ap.Implicit(tol=1e-8), solver)[0], exact(s)) < 1e-6

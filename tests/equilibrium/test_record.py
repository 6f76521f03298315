"""The recorded evaluation of the force and the linearisation at its state share what both need."""

from __future__ import annotations

import pytest
import torch
from instances import system
from torch import Tensor

import altprop as ap
from altprop.equilibrium import linearised
from altprop.equilibrium.driven import Driven

KINDS = ["damped", "gated", "thick", "thick rms"]


def recorded(s: object, tokens: int = 3) -> tuple[Driven, Tensor]:
    assert hasattr(s, "dynamics") and hasattr(s, "x")
    driven, z = s.dynamics.under(s.x), s.x + 0.1
    driven.record(z)
    return driven, z


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dense", [True, False])
def test_it_is_the_linearisation_that_is_made_alone(
    kind: str, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not dense:
        monkeypatch.setattr(linearised, "_DENSE", 2)  # three tokens are a long window then
    s = system(kind, seed=1)
    driven, z = recorded(s)
    shared, alone = driven.linearise(z[:]), s.dynamics.linearise(z, s.x)
    v = torch.randn_like(z)
    assert torch.allclose(shared.vjp(v), alone.vjp(v), rtol=1e-12, atol=1e-14)
    assert torch.allclose(shared.jvp(v), alone.jvp(v), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_the_projections_are_not_computed_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s = system(kind, seed=1)
    driven, z = recorded(s)
    attention, linear = s.dynamics.attention, torch.nn.functional.linear
    shapes = []
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, *b: shapes.append(w.shape) or linear(x, w, *b)
    )
    joint = torch.Size((3 * attention.W_Q.shape[0], attention.W_Q.shape[1]))
    driven.linearise(z)
    assert joint not in shapes
    driven.linearise(z.clone())
    assert joint in shapes


def test_it_serves_its_own_state_alone() -> None:
    s = system("damped", seed=1)
    driven, z = recorded(s)
    v = torch.randn_like(z)
    for at in (z + 0.5, z[:, :2], z):
        if at is z:
            z.mul_(2)  # the same tensor, but no longer the state that was recorded
        x = s.x[:, : at.shape[1]]
        part = driven if at.shape == z.shape else s.dynamics.under(x)
        found, wanted = part.linearise(at), s.dynamics.linearise(at, x)
        u = v[:, : at.shape[1]]
        assert torch.allclose(found.vjp(u), wanted.vjp(u), rtol=1e-12, atol=1e-14)


def test_a_transposed_view_is_another_state() -> None:
    s = system("gated", seed=1, tokens=4)  # as many tokens as channels: the shapes are the same
    driven, z = recorded(s)
    v = torch.randn_like(z)
    found, wanted = driven.linearise(z.mT), s.dynamics.linearise(z.mT, s.x)
    assert torch.allclose(found.vjp(v), wanted.vjp(v), rtol=1e-12, atol=1e-14)


def test_nothing_is_kept_without_a_record() -> None:
    s = system("gated", seed=1)
    driven = s.dynamics.under(s.x)
    with torch.no_grad():
        driven.record(s.x)
    assert driven._recorded is None and s.dynamics.attention._trace is None


def test_a_force_that_attends_twice_is_linearised_by_itself() -> None:
    class Twice(ap.DampedAttention):
        def combine(self, z: Tensor, x: Tensor, mixed: Tensor) -> Tensor:
            return super().combine(z, x, (mixed + self.attention(2 * z)) / 2)

        def linearise(self, z: Tensor, x: Tensor) -> object:  # type: ignore[override]
            return ap.AbstractDynamics.linearise(self, z, x)

    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    grads = []
    for estimator in (ap.AEP(beta=1e-4, tol=1e-9), ap.BPTT()):
        torch.manual_seed(0)
        dynamics = Twice(4, heads=2, scale=0.3).double()
        solver = ap.Anderson(tol=1e-11) if estimator != ap.BPTT() else ap.Euler(0.5, 120)
        ap.Equilibrium(dynamics, solver, estimator)(x).sin().sum().backward()
        grads.append(dynamics.attention.W_V.grad)
    assert (grads[0] - grads[1]).norm() <= 1e-6 * grads[1].norm()

"""AEP that starts from the linear solution stays AEP: the phases' states decide, not the start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from instances import cotangent, error, exact, gradient, system
from torch import Tensor

import altprop as ap
from altprop.equilibrium.estimators import aep

KINDS = ["damped", "gated"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_follows_the_square_of_the_response(kind: str) -> None:
    """The linear solution has no bias: what shows one has come from the nonlinear phases."""
    s = system(kind, seed=2)
    reference = exact(s)
    biases = [
        error(gradient(s, ap.AEP(response=response, tol=1e-9))[0], reference)
        for response in (0.1, 0.05, 0.025)
    ]
    assert biases[0] > 1e-5
    for wide, narrow in zip(biases, biases[1:], strict=False):
        assert wide / narrow == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_and_cold_phases_settle_at_one_gradient(kind: str) -> None:
    s = system(kind, seed=3)
    warm, cold = (
        gradient(s, ap.AEP(beta=0.05, tol=1e-9, start=start))[0] for start in ("adjoint", "zero")
    )
    assert error(warm, cold) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupted_start_is_corrected_by_the_phases(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a start that is 10 % off, each phase must move, and ends within its tolerance."""
    s = system(kind, seed=4)
    reference = exact(s)
    solve = aep.solve_adjoint

    def corrupted(problem: Any, products: Any, g: Tensor, *rest: Any) -> Any:
        found = solve(problem, products, g, *rest)
        noise = torch.randn(g.shape, generator=torch.Generator().manual_seed(0), dtype=g.dtype)
        value = found.value + 0.1 * noise * found.value.norm() / noise.norm()
        return replace(found, value=value, force=products.vjp(value) + g)

    estimator = ap.AEP(tol=1e-6, response=1e-4)
    honest, plain = gradient(s, estimator)
    monkeypatch.setattr(aep, "solve_adjoint", corrupted)
    found, certificate = gradient(s, estimator)
    assert float(certificate.adjoint_residual.max()) <= 1e-6
    assert certificate.adjoint_evaluations > plain.adjoint_evaluations + 4
    assert error(honest, reference) < 1e-5 and error(found, reference) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_each_sign_evaluates_the_nonlinear_force(kind: str) -> None:
    s = system(kind, seed=5)
    block = ap.Equilibrium(s.dynamics, ap.Anderson(tol=1e-12, max_steps=300), ap.AEP())
    z = block(s.x)
    assert block.certificate is not None
    rest, pushed = block.certificate.state, cotangent(s, z)
    seen: list[float] = []

    def watch(_: Any, given: tuple[Tensor, ...], __: Tensor) -> None:
        seen.append(float(((given[0] - rest) * pushed).sum()))

    s.dynamics.register_forward_hook(watch)
    s.cost(z).backward()
    assert min(seen) < 0 < max(seen)

"""Arnoldi and the tokens' own blocks against dense eigenvalues of explicit Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import altprop as ap
from altprop.equilibrium.spectra import token_blocks
from systems import System, damped, gated

TASKS = {"damped": lambda: damped(2, 4, 6, scale=1.5), "gated": lambda: gated(2, 4, 6)}


@pytest.fixture(params=TASKS)
def this(request: pytest.FixtureRequest) -> System:
    return TASKS[request.param]()


def per_sample(this: System) -> Tensor:
    """Return each sample's dense Jacobian at `z = x`, `(B, n, n)`."""
    n = this.x[0].numel()
    rows = [
        torch.autograd.functional.jacobian(lambda z, x=x: this.dynamics(z, x), x)
        for x in this.x.split(1)
    ]
    return torch.stack([row.reshape(n, n) for row in rows])


def test_arnoldi_finds_the_outermost_eigenvalues_complex_pairs_included(this: System) -> None:
    exact = torch.linalg.eigvals(per_sample(this))
    found = ap.spectrum(this.dynamics, this.x, this.x)
    assert torch.allclose(found.abscissa, exact.real.amax(1), rtol=1e-5)
    assert torch.allclose(found.radius, exact.abs().amax(1), rtol=1e-5)
    assert float(found.residual.max()) <= 1e-5


def test_a_short_arnoldi_run_reports_a_residual_that_is_not_small() -> None:
    this = damped(1, 4, 6, scale=1.5)
    assert float(ap.spectrum(this.dynamics, this.x, this.x, dimension=4).residual.max()) > 1e-3


def test_a_degenerate_jacobian_is_no_breakdown() -> None:
    leak = ap.from_function(lambda z, x: x - 2 * z)
    x = torch.randn(2, 5, dtype=torch.float64)
    found = ap.spectrum(leak, x, x)
    assert torch.allclose(found.values, torch.tensor(-2.0, dtype=torch.complex128))


def test_token_blocks_are_the_diagonal_blocks_of_the_jacobian(this: System) -> None:
    B, T, C = this.x.shape
    dense = per_sample(this).view(B, T, C, T, C)
    wanted = torch.stack([dense[:, t, :, t] for t in range(T)], 1)
    assert torch.allclose(token_blocks(this.dynamics, this.x, this.x), wanted, atol=1e-12)


def test_the_tokens_spectra_together_are_that_of_the_whole(this: System) -> None:
    tokens = ap.token_spectrum(this.dynamics, this.x, this.x)
    exact = torch.linalg.eigvals(per_sample(this))
    assert torch.allclose(tokens.abscissa.amax(1), exact.real.amax(1), rtol=1e-8)
    assert torch.allclose(tokens.radius.amax(1), exact.abs().amax(1), rtol=1e-8)


def test_the_numerical_abscissa_is_that_of_the_symmetric_part(this: System) -> None:
    J = per_sample(this)
    wanted = torch.linalg.eigvalsh((J + J.mT) / 2)[:, -1]
    assert torch.allclose(ap.numerical_abscissa(this.dynamics, this.x, this.x), wanted)


def test_a_solver_may_find_a_point_that_the_relaxation_leaves() -> None:
    """`F = (z − x)/2` is zero at `x` and pushes away from it."""
    away = ap.from_function(lambda z, x: 0.5 * (z - x))
    x = torch.randn(2, 3, dtype=torch.float64)
    z = ap.Equilibrium(away, ap.Anderson(tol=1e-10))(x)
    assert torch.allclose(z, x) and not ap.spectrum(away, z, x).reachable.any()


def test_the_step_limit_is_where_euler_stops_to_converge() -> None:
    """A rotation of frequency `b` with damping 1 needs `ε < 2 / (1 + b²)`."""
    turn = torch.tensor([[-1.0, 3.0], [-3.0, -1.0]], dtype=torch.float64)
    force = ap.from_function(lambda z, x: x + z @ turn.T)
    x = torch.randn(1, 2, dtype=torch.float64)
    found = ap.spectrum(force, x, x)
    assert found.reachable.all() and torch.allclose(found.step_limit, found.step_limit.new([0.2]))
    for step, converges in ((0.19, True), (0.21, False)):
        solver = ap.Euler(step=step, max_steps=2000, tol=1e-6)
        assert bool(solver.solve(lambda z: force(z, x), x, step=1.0).result) is converges
        assert bool((found.gain(step) < 1).all()) is converges

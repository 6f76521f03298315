"""Anderson's steps against the paper's, the best state, and plain steps where it stagnates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import altprop as ap
from systems import Force, contraction, randn, size, tensor, watched


def anderson(
    force: Force, z: Tensor, memory: int, step: float, ridge: float, count: int
) -> list[Tensor]:
    """Walker and Ni's iteration, one sample at a time, with the ridge as rows of the problem."""
    states = [z]
    dg: list[list[Tensor]] = [[] for _ in z]
    df: list[list[Tensor]] = [[] for _ in z]
    last: tuple[Tensor, Tensor] | None = None
    for _ in range(count - 1):
        f = force(states[-1])
        g = states[-1] + step * f
        new = []
        for i in range(len(z)):
            if last is None:
                new.append(g[i])
                continue
            dg[i] = [*dg[i], g[i] - last[0][i]][-memory:]
            df[i] = [*df[i], f[i] - last[1][i]][-memory:]
            F, G = torch.stack(df[i], 1), torch.stack(dg[i], 1)
            rows = torch.cat([F, math.sqrt(ridge) * torch.diag(F.norm(dim=0))])
            right = torch.cat([f[i], torch.zeros(F.shape[1], dtype=f.dtype)])
            new.append(g[i] - G @ torch.linalg.lstsq(rows, right[:, None]).solution[:, 0])
        last = g, f
        states.append(torch.stack(new))
    return states


@pytest.mark.parametrize("ridge", [1e-8, 1e-2, 0.5])
@pytest.mark.parametrize("memory", [1, 2, 5])
@pytest.mark.parametrize(("step", "mixing"), [(1.0, 1.0), (0.8, 0.5)])
def test_anderson_makes_the_steps_of_the_paper_with_a_ridge_of_each_columns_own_size(
    step: float, mixing: float, memory: int, ridge: float
) -> None:
    plain, start = contraction(), randn(2, 8, seed=5)
    force, seen = watched(plain)
    solver = ap.Anderson(memory=memory, ridge=ridge, mixing=mixing, tol=0, max_steps=9)
    found = solver.solve(force, start, step=step)
    wanted = anderson(plain, start, memory, step * mixing, ridge, 9)
    assert len(seen) == found.evaluations == 9
    for got, want in zip(seen, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    residuals = torch.stack([size(plain(z)) / size(z) for z in wanted])
    torch.testing.assert_close(found.residual, residuals.amin(0), rtol=1e-5, atol=1e-12)
    for i, n in enumerate(residuals.argmin(0).tolist()):
        torch.testing.assert_close(found.value[i], wanted[n][i], rtol=1e-7, atol=1e-9)


def test_anderson_returns_the_best_state_that_it_met_and_not_the_last() -> None:
    turn = tensor(-1.0, -3.0, 3.0, -1.0).view(2, 2)
    plain = lambda z: z @ turn.T + 1  # noqa: E731
    chosen = set()
    for limit in range(3, 9):
        force, seen = watched(plain)
        solver = ap.Anderson(memory=1, ridge=0.5, tol=0, max_steps=limit)
        found = solver.solve(force, randn(3, 2, seed=limit), step=0.9)
        residuals = torch.stack([size(plain(z)) / size(z) for z in seen])
        best = residuals.argmin(0)
        chosen |= {limit - 1 - int(n) for n in best}
        torch.testing.assert_close(found.residual, residuals.amin(0))
        for i, n in enumerate(best.tolist()):
            assert torch.equal(found.value[i], seen[n][i])
        torch.testing.assert_close(found.force, plain(found.value))
    assert len(chosen) > 2  # it was the last one in some, and others in others


def sharp_blocks() -> list[tuple[Force, Tensor]]:
    """Return gated blocks of large weights, 64 samples each; most of them do not contract."""
    systems: list[tuple[Force, Tensor]] = []
    for seed in (3, 5, 12):
        torch.manual_seed(seed)
        block = ap.GatedBlock(8, heads=2, expansion=2, init_std=0.5)
        torch.nn.init.uniform_(block.alpha, 0, 0.5)
        x = torch.randn(64, 8, 8)
        systems.append((block.under(x).force, x))
    return systems


def solved_by(solver: ap.AbstractSolver) -> Tensor:
    """Tell of each sample of the sharp blocks whether a solver finds its equilibrium."""
    found = [solver.solve(force, x, step=1.0) for force, x in sharp_blocks()]
    return torch.cat([each.residual <= solver.tol for each in found])


@torch.no_grad()
def test_where_extrapolation_stagnates_anderson_goes_on_by_plain_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = solved_by(ap.FixedPoint(tol=7e-4, max_steps=30))
    safe = solved_by(ap.Anderson(max_steps=200))
    monkeypatch.setattr("altprop.equilibrium.solvers.anderson._PATIENCE", 10**9)
    stuck = plain & ~solved_by(ap.Anderson(max_steps=400))
    assert int(stuck.sum()) >= 4  # they rest at residuals of 4e-3 to 2e-2, whatever their time
    assert bool(safe[stuck].all())

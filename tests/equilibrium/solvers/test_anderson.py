"""Anderson's steps against the paper's, and what it foresees of the step to come."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import altprop as ap
from altprop.equilibrium.solvers.solver import with_limits
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


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-5])
def test_a_sample_whose_arrival_is_foreseen_is_left_alone_by_a_slow_mate(tol: float) -> None:
    rates = torch.stack([torch.linspace(a, 1.3, 8).double() for a in (0.8, 0.1)])
    force = lambda z: rates[: len(z)] * (1 - z) + 0.1 * torch.sin(z)  # noqa: E731
    start = randn(2, 8, seed=1)
    solver = ap.Anderson(tol=tol)
    together, ahead = solver.approach(force, start, step=1.0)
    alone, own = solver.approach(force, start[:1], step=1.0)
    assert together.evaluations > alone.evaluations
    torch.testing.assert_close(together.value[:1], alone.value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ahead[:1], own, rtol=1e-12, atol=1e-12)
    # and it was foreseen rightly: where it goes on to, it has arrived
    assert float((size(force(ahead[:1])) / size(ahead[:1])).max()) <= tol


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-7])
def test_it_goes_on_to_the_state_that_it_would_have_tried_next(tol: float) -> None:
    rates = torch.linspace(0.4, 1.6, 8, dtype=torch.float64)
    start = torch.randn(2, 8, dtype=torch.float64)
    force, seen = watched(lambda z: rates * (1 - z) + 0.2 * torch.sin(z))
    solver = ap.Anderson(tol=tol)
    found, ahead = solver.approach(force, start, step=1.0)
    count = len(seen)
    assert found.evaluations == count
    seen.clear()
    with_limits(solver, 0, count + 1).solve(force, start, step=1.0)
    for i in range(2):  # a sample that had arrived before goes on from where it stood
        assert any(torch.allclose(ahead[i], z[i], rtol=1e-9, atol=1e-12) for z in seen[1:])
    assert any(torch.allclose(ahead[i], seen[-1][i], rtol=1e-9, atol=1e-12) for i in range(2))


SCRIPTS = [
    (1.0, 0.5, 0.2, 0.1, 0.05, 0.01, 0.001),
    (1.0, 0.1, 0.05, 0.04, 0.01, 0.005, 0.001),
    (1.0, 0.9, 0.1, 0.05, 0.02, 0.005, 0.001),
    (1.0, 0.01, 10.0, 1.0, 0.1, 0.02, 0.001),  # the best lies far back: no state to go on from
    (1.0, 2.0, 0.4, 0.1, 0.03, 0.01, 0.001),
]


@pytest.mark.parametrize("tol", [0.2, 0.05, 0.02, 0.008, 0.002])
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_an_arrival_is_foreseen_by_the_slowest_of_the_last_three_rates(
    script: tuple[float, ...], tol: float
) -> None:
    """A residual is taken to shrink as in the slowest of three steps, and 1.3 times less."""
    expected = len(script)
    for n, residual in enumerate(script):
        rates = [b / a for a, b in zip(script[:n], script[1 : n + 1], strict=True)][-3:]
        foreseen = len(rates) >= 2 and 1.3 * residual * max(rates) <= tol
        if residual <= tol or (foreseen and residual <= min(script[: n + 1])):
            expected = n + 1
            break
    far = 1e9 * torch.ones(1, 4, dtype=torch.float64)  # so that a step hardly moves the state
    residuals = iter([*script, *[script[-1]] * 9])
    found, _ = ap.Anderson(tol=1e-6 * tol).approach(
        lambda z: 1e-6 * next(residuals) * far, far, step=1.0
    )
    assert found.evaluations == expected


def test_a_state_beside_the_best_one_is_no_state_to_go_on_from() -> None:
    # a force whose far side leads astray: from where the last step fell, the next would fall too
    def force(z: Tensor) -> Tensor:
        return torch.where(z > 2, 3 * z, 1.02 - z)

    solver = ap.Anderson(tol=1e-9, max_steps=3, mixing=1.0)
    found, ahead = solver.approach(force, tensor(2.5).view(1, 1), step=1.0)
    best = float(found.value)
    # the newest state is worse than the best: go on by a plain step from the best
    assert float(ahead) == pytest.approx(best + float(found.force))

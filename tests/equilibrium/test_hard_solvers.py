"""Krylov, Newton, fallback and adaptive relaxation: against dense algebra, and on hard cases."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import altprop as ap

B, N = 3, 12


def linear(seed: int, shift: float = -1.5) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a force `A z + b` of `B` samples, and its zero by dense algebra."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(B, N, N, generator=generator, dtype=torch.float64) / math.sqrt(N)
    a += shift * torch.eye(N, dtype=torch.float64)
    b = torch.randn(B, N, generator=generator, dtype=torch.float64)
    return lambda z: (a @ z.unsqueeze(2)).squeeze(2) + b, torch.linalg.solve(a, -b)


def start() -> Tensor:
    return torch.zeros(B, N, dtype=torch.float64)


def counted(force: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    calls = [0]

    def wrapped(z: Tensor) -> Tensor:
        calls[0] += 1
        return force(z)

    return wrapped, calls


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), shift=st.sampled_from([-1.5, 0.0, 1.5]))
def test_gmres_solves_any_linear_force_whatever_its_stability(seed: int, shift: float) -> None:
    force, expected = linear(seed, shift)
    solution = ap.GMRES(tol=1e-11).solve(force, start(), step=0.1)
    assert solution.result is ap.Result.CONVERGED
    assert solution.evaluations <= 2 * (N + 2)
    torch.testing.assert_close(solution.value, expected, rtol=1e-6, atol=1e-6)


def test_restarted_gmres_gets_there_within_its_memory() -> None:
    force, expected = linear(0)
    solution = ap.GMRES(restart=4, tol=1e-10, max_steps=400).solve(force, start(), step=0.1)
    assert solution.result is ap.Result.CONVERGED
    torch.testing.assert_close(solution.value, expected, rtol=1e-8, atol=1e-8)


def test_gmres_refuses_a_force_that_is_not_linear() -> None:
    force, _ = linear(0)
    with pytest.raises(ap.RuleError, match="not linear.*NewtonKrylov"):
        ap.GMRES().solve(lambda z: force(z) + z**3, start(), step=0.1)


def test_gmres_survives_singular_and_trivial_samples() -> None:
    diagonal = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    force = lambda z: diagonal * z + b  # noqa: E731
    solution = ap.GMRES(tol=1e-12).solve(force, torch.ones(3, 2, dtype=torch.float64), step=1.0)
    assert (solution.residual < 1e-12).tolist() == [True, True, False]
    assert torch.isfinite(solution.value).all()
    assert solution.result is ap.Result.MAX_STEPS


SOLVERS = [
    ap.GMRES(tol=1e-10),
    ap.NewtonKrylov(tol=1e-10),
    ap.Fallback(tol=1e-10),
    ap.Adaptive(tol=1e-8),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_batch_mates_change_nothing_and_evaluations_are_counted(solver: ap.AbstractSolver) -> None:
    force, _ = linear(1, shift=-2.5)
    wrapped, calls = counted(force)
    together = solver.solve(wrapped, start(), step=0.3)
    assert together.evaluations == calls[0]
    torch.testing.assert_close(force(together.value), together.force)

    def spoilt(z: Tensor) -> Tensor:  # the last sample runs away
        f = force(z)
        return torch.cat([f[:-1], torch.full_like(f[-1:], torch.nan)])

    if isinstance(solver, ap.Fallback):
        assert solver.solve(spoilt, start(), step=0.3).residual[:-1].max() <= solver.tol
    else:
        beside = solver.solve(spoilt, start(), step=0.3)
        assert beside.result is ap.Result.NON_FINITE
        torch.testing.assert_close(beside.value[:-1], together.value[:-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("limit", [1, 2, 7])
def test_the_limit_of_evaluations_is_kept(solver: ap.AbstractSolver, limit: int) -> None:
    force, calls = counted(linear(2)[0])
    short = type(solver)(tol=1e-12, max_steps=limit)  # type: ignore[call-arg]
    solution = short.solve(force, start(), step=0.3)
    assert calls[0] == solution.evaluations <= limit
    assert solution.result is ap.Result.MAX_STEPS


def test_newton_finds_a_point_that_repels_the_relaxation() -> None:
    force = lambda z: z - z**3 / 3 - 0.1  # noqa: E731  unstable near 0.1, stable near ±√3
    z = torch.full((1, 1), 0.2, dtype=torch.float64)
    newton = ap.NewtonKrylov(tol=1e-12).solve(force, z, step=0.1)
    relaxed = ap.Adaptive(tol=1e-8).solve(force, z, step=0.1)
    assert newton.result and relaxed.result
    assert abs(float(newton.value) - 0.1) < 0.01
    assert float(relaxed.value) > 1


def test_adaptive_relaxation_follows_the_exact_trajectory() -> None:
    a = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64)
    z = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    wanted = {1e-3: 0.0, 1e-6: 0.0}
    for rtol in wanted:
        solver = ap.Adaptive(tol=0, rtol=rtol, max_steps=600)
        for moment in solver.trajectory(lambda s: s @ a.T, z, step=0.1):
            if float(moment.time.max()) > 5:
                break
            for sample in range(2):
                exact = torch.linalg.matrix_exp(moment.time[sample] * a) @ z[sample]
                gap = float((moment.value[sample] - exact).norm() / exact.norm())
                wanted[rtol] = max(wanted[rtol], gap)
    assert wanted[1e-3] < 0.05
    assert wanted[1e-6] < 1e-4


def test_samples_take_their_own_steps() -> None:
    rates = torch.tensor([[-1.0], [-100.0]], dtype=torch.float64)
    solver = ap.Adaptive(tol=1e-6, rtol=1e-3)
    *_, last = solver.trajectory(
        lambda z: rates * (z - 1), torch.full((2, 1), 3.0, dtype=torch.float64), step=0.1
    )
    assert float(last.time[0]) > 10 * float(last.time[1]) > 0


def test_the_chain_leaves_finished_samples_alone_and_sends_only_the_hard_one_on() -> None:
    def force(z: Tensor) -> Tensor:  # an easy sample, and a rotating one that Anderson(1) misses
        turn = torch.stack([z[1, 0] - 9 * z[1, 1], z[1, 1] + 9 * z[1, 0]])
        return torch.stack([1 - z[0], 1 + turn])

    z = torch.zeros(2, 2, dtype=torch.float64)
    weak = ap.Anderson(memory=1, max_steps=8)
    alone = weak.solve(force, z, step=1.0)
    chain = ap.Fallback(solvers=(weak, ap.NewtonKrylov()), tol=7e-4).solve(force, z, step=1.0)
    assert alone.result is not ap.Result.CONVERGED
    assert chain.result is ap.Result.CONVERGED
    assert torch.equal(chain.value[0], alone.value[0])


def test_the_chain_keeps_the_best_state_when_every_solver_makes_it_worse() -> None:
    force = lambda z: z * z + 1  # noqa: E731  nothing is a zero
    z = torch.full((1, 2), 0.1, dtype=torch.float64)
    chain = ap.Fallback(max_steps=300).solve(force, z, step=0.1)
    assert chain.result is ap.Result.MAX_STEPS
    assert float(chain.residual) <= float(force(z).norm() / z.norm())
    assert torch.isfinite(chain.value).all()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda: ap.Fallback(solvers=()), "Fallback\\(solvers=\\(Anderson"),
        (lambda: ap.Fallback(solvers=(ap.Anderson,)), "expected one solver or more"),  # type: ignore[arg-type]
        (lambda: ap.GMRES(restart=0), "restart is 0"),
        (lambda: ap.NewtonKrylov(forcing=2.0), "forcing is 2.0"),
        (lambda: ap.Adaptive(rtol=0), "rtol is 0"),
        (lambda: ap.GMRES(tol=-1.0), "tol is -1.0"),
    ],
)
def test_wrong_options_are_refused_by_name(wrong: Callable[[], object], named: str) -> None:
    with pytest.raises(ap.ConfigError, match=named):
        wrong()


def benchmark(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


BENCHMARK = benchmark("solvers")
HARD = list(BENCHMARK.cases())


@pytest.mark.parametrize("case", HARD, ids=lambda c: c.name)
def test_the_chain_solves_every_case_with_a_fixed_point_and_says_so_of_the_other(case) -> None:  # type: ignore[no-untyped-def]
    solution = ap.Fallback(tol=1e-8).solve(case.force, case.start, step=case.step)
    assert bool(solution.result) == case.has_fixed_point
    worst = case.force(solution.value).norm(dim=1) / solution.value.norm(dim=1)
    assert (float(worst.max()) < 1.01e-8) == case.has_fixed_point


def test_scattered_starts_are_the_same_for_every_sample_and_every_run() -> None:
    case = next(c for c in HARD if "not dissipative" in c.name)
    solver = ap.Scattered(tol=1e-8)
    assert ap.NewtonKrylov(tol=1e-8).solve(case.force, case.start, step=case.step).result is (
        ap.Result.MAX_STEPS
    )
    torch.manual_seed(1)
    first = solver.solve(case.force, case.start, step=case.step)
    torch.manual_seed(2)
    again = solver.solve(case.force, case.start, step=case.step)
    assert first.result is ap.Result.CONVERGED
    assert torch.equal(first.value, again.value)
    other = ap.Scattered(tol=1e-8, seed=3).solve(case.force, case.start, step=case.step)
    assert other.result is ap.Result.CONVERGED


def test_a_sample_that_is_done_is_not_scattered_for_the_sake_of_its_mates() -> None:
    start = torch.tensor([[math.pi + 1e-5], [1.0]], dtype=torch.float64)

    def force(z: Tensor) -> Tensor:  # the first has many roots, the second none
        return torch.cat([z[:1].sin(), torch.ones_like(z[1:])])

    found = ap.Scattered(tol=1e-4, starts=10).solve(force, start, step=1.0)
    assert torch.equal(found.value[0], start[0]) and found.result is ap.Result.MAX_STEPS


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ap.Scattered(solver=ap.Anderson), "expected a solver such as NewtonKrylov"),  # type: ignore[arg-type]
        (lambda: ap.Scattered(starts=0), "starts is 0"),
        (lambda: ap.Scattered(spread=-1.0), "spread is -1.0"),
    ],
)
def test_scattered_refuses_what_it_cannot_do(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ap.ConfigError, match=words):
        make()


@pytest.mark.parametrize("case", [c for c in HARD if c.has_fixed_point], ids=lambda c: c.name)
def test_a_relaxation_stays_only_where_the_spectrum_lets_it(case) -> None:  # type: ignore[no-untyped-def]
    found = ap.Fallback(tol=1e-8).solve(case.force, case.start, step=case.step)
    top = BENCHMARK.abscissa(case, found.value)
    if abs(top) < 0.05:
        pytest.skip("too near to criticality for a short relaxation to tell")
    generator = torch.Generator().manual_seed(0)
    push = torch.randn(found.value.shape, generator=generator, dtype=torch.float64)
    near = found.value + 1e-3 * push
    relaxed = ap.Adaptive(tol=1e-8, max_steps=6000, rtol=1e-4).solve(
        case.force, near, step=case.step
    )
    gap = float((relaxed.value - found.value).norm(dim=1).max())
    assert (gap < 1e-4) == (top < 0)

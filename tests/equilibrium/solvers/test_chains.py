"""Chains of solvers and scattered starts: where each goes next, and which hard cases they solve."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import altprop as ap
from altprop.equilibrium.solvers.solver import AbstractSolver, conclude, relative_residual
from systems import Force, contraction, randn, size, tensor, watched

R = ap.Result


def test_a_chain_goes_on_from_the_start_where_its_first_solver_is_lost() -> None:
    rates = torch.tensor([[1.0, 1.3], [40.0, 55.0]], dtype=torch.float64)
    force = lambda z: 1 - rates * z  # noqa: E731
    start = randn(2, 2, seed=12)
    first = ap.Euler(step=0.5, max_steps=300)  # the second sample runs away to infinity
    assert replace(first, tol=1e-8).solve(force, start, step=1.0).result is R.NON_FINITE
    found = ap.Fallback((first, ap.NewtonKrylov()), tol=1e-8).solve(force, start, step=1.0)
    assert found.result is R.CONVERGED
    torch.testing.assert_close(found.value, 1 / rates, rtol=1e-6, atol=0)


def test_a_chain_hands_each_solver_the_best_state_so_far_and_counts_all() -> None:
    plain, start = contraction(), randn(2, 8, seed=5)
    force, seen = watched(plain)
    members = (ap.Anderson(max_steps=4), ap.Euler(step=0.7, max_steps=3), ap.NewtonKrylov())
    found = ap.Fallback(solvers=members, tol=1e-9).solve(force, start, step=1.0)
    first = ap.Anderson(max_steps=4, tol=1e-9).solve(plain, start, step=1.0)
    second = ap.Euler(step=0.7, max_steps=3, tol=1e-9).solve(plain, first.value, step=1.0)
    assert bool((second.residual < first.residual).all())
    third = ap.NewtonKrylov(tol=1e-9).solve(plain, second.value, step=1.0)
    assert found.evaluations == len(seen) == sum(s.evaluations for s in (first, second, third))
    torch.testing.assert_close(found.value, third.value, rtol=1e-12, atol=0)
    # and takes no state that is worse than one it had
    members = (ap.Anderson(max_steps=4), ap.Euler(step=9.0, max_steps=3))
    found = ap.Fallback(solvers=members, tol=1e-9).solve(plain, start, step=1.0)
    assert found.result is R.MAX_STEPS and torch.equal(found.value, first.value)
    assert found.evaluations == first.evaluations + 4


def test_a_chain_keeps_its_own_limit_of_evaluations() -> None:
    force, seen = watched(contraction())
    chain = ap.Fallback((ap.Anderson(max_steps=4), ap.Anderson()), tol=1e-300, max_steps=9)
    assert chain.solve(force, randn(2, 8, seed=5), step=1.0).evaluations == len(seen) == 9


@dataclass(frozen=True)
class Stuck(AbstractSolver):
    """Solves nothing, and keeps where it was sent, to what tolerance and with what limit."""

    tol: float = 7e-4
    max_steps: int = 3
    sent: list[tuple[Tensor, float, int]] = field(default_factory=list, compare=False)

    def solve(
        self, force: Force, start: Tensor, *, step: float, scale: Tensor | None = None
    ) -> ap.Solution:
        self.sent.append((start.clone(), self.tol, self.max_steps))
        f = force(start)
        residual = relative_residual(f, start, scale)
        return ap.Solution(start, f, residual, self.max_steps, conclude(residual, self.tol))


NOWHERE = lambda z: 1 + z**2  # noqa: E731


def test_starts_lie_near_and_far_and_are_the_same_for_every_sample_and_run() -> None:
    start = torch.stack([randn(4, seed=9), 100 * randn(4, seed=10)])
    inner = Stuck()
    solver = ap.Scattered(inner, starts=7, spread=5.0, tol=1e-5)
    solver.solve(NOWHERE, start, step=1.0)
    first, *rest = [at for at, _, _ in inner.sent]
    assert torch.equal(first, start) and len(rest) == 7
    for number, at in enumerate(rest, 1):
        golden = number * (math.sqrt(5) - 1) / 2
        away = 5.0 * (golden - math.floor(golden))
        torch.testing.assert_close(size(at - start) / size(start), torch.full((2,), away).double())
        # one direction for all samples, and another each time
        unit = (at - start) / size(at - start)[:, None]
        torch.testing.assert_close(unit[0], unit[1], rtol=1e-6, atol=1e-6)
    directions = torch.stack([(at - start)[0] / (at - start)[0].norm() for at in rest])
    gram = directions @ directions.T - torch.eye(7)
    assert float(gram.abs().max()) < 0.9999
    assert {(tol, limit) for _, tol, limit in inner.sent} == {(1e-5, 3)}
    torch.manual_seed(77)  # whatever else the program draws, and however large the batch is
    for part in (start, start[:1]):
        again = Stuck()
        ap.Scattered(again, starts=7, spread=5.0, tol=1e-5).solve(NOWHERE, part, step=1.0)
        for (a, _, _), b in zip(again.sent, [start, *rest], strict=True):
            assert torch.equal(a, b[: len(part)])
    other = Stuck()
    ap.Scattered(other, starts=7, spread=5.0, seed=1).solve(NOWHERE, start, step=1.0)
    assert not torch.allclose(other.sent[1][0], rest[0])


def test_starts_around_zero_are_as_far_as_the_forces_first_step() -> None:
    inner = Stuck()
    start = torch.zeros(1, 4, dtype=torch.float64)
    ap.Scattered(inner, starts=1, spread=10.0).solve(NOWHERE, start, step=0.5)
    distance = float(inner.sent[1][0].norm())
    assert distance == pytest.approx(10 * 0.6180339887 * 0.5 * 2.0)  # ‖F(0)‖ = 2


def test_scattering_ends_with_its_limit_of_evaluations_or_when_all_are_done() -> None:
    inner = Stuck(max_steps=4)
    found = ap.Scattered(inner, max_steps=10).solve(NOWHERE, randn(1, 2), step=1.0)
    assert [limit for _, _, limit in inner.sent] == [4, 4, 2] and found.evaluations == 10
    done = Stuck()
    force = lambda z: torch.where(z > 0, 0.0, 1.0)  # noqa: E731  solved wherever it is positive
    found = ap.Scattered(done, starts=30).solve(force, torch.full((1, 1), -1.0), step=1.0)
    assert found.result is R.CONVERGED and 1 < len(done.sent) < 20


def test_a_sample_that_is_done_stays_where_it_is_solved() -> None:
    inner = Stuck()
    start = tensor(2.0, -1.0).view(2, 1)
    force = lambda z: torch.where(z > 0, 0.0, 1 + z**2)  # noqa: E731
    found = ap.Scattered(inner, starts=12).solve(force, start, step=1.0)
    assert found.result is R.CONVERGED and float(found.value[0]) == 2.0
    assert all(float(at[0]) == 2.0 for at, _, _ in inner.sent)
    # and what is returned of the other is the first of its starts that solved it
    assert float(found.value[1]) == next(float(at[1]) for at, _, _ in inner.sent if at[1] > 0)


def test_of_many_starts_the_best_is_kept() -> None:
    inner = Stuck()
    start = tensor(1.0, 2.0, 3.0).view(1, 3)
    solver, scale = ap.Scattered(inner, starts=9), tensor(3.0)
    found = solver.solve(NOWHERE, start, step=1.0, scale=scale)
    residuals = [float(size(NOWHERE(at))) / 3 for at, _, _ in inner.sent]
    assert float(found.residual) == pytest.approx(min(residuals))
    assert torch.equal(found.value, inner.sent[residuals.index(min(residuals))][0])


def benchmark(name: str) -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


HARD = list(benchmark("solvers").cases())


@pytest.mark.parametrize("case", HARD, ids=lambda c: c.name)
def test_the_chain_solves_every_case_with_a_fixed_point_and_says_so_of_the_other(case) -> None:
    solution = ap.Fallback(tol=1e-8).solve(case.force, case.start, step=case.step)
    assert bool(solution.result) == case.has_fixed_point
    worst = case.force(solution.value).norm(dim=1) / solution.value.norm(dim=1)
    assert (float(worst.max()) < 1.01e-8) == case.has_fixed_point

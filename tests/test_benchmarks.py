"""The parts of the benchmarks that decide something, or that a figure rests on."""

from __future__ import annotations

import pytest
import torch

import altprop as ap
import floors
from altprop.lab.timing import Ratio, paired, ratio
from arms import (
    EXACT_ENOUGH,
    FREE_TOLERANCES,
    NO_WORSE,
    PUBLISHED,
    UNIT,
    Arm,
    accuracy,
    as_good,
    by_library,
    loosest,
)
from floors import Floor, behind
from problems import Head, Problem
from published import published_aep

LOWER = Floor("a", "b", 2.0, "lower")
HIGHER = Floor("a", "b", 2.0, "higher")


def small_problem() -> Problem:
    B, T, C, V = 2, 6, 8, 11
    dynamics = ap.DampedAttention(C, heads=2).double()
    x = torch.randn(B, T, C).double()
    head = Head(torch.randn(V, C).double(), torch.randint(V, (B * T,)))
    return Problem("small", dynamics, x, head)


@pytest.mark.parametrize(("floor", "median"), [(LOWER, 2.5), (HIGHER, 1.5)])
def test_a_ratio_behind_its_floor_by_more_than_its_noise_is_named_with_all_figures(
    floor: Floor, median: float
) -> None:
    (complaint,) = behind([floor], {("a", "b"): Ratio(median, median - 0.3, median + 0.3)})
    for part in ("a / b", str(median), "± 0.3", "floor of 2"):
        assert part in complaint


@pytest.mark.parametrize("floor", [LOWER, HIGHER])
@pytest.mark.parametrize("median", [1.8, 2.2])
def test_a_ratio_behind_its_floor_within_its_noise_passes(floor: Floor, median: float) -> None:
    assert behind([floor], {("a", "b"): Ratio(median, median - 0.3, median + 0.3)}) == []


@pytest.mark.parametrize(("floor", "median"), [(LOWER, 0.1), (HIGHER, 10.0)])
def test_a_ratio_ahead_of_its_floor_passes_whatever_its_distance(
    floor: Floor, median: float
) -> None:
    assert behind([floor], {("a", "b"): Ratio(median, median, median)}) == []


def test_a_floor_that_was_not_measured_is_no_pass() -> None:
    with pytest.raises(KeyError):
        behind([LOWER], {})


def test_the_committed_floors_name_arms_that_are_timed() -> None:
    committed = floors.load()
    assert committed
    names = {UNIT, PUBLISHED, "AEP", "Implicit"}
    assert all({floor.over, floor.under} <= names for floor in committed)


def test_a_ratio_is_the_median_of_the_rounds_ratios_and_not_the_ratio_of_medians() -> None:
    found = ratio({"a": [2.0, 6.0, 9.0], "b": [1.0, 1.0, 10.0]}, "a", "b")
    assert found.median == 2.0  # the medians' own ratio is 6
    assert found.low < found.median < found.high


def test_rounds_too_short_for_the_clock_are_compared_together() -> None:
    found = ratio({"a": [0.0, 0.02, 0.01], "b": [0.0, 0.0, 0.01]}, "a", "b")
    assert (found.low, found.median, found.high) == (3.0, 3.0, 3.0)
    assert ratio({"a": [0.0], "b": [0.0]}, "a", "b").median == 1.0


def test_every_round_runs_every_arm_once() -> None:
    calls: list[str] = []
    times = paired({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    pairs = [set(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert pairs == [{"a", "b"}] * 5  # two of them to warm up
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3}


def test_the_published_procedure_from_scratch_equals_the_library_s() -> None:
    problem = small_problem()
    relaxation = ap.Euler(step=0.1, max_steps=120)
    block = ap.Equilibrium(problem.dynamics, relaxation, ap.PublishedAEP())
    own = problem.differentiate(lambda x: block(x, cost=problem.cost), problem.dynamics)
    own = {name: g.clone() for name, g in own.items()}
    # the library takes one step more, for its certificate
    assert accuracy(published_aep(problem), own).worst > 1 - 1e-6


def test_the_search_finds_the_fewest_evaluations_that_are_exact_enough() -> None:
    problem = small_problem()
    exact, terms = problem.exact(), range(1, 12)

    def make(free: float, k: int) -> Arm:
        return by_library(problem, ap.OneStep(k), ap.Anderson(tol=free))

    def cost(arm: Arm) -> int:
        near = accuracy(arm.run(), exact).worst
        seen = arm.seen()
        return seen.free + seen.adjoint if near >= EXACT_ENOUGH else 1000

    found = loosest(make, terms, exact)
    assert found is not None
    assert cost(found) == min(cost(make(free, k)) for free in FREE_TOLERANCES for k in terms)
    assert loosest(make, [1], exact) is None


def test_the_loosest_that_is_as_good_loses_next_to_nothing() -> None:
    problem = small_problem()
    exact = problem.exact()
    arms = [by_library(problem, ap.OneStep(1), ap.Anderson(tol=t)) for t in FREE_TOLERANCES]
    near = [accuracy(arm.run(), exact).worst for arm in arms]
    at = arms.index(as_good(arms, exact))
    assert near[at] >= near[0] - NO_WORSE and near[0] < EXACT_ENOUGH
    assert at > 0 and all(each < near[0] - NO_WORSE for each in near[at + 1 :])

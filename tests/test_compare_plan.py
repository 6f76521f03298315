"""Which trials come next: a search that leaves the edge, then every seed, and nothing twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from altprop import FeedbackAlignment
from altprop.lab.compare.arms import Arm
from altprop.lab.compare.plan import Plan, equal_steps, search, wanted
from altprop.lab.compare.trial import Key

PLAN = Plan((3, 4), 100, 50, (1e-3, 3e-3, 1e-2), 6, True, True)
ARM = Arm("a rule", FeedbackAlignment())


def outcome(**given: Any) -> dict[str, Any]:
    return {"score": None, "refused": None, "failed": None, **given}


def done(score: Callable[[float], float | None], plan: Plan = PLAN) -> dict[Key, Any]:
    """Return the outcomes of a whole search over a landscape of scores."""
    outcomes: dict[Key, Any] = {}
    while rates := search(ARM, plan, outcomes).wanted:
        for rate in rates:
            outcomes[ARM.name, "search", rate, plan.seeds[0]] = outcome(score=score(rate))
    return outcomes


def peak(at: float) -> Callable[[float], float]:
    return lambda rate: -abs(math.log(rate / at))


def test_a_search_with_its_best_inside_ends_after_the_first_rates() -> None:
    found = search(ARM, PLAN, done(peak(3e-3)))
    assert (found.best, found.edge, len(found.tried)) == (3e-3, False, 3)


@pytest.mark.parametrize(("at", "best"), [(3e-2, 3.3e-2), (4e-4, 3.3e-4)])
def test_a_search_widens_until_its_best_lies_inside(at: float, best: float) -> None:
    found = search(ARM, PLAN, done(peak(at)))
    assert (found.best, found.edge) == (best, False)
    assert 3 < len(found.tried) <= PLAN.budget


@pytest.mark.parametrize("at", [1e3, 1e-9])
def test_a_search_whose_budget_is_spent_marks_a_best_at_the_edge(at: float) -> None:
    found = search(ARM, PLAN, done(peak(at)))
    rates = [rate for rate, _ in found.tried]
    assert found.edge and len(rates) == PLAN.budget and found.best in (rates[0], rates[-1])


def test_a_lower_score_may_be_the_better_one() -> None:
    plan = replace(PLAN, higher=False)
    assert search(ARM, plan, done(lambda r: -peak(3e-3)(r), plan)).best == 3e-3


def test_of_equal_scores_the_most_central_rate_is_taken() -> None:
    found = search(ARM, PLAN, done(lambda rate: 90.0))
    assert (found.best, found.edge) == (3e-3, False)


def test_rates_that_diverge_lose_and_all_of_them_lead_to_lower_ones() -> None:
    found = search(ARM, PLAN, done(lambda rate: None if rate > 5e-4 else 1.0))
    assert found.best is not None and found.best < 5e-4
    outcomes = done(lambda rate: None)
    assert wanted(ARM, PLAN, outcomes) == []
    tried = search(ARM, PLAN, outcomes).tried
    assert len(tried) == PLAN.budget and tried[-1][0] == max(PLAN.rates)


def test_every_seed_and_the_cost_are_wanted_at_the_best_rate_alone() -> None:
    jobs = wanted(ARM, PLAN, done(peak(3e-3)))
    assert {(job.phase, job.rate, job.seed, job.steps) for job in jobs} == {
        ("cost", 3e-3, 3, 100), ("final", 3e-3, 3, 100), ("final", 3e-3, 4, 100),
    }  # fmt: skip
    assert [job.seed for job in jobs if job.audited] == [3]


def test_what_is_done_is_not_wanted_again() -> None:
    outcomes = done(peak(3e-3))
    first, *rest = wanted(ARM, PLAN, outcomes)
    outcomes[first.key] = outcome(cost={"relative": 1.0})
    assert wanted(ARM, PLAN, outcomes) == rest
    del outcomes[ARM.name, "search", 1e-3, 3]
    assert [job.rate for job in wanted(ARM, PLAN, outcomes)] == [1e-3]


@pytest.mark.parametrize(("relative", "steps"), [(4.0, 25), (0.5, 200), (1.02, 100), (3.0, 33)])
def test_at_equal_cost_an_arm_has_as_many_steps_as_backprop_s_cost_buys(
    relative: float, steps: int
) -> None:
    outcomes = done(peak(3e-3))
    outcomes[ARM.name, "cost", 3e-3, 3] = outcome(cost={"relative": relative})
    assert equal_steps(ARM, PLAN, 3e-3, outcomes) == steps
    equal = [job.steps for job in wanted(ARM, PLAN, outcomes) if job.phase == "equal"]
    assert equal == ([] if steps == 100 else [steps, steps])
    assert equal_steps(ARM, replace(PLAN, equal_cost=False), 3e-3, outcomes) is None


def test_a_refused_arm_wants_nothing_more() -> None:
    outcomes: dict[Key, Any] = {(ARM.name, "search", 1e-3, 3): outcome(refused="it does not fit")}
    assert wanted(ARM, PLAN, outcomes) == []


def test_a_budget_of_one_takes_the_only_rate_without_a_search() -> None:
    plan = replace(PLAN, rates=(2e-3,), budget=1)
    assert {job.phase for job in wanted(ARM, plan, {})} == {"cost", "final"}
    assert search(ARM, plan, {}).best == 2e-3 and search(ARM, plan, {}).edge

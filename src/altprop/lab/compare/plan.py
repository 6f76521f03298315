"""Which trials a comparison is made of: a search of the rate, and then every seed at the best.

What comes next follows from the outcomes that are there, so that an interrupted comparison goes on
where it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from altprop.lab.compare.arms import Arm
from altprop.lab.compare.trial import Job, Key
from altprop.lab.edges import beyond, open_ends

Outcomes = Mapping[Key, Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """How every arm is treated.

    `rates`, where a search begins, in order; `budget`, how many rates an arm may try; `higher`,
    whether a higher score is better; `equal_cost`, whether every arm is also trained for as long as
    backprop takes.
    """

    seeds: tuple[int, ...]
    steps: int
    search_steps: int
    rates: tuple[float, ...]
    budget: int
    higher: bool
    equal_cost: bool


@dataclass(frozen=True)
class Search:
    """The search of an arm's rate as it stands.

    `tried`, rate and score (`None`: it failed), in order; `best`, once the search is over; `edge`,
    whether the best lies at the edge of what was tried; `wanted`, what is to be tried next.
    """

    tried: tuple[tuple[float, float | None], ...]
    best: float | None
    edge: bool
    wanted: tuple[float, ...]


def search(arm: Arm, plan: Plan, outcomes: Outcomes) -> Search:
    """Return how far the search of an arm's rate has come.

    Where the best lies at the edge, a rate beyond it is tried, as long as the budget lasts.
    """
    if plan.budget == 1:
        return Search((), plan.rates[0], True, ())
    scores: dict[float, float | None] = {}
    rates = list(plan.rates)
    while True:
        for rate in rates:
            outcome = outcomes.get(_search_job(arm, plan, rate).key)
            if outcome is not None:
                scores[rate] = outcome["score"]
        tried = tuple((rate, scores[rate]) for rate in sorted(scores))
        if missing := tuple(rate for rate in rates if rate not in scores):
            return Search(tried, None, False, missing)
        best = tried[_best(tried, plan.higher)][0]
        ends = open_ends(best, scores, log=True)
        if not ends or len(tried) >= plan.budget:
            return Search(tried, best, bool(ends), ())
        inner = tried[1 if ends[0] < 0 else -2][0]
        rates = [float(f"{beyond(best, math.log(best / inner), log=True):.2g}")]


def _best(tried: tuple[tuple[float, float | None], ...], higher: bool) -> int:
    """Return the place of the best score; of equals the most central, of failures the lowest."""
    sign = 1 if higher else -1
    middle = (len(tried) - 1) / 2
    places = [
        (sign * score, -abs(at - middle), at)
        for at, (_, score) in enumerate(tried)
        if score is not None
    ]
    return max(places)[2] if places else 0


def _search_job(arm: Arm, plan: Plan, rate: float) -> Job:
    return Job(arm, "search", rate, plan.seeds[0], plan.search_steps)


def cost_job(arm: Arm, plan: Plan, rate: float) -> Job:
    """Return the job that measures what a step of an arm takes."""
    return Job(arm, "cost", rate, plan.seeds[0], plan.steps)


def final_jobs(arm: Arm, plan: Plan, rate: float) -> list[Job]:
    """Return an arm's trials at equal steps, one for each seed; the first is audited."""
    audited = arm.rule is not None
    return [
        Job(arm, "final", rate, seed, plan.steps, audited and seed == plan.seeds[0])
        for seed in plan.seeds
    ]


def equal_jobs(arm: Arm, plan: Plan, rate: float, outcomes: Outcomes) -> list[Job]:
    """Return an arm's trials at equal cost: none if that is as many steps, or not known yet."""
    steps = equal_steps(arm, plan, rate, outcomes)
    if steps is None or steps == plan.steps:
        return []
    return [Job(arm, "equal", rate, seed, steps) for seed in plan.seeds]


def equal_steps(arm: Arm, plan: Plan, rate: float, outcomes: Outcomes) -> int | None:
    """Return how many steps of an arm cost what backprop's steps cost, to two digits."""
    cost = outcomes.get(cost_job(arm, plan, rate).key, {}).get("cost")
    if cost is None or not plan.equal_cost:
        return None
    steps = float(f"{plan.steps / cost['relative']:.2g}")
    return plan.steps if abs(steps / plan.steps - 1) < 0.05 else max(1, round(steps))


def wanted(arm: Arm, plan: Plan, outcomes: Outcomes) -> list[Job]:
    """Return the jobs of an arm that can be done now and are not done yet."""
    found = search(arm, plan, outcomes)
    if any(o["refused"] for key, o in outcomes.items() if key[0] == arm.name):
        return []
    if found.best is None:
        return [_search_job(arm, plan, rate) for rate in found.wanted]
    if found.tried and all(score is None for _, score in found.tried):
        return []  # it failed at every rate
    jobs = [cost_job(arm, plan, found.best), *final_jobs(arm, plan, found.best)]
    jobs += equal_jobs(arm, plan, found.best, outcomes)
    return [job for job in jobs if job.key not in outcomes]

"""What a comparison found: `results.json`, compiled from the outcomes there are, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from altprop.errors import unknown
from altprop.lab.compare.arms import Arm
from altprop.lab.compare.plan import (
    Outcomes,
    Plan,
    cost_job,
    equal_jobs,
    equal_steps,
    final_jobs,
    search,
    wanted,
)
from altprop.lab.compare.statistics import Estimate, Values, difference, mean_of, recovery
from altprop.lab.compare.trial import Job
from altprop.lab.folder import FORMAT
from altprop.lab.reporting.numbers import few_seeds
from altprop.lab.tasks.task import AbstractTask
from altprop.terminal import printable


@dataclass(frozen=True)
class Comparison:
    """What a comparison found. `results` is the content of `results.json` in its `folder`."""

    folder: Path
    results: Mapping[str, Any]

    def arm(self, name: str) -> Mapping[str, Any]:
        """Return what was found of the arm of that name.

        **Raises:** `ConfigError` for a name that no arm has.
        """
        arms = {arm["name"]: arm for arm in self.results["arms"]}
        if name not in arms:
            raise unknown("arm", name, arms)
        return arms[name]

    def __str__(self) -> str:
        rows = [_cells(arm) for arm in self.results["arms"]]
        widths = [max(map(len, column)) for column in zip(_HEAD, *rows, strict=True)]
        lines = [_HEAD, *rows]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def table(self) -> Table:
        """Return the arms as a table for a terminal."""
        task = self.results["task"]
        title = f"{task['name']}: {task['score']} ({task['unit']}) after {self.results['steps']}"
        table = Table(title=f"{title} steps, {len(self.results['seeds'])} seeds")
        for column in _HEAD:
            table.add_column(column, overflow="fold")
        for arm in self.results["arms"]:
            table.add_row(*(Text(printable(cell)) for cell in _cells(arm)))
        return table


_HEAD = ["arm", "score", "to backprop", "recovery", "rate", "cost", "at equal cost"]


def _cells(arm: Mapping[str, Any]) -> list[str]:
    if arm["refused"] or arm["mean"] is None:
        why = arm["refused"] or arm["failed"] or "not done"
        return [arm["name"], f"refused: {why}" if arm["refused"] else why, "", "", "", "", ""]
    cost, equal = arm["cost"], arm["equal_cost"]
    return [
        arm["name"],
        _estimate(arm, "{:z.2f}") + few_seeds(arm["scores"]),
        _estimate(arm["difference"], "{:+z.2f}"),
        _estimate(arm["recovery"], "{:z.2f}"),
        f"{arm['lr']:g}" + (" (edge)" if arm["edge"] else ""),
        f"{cost['relative']:.2f}" if cost else "",
        f"{_estimate(equal, '{:.2f}')} in {equal['steps']}" if equal else "",
    ]


def _estimate(found: Mapping[str, Any] | None, form: str) -> str:
    if found is None or found["mean"] is None:
        return ""
    text = form.format(found["mean"])
    if found["interval"] is None:
        return text
    low, high = found["interval"]
    return f"{text} [{form.format(low)}, {form.format(high)}]"


def compiled(
    task: AbstractTask, plan: Plan, arms: Sequence[Arm], outcomes: Outcomes
) -> dict[str, Any]:
    """Return what every reader of a comparison needs, as plain data."""
    scores = {arm.name: _scores(final_trials(arm, plan, outcomes), plan, outcomes) for arm in arms}
    sign = 1.0 if task.better == "higher" else -1.0
    return {
        "format": FORMAT,
        "task": {
            "name": task.name, "data": task.source, "score": task.score_name, "unit": task.unit,
            "better": task.better, "chance": task.chance,
        },
        "steps": plan.steps,
        "seeds": list(plan.seeds),
        "finished": not any(wanted(arm, plan, outcomes) for arm in arms),
        "arms": [_arm(arm, plan, outcomes, scores, sign) for arm in arms],
    }  # fmt: skip


def final_trials(arm: Arm, plan: Plan, outcomes: Outcomes) -> list[Job]:
    """Return the trials of an arm's result, once its rate is known."""
    rate = search(arm, plan, outcomes).best
    return [] if rate is None else final_jobs(arm, plan, rate)


def _arm(
    arm: Arm,
    plan: Plan,
    outcomes: Outcomes,
    scores: Mapping[str, list[float | None]],
    sign: float,
) -> dict[str, Any]:
    found = search(arm, plan, outcomes)
    trials = [outcomes[job.key] for job in final_trials(arm, plan, outcomes) if job.key in outcomes]
    own = [outcome for key, outcome in outcomes.items() if key[0] == arm.name]
    values = scores[arm.name]
    mean = mean_of(values)
    backprop, frozen = scores.get("backprop"), scores.get("frozen")
    share = None
    if backprop and frozen:
        signed = (
            [None if v is None else sign * v for v in row] for row in (values, frozen, backprop)
        )
        share = recovery(*signed)
    cost = None
    if found.best is not None:
        cost = outcomes.get(cost_job(arm, plan, found.best).key)
    evaluations = [t["evaluations"] for t in trials if t.get("evaluations") is not None]
    return {
        "name": arm.name,
        "rule": arm.text,
        "control": arm.control,
        "refused": next((o["refused"] for o in own if o["refused"]), None),
        "failed": _failed(found.tried, trials, own),
        "rates": [{"lr": r, "score": s, "failed": s is None} for r, s in found.tried],
        "lr": found.best,
        "edge": found.edge,
        "scores": values,
        "mean": mean.mean if mean else None,
        "interval": mean.interval if mean else None,
        "difference": _plain(difference(values, backprop)) if backprop else None,
        "recovery": _plain(share),
        "cost": {
            **cost["cost"],
            "evaluations": sum(evaluations) / len(evaluations) if evaluations else None,
        } if cost and "cost" in cost else None,
        "equal_cost": _equal(arm, plan, found.best, outcomes, values),
        "curves": [{"seed": t["seed"], **t["curve"]} for t in trials if "curve" in t],
        "audit": next((t["audit"] for t in trials if t.get("audit")), []),
        "read": cost["read"] if cost and "read" in cost else [],
    }  # fmt: skip


def _scores(jobs: Sequence[Job], plan: Plan, outcomes: Outcomes) -> list[float | None]:
    """Return one score for each seed, `None` for what is not done or failed."""
    by_seed = {job.seed: outcomes.get(job.key, {}).get("score") for job in jobs}
    return [by_seed.get(seed) for seed in plan.seeds]


def _failed(
    tried: Sequence[tuple[float, float | None]],
    trials: Sequence[Mapping[str, Any]],
    own: Sequence[Mapping[str, Any]],
) -> str | None:
    """Return in a line what of an arm failed, rates that it was not taken at left out."""
    if tried and all(score is None for _, score in tried):
        return f"at every rate: {next((o['failed'] for o in own if o['failed']), '')}"
    lines = [f"seed {t['seed']}: {t['failed']}" for t in trials if t["failed"]]
    return "; ".join(lines) or None


def _equal(
    arm: Arm, plan: Plan, rate: float | None, outcomes: Outcomes, values: Values
) -> dict[str, Any] | None:
    steps = None if rate is None else equal_steps(arm, plan, rate, outcomes)
    if rate is None or steps is None:
        return None
    jobs = equal_jobs(arm, plan, rate, outcomes)
    scores = _scores(jobs, plan, outcomes) if jobs else values
    mean = mean_of(scores)
    return {"steps": steps, "scores": list(scores), **(_plain(mean) or _NOTHING)}


_NOTHING = {"mean": None, "interval": None}


def _plain(found: Estimate | None) -> dict[str, Any] | None:
    return None if found is None else found._asdict()

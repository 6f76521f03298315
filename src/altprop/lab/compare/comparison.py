"""The command `altprop compare`, and the same in Python: rules beside each other on one task.

Every arm has the same initialisations, batches, steps and budget of its rate's search. Controls
stand beside the rules: backprop, frozen hidden layers, and calibration alone.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils._pytree import tree_leaves

from altprop import AbstractRule, ConfigError, RuleError, __version__
from altprop.lab.compare.arms import CONTROLS, Arm, arms_of
from altprop.lab.compare.folder import open_folder, write_results
from altprop.lab.compare.plan import Plan, wanted
from altprop.lab.compare.results import Comparison, compiled
from altprop.lab.compare.trial import Job
from altprop.lab.compare.workers import run_jobs
from altprop.lab.display import Trials
from altprop.lab.folder import check_ways
from altprop.lab.gradient import drawing
from altprop.lab.tasks import AbstractTask
from altprop.lab.values import homes, plain


def compare(
    task: AbstractTask,
    *,
    rules: tuple[AbstractRule, ...] | dict[str, AbstractRule | dict[str, AbstractRule]] = (),
    seeds: int = 5,
    seed: int = 0,
    steps: int | None = None,
    rates: tuple[float, ...] | None = None,
    budget: int = 6,
    search_steps: int | None = None,
    controls: tuple[str, ...] = CONTROLS,
    equal_cost: bool = True,
    workers: int = 1,
    out: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Comparison:
    """Train a task's model by every rule and every seed, and say how they compare.

    Every arm starts from the same weights and sees the same batches. Its learning rate is searched
    on validation data at the first seed; its results are of test data at every seed. What one run
    draws and computes does not depend on how many run side by side.

    Args:
        task: What is learned, such as Digits, or Teacher(labels=100).
        rules: Rules or estimators, such as FeedbackAlignment,SignSymmetry; or a mapping of names of
            arms to rules, or to mappings of name patterns to rules.
        seeds: Number of seeds.
        seed: The first seed; the others follow it.
        steps: Steps of every trial; null for the task's.
        rates: Learning rates that a search begins with; null for the task's.
        budget: Rates that an arm's search may try; where the best lies at the edge, it goes on
            beyond it. 1 takes the only rate without a search.
        search_steps: Steps of a trial of the search; null for as many as `steps`.
        controls: Arms that are added: backprop, frozen (hidden layers that do not learn), and
            calibration (of calibrated rules, the exact steps alone); [] for none.
        equal_cost: Whether every arm is also trained for as long as backprop takes for its steps.
        workers: Processes that run trials side by side; 1 runs them in this one.
        out: The comparison's folder; a new one below runs/ unless given.
        resume: Go on with the comparison in the folder; rules and seeds may be added.
        overwrite: Replace a comparison that is in the folder.

    Returns:
        What was printed, and lies in the folder.
    """
    options = {k: v for k, v in locals().items() if k not in ("out", "resume", "overwrite")}
    plan = _plan(task, seeds, seed, steps, rates, budget, search_steps, equal_cost)
    arms = arms_of(rules, controls)
    if not arms:
        raise ConfigError("there is nothing to compare: give rules, or leave the controls in")
    if workers < 1:
        raise ConfigError(f"workers is {workers}, expected at least 1")
    check_ways("comparison", out, resume, overwrite)
    refused = _rehearse(task, arms)
    folder = out or _new_folder(task)
    held = {name: _held(value) for name, value in options.items()}
    digest = _digest(task, plan)
    command = _command(task, held, homes(options))
    rules_of = {arm.name: arm.whole for arm in arms if not arm.control}
    outcomes = open_folder(
        folder, held, command, digest, rules_of, resume=resume, overwrite=overwrite
    )
    for arm in arms:
        if arm.name in refused:
            job = Job(arm, "search", plan.rates[0], plan.seeds[0], plan.search_steps)
            outcomes[job.key] = _refusal(job, refused[arm.name])
    names = [arm.name for arm in arms]
    outcomes = {key: outcome for key, outcome in outcomes.items() if key[0] in names}

    def next_jobs() -> list[Job]:
        return [job for arm in arms for job in wanted(arm, plan, outcomes)]

    write_results(folder, compiled(task, plan, arms, outcomes))
    with Trials(len(arms) * _expected(plan), len(outcomes)) as shown:
        shown.note(f"{len(arms)} arms on {task.name} ({task.source}); folder {folder}")
        for job, outcome in run_jobs(task, folder, workers, next_jobs):
            outcomes[job.key] = outcome
            write_results(folder, compiled(task, plan, arms, outcomes))
            shown.trial(f"{job.arm.name}, {job.phase}, lr {job.rate:g}, seed {job.seed}", outcome)
    comparison = Comparison(folder, compiled(task, plan, arms, outcomes))
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(comparison.table())
    return comparison


def _plan(
    task: AbstractTask,
    seeds: int,
    seed: int,
    steps: int | None,
    rates: tuple[float, ...] | None,
    budget: int,
    search_steps: int | None,
    equal_cost: bool,
) -> Plan:
    length = task.recipe.steps if steps is None else steps
    looked = length if search_steps is None else search_steps
    start = tuple(sorted({float(f"{rate:.6g}") for rate in task.rates if rates is None}
                         | {float(f"{rate:.6g}") for rate in rates or ()}))  # fmt: skip
    counts = {"seeds": seeds, "steps": length, "search_steps": looked, "budget": budget}
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1")
    if not 0 <= seed < 2**62:
        raise ConfigError(f"seed is {seed}, expected a whole number from 0 to 2^62")
    if any(not (math.isfinite(rate) and rate > 0) for rate in start):
        raise ConfigError(f"rates is {rates}, expected numbers > 0")
    if budget == 1 and rates is None:
        start = (float(f"{task.recipe.lr:.6g}"),)
    if budget == 1 and len(start) != 1 or 1 < budget < len(start) or len(start) == 0:
        raise ConfigError(
            f"budget is {budget} for {len(start)} rates: a search needs at least as many trials, "
            "and a budget of 1 exactly one rate"
        )
    if budget > 1 and len(start) < 2:
        raise ConfigError(
            f"rates is {start[0]:g} alone: give two or more to search from, or --budget 1"
        )
    every = tuple(range(seed, seed + seeds))
    return Plan(every, length, looked, start, budget, task.better == "higher", equal_cost)


def _expected(plan: Plan) -> int:
    """Return how many jobs an arm may take, about."""
    return len(plan.rates) * (plan.budget > 1) + 1 + len(plan.seeds) * (1 + plan.equal_cost)


def _rehearse(task: AbstractTask, arms: Sequence[Arm]) -> dict[str, str]:
    """Make one gradient by every arm: what cannot work says so before anything takes time.

    **Raises:** `RuleError` if every rule is refused.
    """
    refused = {}
    batch = task.batches(0).draw()
    for arm in arms:
        model = task.model(0)
        try:
            with drawing(0, 0, torch.device("cpu")):
                arm.apply(task, model, 0)
                task.loss(model, batch).backward()
        except RuleError as error:
            refused[arm.name] = " ".join(str(error).split())
    rules = [arm.name for arm in arms if not arm.control]
    if rules and all(name in refused for name in rules):
        raise RuleError(f"{rules[0]}: {refused[rules[0]]}")
    return refused


def _refusal(job: Job, why: str) -> dict[str, Any]:
    return {"arm": job.arm.name, "rule": job.arm.whole, "phase": job.phase, "lr": job.rate,
            "seed": job.seed, "steps": job.steps, "refused": why, "failed": None,
            "score": None}  # fmt: skip


def _held(value: Any) -> Any:
    """Return an option as a file holds it; a task of one's own that no text says, by its name."""
    return value.name if isinstance(value, AbstractTask) and not _is_said(value) else plain(value)


def _is_said(task: AbstractTask) -> bool:
    """Tell whether the text of a task says all of it, as of those of the library."""
    try:
        plain(task)
    except ConfigError:
        return False
    return True


def _digest(task: AbstractTask, plan: Plan) -> str:
    """Return what is another where trials of a task would be others, besides its options.

    Of a task of one's own that is its recipe and what it holds, its weights at the first seed, the
    first batch, and what those weights score.
    """
    told = (task.recipe, task.source, task.score_name, task.unit, task.better)
    plans = (plan.steps, plan.search_steps, plan.rates)
    found = hashlib.sha256(repr((told, plans, __version__)).encode())
    if not _is_said(task):
        seed = plan.seeds[0]
        model, batch = task.model(seed), task.batches(seed).draw()
        held = task.__getstate__()  # without what is only read and kept
        for leaf in tree_leaves((held, batch, model.state_dict())):
            if isinstance(leaf, Tensor):
                found.update(repr((leaf.dtype, leaf.shape)).encode())
                plain_bytes = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8)
                found.update(plain_bytes.numpy().tobytes())
        with drawing(seed, 0, torch.device("cpu")), torch.no_grad():
            figures = [float(task.loss(model, batch))]
            figures += [task.score(model, part) for part in ("validation", "test")]
        found.update(repr((list(model.state_dict()), figures)).encode())
    return found.hexdigest()


def _command(task: AbstractTask, held: Mapping[str, Any], modules: set[str]) -> str:
    """Return what computes the same again: words, or for a task of one's own that it is Python.

    **Arguments:** `modules`, where classes are from that are not altprop's.
    """
    if not _is_said(task):
        given = ", ".join(f"{k}={v!r}" for k, v in held.items() if k != "task" and v is not None)
        return f"in Python: compare({task.name}, {given})"
    words = ["altprop", "compare", str(held["task"])]
    for module in sorted(modules):
        words += ["--import", module]
    for name, value in held.items():
        if name != "task" and value is not None:
            words += [f"--{name}", value if isinstance(value, str) else dumps(value)]
    return shlex.join(words)


def _new_folder(task: AbstractTask) -> Path:
    name = Path("runs") / f"compare-{task.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    numbered = (name.with_name(f"{name.name}-{i}") for i in itertools.count(2))
    return next(path for path in itertools.chain([name], numbered) if not path.exists())

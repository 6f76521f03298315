"""A trial: one arm at one rate and one seed, from its initialisation to its score.

It is a folder of its own, `metrics.jsonl` and `done.json`, and is finished where the second is.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from altprop import ConvergenceError, RuleError, compare, feedback_parameters, rules_off
from altprop.files import write_whole
from altprop.lab.compare.arms import Arm
from altprop.lab.compare.cost import measure_cost
from altprop.lab.gradient import drawing
from altprop.lab.settings import TrainConfig
from altprop.lab.state import Batch, State
from altprop.lab.tasks.task import AbstractTask, Part
from altprop.lab.train import begin_with, steps

Phase = Literal["search", "final", "equal", "cost"]
Key = tuple[str, str, float, int]

POINTS = 10  # of a curve
AUDITS = 4  # of a trial, after the one at its start
LINES = 100  # of metrics, about
PROBE = 1_000_003  # from a trial's seed to that of the batch on which gradients are audited


@dataclass(frozen=True)
class Job:
    """What a worker does: an arm at a rate and a seed, for so many steps.

    `phase`: `search` is scored on the validation part; `final` and `equal` (as much cost as
    backprop's, instead of as many steps) on the test part; `cost` measures what a step takes.
    """

    arm: Arm
    phase: Phase
    rate: float
    seed: int
    steps: int
    audited: bool = False

    @property
    def key(self) -> Key:
        """What tells its outcome from every other."""
        return self.arm.name, self.phase, self.rate, self.seed

    def folder(self, comparison: Path) -> Path:
        """Return the trial's own folder."""
        name = f"{self.phase}-lr{self.rate:g}-seed{self.seed}"
        return comparison / "trials" / self.arm.folder / name


def run_job(task: AbstractTask, job: Job, comparison: Path) -> dict[str, Any]:
    """Do a job, keep it in its folder, and return its outcome as plain data.

    What an arm cannot do (a rule that is refused, a run that diverges) is an outcome too.
    """
    folder = job.folder(comparison)
    folder.mkdir(parents=True, exist_ok=True)
    outcome: dict[str, Any] = {
        "arm": job.arm.name, "rule": job.arm.whole, "phase": job.phase, "lr": job.rate,
        "seed": job.seed, "steps": job.steps, "refused": None, "failed": None, "score": None,
    }  # fmt: skip
    started = time.process_time()
    try:
        if job.phase == "cost":
            outcome |= measure_cost(task, job.arm, _recipe(task, job))
        else:
            outcome |= _train(task, job, folder)
    except RuleError as error:
        outcome["refused"] = " ".join(str(error).split())
    except ConvergenceError as error:
        outcome["failed"] = " ".join(str(error).split())
    outcome["seconds"] = round(time.process_time() - started, 3)
    write_whole(folder / "done.json", json.dumps(outcome, allow_nan=False))
    return outcome


def _recipe(task: AbstractTask, job: Job) -> TrainConfig:
    recipe = task.recipe
    warmup = min(recipe.warmup, job.steps // 4)
    return replace(recipe, steps=job.steps, lr=job.rate, seed=job.seed, warmup=warmup)


def _train(task: AbstractTask, job: Job, folder: Path) -> dict[str, Any]:
    recipe = _recipe(task, job)
    model = task.model(job.seed)
    job.arm.apply(task, model, job.seed)
    state, guard = begin_with(recipe, model, task.loss, task.batches(job.seed))
    looks = {round(job.steps * i / POINTS) for i in range(1, POINTS + 1)}
    audits = {round(job.steps * i / AUDITS) for i in range(AUDITS + 1)} if job.audited else set()
    probe = task.batches(job.seed + PROBE).draw()
    curve: dict[str, list[Any]] = {"steps": [], "loss": [], "score": []}
    audit, evaluations, since = [], [], []
    progress = state.progress
    if 0 in audits:
        audit.append(_audited(state, probe))
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as metrics:
        for record in steps(recipe, state, guard):
            since.append(record["loss"])
            if "free_evaluations" in record:
                evaluations.append(record["free_evaluations"] + record["adjoint_evaluations"])
            if progress.step in looks and job.phase != "search":
                record["score"] = float(task.score(model, "test"))
                curve["steps"].append(progress.step)
                curve["loss"].append(_finite(math.fsum(since) / len(since)))
                curve["score"].append(_finite(record["score"]))
                since = []
            if progress.step in audits:
                audit.append(_audited(state, probe))
            if "score" in record or progress.step % max(1, job.steps // LINES) == 0:
                plain = {k: _finite(v) if type(v) is float else v for k, v in record.items()}
                metrics.write(json.dumps(plain, allow_nan=False) + "\n")
                metrics.flush()
    failed = None
    if guard.lost(progress):
        failed = f"diverged: {progress.refused} of {progress.step} steps were refused"
        score = None
    else:
        part: Part = "validation" if job.phase == "search" else "test"
        score = _finite(float(task.score(model, part)))
        if score is None:
            failed = "diverged: its score is not finite"
    mean = math.fsum(evaluations) / len(evaluations) if evaluations else None
    return {
        "score": score, "failed": failed, "refused_steps": progress.refused, "curve": curve,
        "audit": audit, "evaluations": mean,
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _audited(state: State, batch: Batch) -> dict[str, Any]:
    """Compare the rule's gradient with the exact one at the weights that it has reached, by layer.

    Works on a copy, so that a rule that counts its passes or carries estimates is not disturbed.
    """
    model = copy.deepcopy(state.model)
    found = _gradients(state, model, batch)
    with rules_off(model):
        exact = _gradients(state, model, batch)
    groups = []
    for name, reference in exact.items():
        agreement = compare(found[name], reference)
        groups.append({"name": name, "cosine": agreement.cosine, "ratio": agreement.norm_ratio})
    return {"step": state.progress.step, "groups": groups}


def _gradients(state: State, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the gradients of each group as one vector, learned feedback left out."""
    feedback = {id(p) for p in feedback_parameters(model)}
    learning = {
        name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in feedback
    }
    with drawing(0, state.progress.step, torch.device("cpu")):  # both draw the same
        loss = state.loss(model, batch)
        found = torch.autograd.grad(
            loss, list(learning.values()), allow_unused=True, materialize_grads=True
        )
    groups: dict[str, list[Tensor]] = {}
    for name, gradient in zip(learning, found, strict=True):
        groups.setdefault(group_of(name), []).append(gradient.flatten())
    return {name: torch.cat(parts) for name, parts in groups.items()}


def group_of(parameter: str) -> str:
    """Return the part of a model that a parameter belongs to: up to the first number of its path.

    >>> group_of("blocks.1.attn.q.weight"), group_of("head.weight")
    ('blocks.1', 'head')
    """
    parts = parameter.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return parts[0]


def single_threaded(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `call` returns, computed on one thread, so that it is the same everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return call()
    finally:
        torch.set_num_threads(threads)

"""What a step of an arm costs, in steps of backprop: measured in pairs, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from altprop import watch
from altprop.auditing.memory import peak_live_bytes
from altprop.lab.building import count_parameters
from altprop.lab.compare.arms import Arm
from altprop.lab.settings import TrainConfig
from altprop.lab.state import State
from altprop.lab.tasks.task import AbstractTask
from altprop.lab.timing import paired, ratio
from altprop.lab.train import begin_with, steps

ROUNDS = 9
SHORT = 0.01  # seconds of a step up to which more of them are timed at once
ENDLESS = 10**9  # steps


def measure_cost(task: AbstractTask, arm: Arm, recipe: TrainConfig) -> dict[str, Any]:
    """Return what a step of an arm takes, and what it reads backwards.

    The arm and backprop train side by side from the same start, in turn, a few steps at a time; the
    figure is the median over rounds of the ratio of their times.
    """
    own, state = _loop(task, arm, recipe)
    numbers = _numbers(state.model) - _numbers(task.model(recipe.seed))
    start = time.perf_counter()
    own()
    several = 10 if time.perf_counter() - start < SHORT else 4  # rules that act now and then, too

    def chunk(step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(several):
                step()

        return run

    arms = {"own": chunk(own), "backprop": chunk(_loop(task, Arm("backprop"), recipe)[0])}
    times = paired(arms, ROUNDS)
    found = ratio(times, "own", "backprop")
    alone = arm.rule is None and not arm.frozen
    batch = task.batches(recipe.seed).draw()
    state.model.zero_grad(set_to_none=True)
    with watch(state.model) as seen:
        task.loss(state.model, batch).backward()
    state.model.zero_grad(set_to_none=True)
    return {
        "cost": {
            "seconds_per_step": statistics.median(times["own"]) / several,
            "relative": 1.0 if alone else found.median,
            "quartiles": [1.0, 1.0] if alone else [found.low, found.high],
            "peak_bytes": peak_live_bytes(own),
            "carried_numbers": numbers,
            "parameters": count_parameters(state.model),
        },
        "read": [{"parameter": name, "how": str(how)} for name, how in seen.items()],
    }


def _loop(task: AbstractTask, arm: Arm, recipe: TrainConfig) -> tuple[Callable[[], object], State]:
    """Return what makes a step of an arm's training, as often as it is called."""
    recipe = replace(recipe, steps=ENDLESS, refused_in_a_row=ENDLESS)
    model = task.model(recipe.seed)
    arm.apply(task, model, recipe.seed)
    state, guard = begin_with(recipe, model, task.loss, task.batches(recipe.seed))
    return steps(recipe, state, guard).__next__, state


def _numbers(model: nn.Module) -> int:
    return sum(t.numel() for t in model.state_dict().values())

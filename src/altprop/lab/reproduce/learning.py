"""What an arm of a figure reaches: a task's recipe to its end, by the one training loop."""

from __future__ import annotations

from dataclasses import replace

from altprop import ConvergenceError
from altprop.lab.compare.arms import Arm
from altprop.lab.state import Loss
from altprop.lab.tasks.task import AbstractTask
from altprop.lab.train import begin_with, steps


def score_of(arm: Arm, task: AbstractTask, seed: int, loss: Loss | None = None) -> float:
    """Return the test score of a task's model, trained by an arm with the task's own recipe.

    Model, batches and feedback are those of the seed; `loss` is what is learned, if not the task's.

    **Raises:** `ConvergenceError` where so many steps were refused that the run counts as lost:
    what it would reach is a figure of the steps that are missing.
    """
    model, recipe = task.model(seed), replace(task.recipe, seed=seed)
    arm.apply(task, model, seed)
    state, guard = begin_with(recipe, model, loss or task.loss, task.batches(seed))
    for _ in steps(recipe, state, guard):
        pass
    made, refused = state.progress.step, state.progress.refused
    if guard.lost(state.progress):
        raise ConvergenceError(
            f"{arm.name} on {task.name}, seed {seed}: {refused} of {made} steps were refused"
        )
    return task.score(model, "test")

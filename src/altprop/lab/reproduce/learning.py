"""What an arm of a figure reaches: a task's recipe to its end, by the one training loop."""

from __future__ import annotations

from dataclasses import replace

from altprop.lab.compare.arms import Arm
from altprop.lab.tasks.task import AbstractTask
from altprop.lab.train import begin_with, steps


def score_of(arm: Arm, task: AbstractTask, seed: int) -> float:
    """Return the test score of a task's model, trained by an arm with the task's own recipe.

    Model, batches and feedback are those of the seed.
    """
    model, recipe = task.model(seed), replace(task.recipe, seed=seed)
    arm.apply(task, model, seed)
    state, guard = begin_with(recipe, model, task.loss, task.batches(seed))
    for _ in steps(recipe, state, guard):
        pass
    return task.score(model, "test")

"""A random teacher's labels: what direct feedback recovers of backprop's gain as classes grow."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from altprop import DirectFeedback, convert
from altprop.lab.reproduce.figure import Figure
from altprop.lab.tasks.teacher import STEPS, Teacher

# accuracies in per cent, by the number of classes: backprop, direct feedback, frozen hidden layers
PUBLISHED = {
    2: (94.0, 94.2, 77.2),
    10: (77.3, 74.2, 51.6),
    100: (55.9, 41.2, 27.3),
    1000: (41.1, 26.5, 16.2),
}
ARMS = ("backprop", "direct feedback", "frozen hidden layers")


def measure(seed: int) -> Mapping[str, float]:
    """Return the accuracy of every arm at every number of classes."""
    return {
        f"{arm}, {classes:,} classes": _accuracy(arm, Teacher(classes), seed)
        for classes in PUBLISHED
        for arm in ARMS
    }


def _accuracy(arm: str, task: Teacher, seed: int) -> float:
    model = task.model(seed)
    if arm == "direct feedback":
        rule = DirectFeedback("block", feedback="independent", std=task.labels**-0.5)
        convert(model, {"blocks.*": rule}, output="head", seed=seed)
    elif arm == "frozen hidden layers":
        model.get_submodule("blocks").requires_grad_(False)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=3e-3)
    batches = task.batches(seed)
    for _ in range(STEPS):
        optimiser.zero_grad()
        task.loss(model, batches.draw()).backward()
        optimiser.step()
    return task.score(model, "test")


FIGURE = Figure(
    title="Direct feedback on a random teacher's labels",
    source="OriPekelman/toy, `toy train mlp`, seed 0",
    setting="Three bias-free SiLU layers of 64 learn a random ReLU teacher of 32 Gaussian "
    "features, batch 64, 1 000 steps of AdamW at 3e-3; accuracy on 2 048 held-out samples, the "
    "problem drawn as published, number by number",
    unit="%",
    published={
        f"{arm}, {classes:,} classes": value
        for classes, values in PUBLISHED.items()
        for arm, value in zip(ARMS, values, strict=True)
    },
    measure=measure,
    differs="The published feedback is another draw, and theirs is one seed",
)

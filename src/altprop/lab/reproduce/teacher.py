"""A random teacher's labels: what direct feedback recovers of backprop's gain as classes grow."""

from __future__ import annotations

from collections.abc import Mapping

from altprop import DirectFeedback
from altprop.lab.compare.arms import Arm
from altprop.lab.reproduce.figure import Figure
from altprop.lab.reproduce.learning import score_of
from altprop.lab.tasks.teacher import Teacher

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
        f"{name}, {classes:,} classes": score_of(arm, Teacher(classes), seed)
        for classes in PUBLISHED
        for name, arm in zip(ARMS, _arms(classes), strict=True)
    }


def _arms(classes: int) -> tuple[Arm, Arm, Arm]:
    rule = DirectFeedback("block", feedback="independent", std=classes**-0.5)
    return Arm("backprop"), Arm("direct feedback", rule), Arm("frozen", frozen=True)


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

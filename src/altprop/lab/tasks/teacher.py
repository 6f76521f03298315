"""Labels of a random ReLU teacher: how much of backprop's gain a rule recovers as classes grow.

The problem is that of OriPekelman/toy, `toy train mlp`, draw by draw, since one teacher differs
from the next by more than rules do: Gaussian inputs (32) and labels `argmax T₂ relu(T₁ x)`, all
from a 31-bit linear congruential stream, one fixed teacher for each number of classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from altprop import ConfigError
from altprop.lab.settings import TrainConfig
from altprop.lab.state import Batch, Stream
from altprop.lab.tasks.task import MLP, AbstractClassification, plain_adamw

FEATURES, HIDDEN, TEACHER, STEPS, HELD_OUT = 32, 64, 32, 1000, 2048
TASK_SEED = 7


@dataclass(frozen=True)
class Teacher(AbstractClassification):
    """Learn a random teacher's labels: every batch is new for 1 000 steps, 2 048 samples to test.

    The student has three bias-free SiLU layers of 64; batches are the same for every seed.

    **Arguments:** `labels`, the number of classes.
    """

    labels: int = 10

    name: ClassVar[str] = "teacher"
    rates: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 1e-2)

    def __post_init__(self) -> None:
        if self.labels < 2:
            raise ConfigError(f"labels is {self.labels}, expected at least 2")

    @property
    def classes(self) -> int:
        return self.labels

    @property
    def source(self) -> str:
        return f"generated: {self.labels} classes by a random ReLU teacher of 32 Gaussian features"

    @property
    def recipe(self) -> TrainConfig:
        return plain_adamw(steps=STEPS, batch=64, lr=3e-3)

    @cached_property
    def data(self) -> dict[str, tuple[Tensor, Tensor]]:
        sizes = [HELD_OUT, STEPS * self.recipe.batch, HELD_OUT]  # what one chooses by is past them
        draws = gaussians(TASK_SEED + 1, sum(sizes) * FEATURES).reshape(-1, FEATURES)
        x = torch.tensor(draws, dtype=torch.float32)
        y = labelled(self.labels, x)
        parts = zip(x.split(sizes), y.split(sizes), strict=True)
        return dict(zip(("test", "train", "validation"), parts, strict=True))

    def batches(self, seed: int) -> Stream:
        return InOrder(self.data["train"], self.recipe.batch, seed)

    def network(self) -> nn.Module:
        return MLP((FEATURES, HIDDEN, HIDDEN, HIDDEN), self.labels, nn.SiLU, bias=False)

    def model(self, seed: int) -> nn.Module:
        """Return the student, its weights `N(0, 1/fan_in)` from the published stream."""
        model = super().model(seed)
        weights = list(model.parameters())
        sizes = [weight.numel() for weight in weights]
        draws = torch.tensor(gaussians(seed, sum(sizes))).split(sizes)
        with torch.no_grad():
            for weight, part in zip(weights, draws, strict=True):
                weight.copy_(part.view_as(weight) / weight.shape[1] ** 0.5)
        return model


class InOrder:
    """Draws batches of the rows in their order, and begins again at the end."""

    def __init__(self, data: tuple[Tensor, Tensor], batch: int, seed: int) -> None:
        self.data, self.batch, self._at = data, batch, 0
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Batch:
        """Return the next batch."""
        rows = slice(self._at, self._at + self.batch)
        self._at = (self._at + self.batch) % len(self.data[0])
        return tuple(part[rows] for part in self.data)


def labelled(classes: int, x: Tensor) -> Tensor:
    """Return the teacher's labels of `x` (n, 32)."""
    draws = gaussians(TASK_SEED, TEACHER * FEATURES + classes * TEACHER)
    first = torch.tensor(draws[: TEACHER * FEATURES].reshape(TEACHER, FEATURES) / FEATURES**0.5)
    second = torch.tensor(draws[TEACHER * FEATURES :].reshape(classes, TEACHER) / TEACHER**0.5)
    labels = [((part @ first.T).relu() @ second.T).argmax(1) for part in x.double().split(4096)]
    return torch.cat(labels)


def gaussians(seed: int, count: int) -> np.ndarray:
    """Return Box-Muller normals from `s ← 1103515245 s + 12345 mod 2³¹`, the published stream."""
    mask = np.uint64(2**31 - 1)
    state = ((seed + 104729) * 2654435761) % (2**31 - 1) or seed + 104729
    for _ in range(8 + 1):  # eight discarded, the ninth is the first that is used
        state = (state * 1103515245 + 12345) % 2**31
    states = np.array([state], dtype=np.uint64)
    a, c = 1103515245, 12345
    while len(states) < 2 * count:  # doubling: the next n states from the last n
        states = np.concatenate([states, (states * np.uint64(a) + np.uint64(c)) & mask])
        a, c = a * a % 2**31, (a * c + c) % 2**31
    u = (states[: 2 * count].astype(np.float64) + 1) / 2**31
    return np.sqrt(-2 * np.log(np.maximum(u[::2], 1e-12))) * np.cos(2 * np.pi * u[1::2])

"""Anybody's model and data as a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altprop import ConfigError
from altprop.lab.settings import TrainConfig
from altprop.lab.state import Batch, Stream
from altprop.lab.tasks.task import AbstractTask, Part, Rows, plain_adamw

Pair = tuple[Tensor, Tensor]


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of right classes, in per cent."""
    return 100 * float((outputs.argmax(-1) == targets).double().mean())


@dataclass(frozen=True)
class Supervised(AbstractTask):
    """Your own model and data, as pairs of inputs and targets with their samples on axis 0.

    **Arguments:** `name`; `make`, returns an untrained model, drawn from torch's global generator;
    `train`, `test`, the pairs; `validation`, by which rates are chosen (`None`: the last tenth of
    `train`, which then does not learn); `criterion`, the loss of outputs and targets; `measure`,
    the score of outputs and targets, with `score_name`, `unit`, `better` and `chance` of it;
    `output`, the path of the linear map that makes the logits (`None`: the last one); `hidden`,
    name patterns of what the control `frozen` does not train (`()`: all but `output`); `source`,
    where the data is from; `rates`, where a search begins; `recipe`, steps, batch and optimiser.
    """

    name: str  # type: ignore[misc]
    make: Callable[[], nn.Module]
    train: Pair
    test: Pair
    validation: Pair | None = None
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    measure: Callable[[Tensor, Tensor], float] = accuracy
    score_name: str = "accuracy"  # type: ignore[misc]
    unit: str = "%"  # type: ignore[misc]
    better: Literal["higher", "lower"] = "higher"  # type: ignore[misc]
    chance: float | None = None
    output: str | None = None  # type: ignore[misc]
    hidden: tuple[str, ...] = ()  # type: ignore[misc]
    source: str = "given in Python"
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)  # type: ignore[misc]
    recipe: TrainConfig = plain_adamw(steps=500, batch=32, lr=3e-3)

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise ConfigError(f"better is {self.better!r}, expected 'higher' or 'lower'")
        for part in ("train", "test", "validation"):
            pair = getattr(self, part)
            if pair is not None and len(pair[0]) != len(pair[1]):
                raise ConfigError(
                    f"{part}: {len(pair[0])} inputs and {len(pair[1])} targets, expected as many"
                )

    @cached_property
    def parts(self) -> dict[str, Pair]:
        """The pairs by part."""
        if self.validation is not None:
            return {"train": self.train, "validation": self.validation, "test": self.test}
        x, y = self.train
        held = max(1, len(x) // 10)
        return {"train": (x[:-held], y[:-held]), "validation": (x[-held:], y[-held:]),
                "test": self.test}  # fmt: skip

    def network(self) -> nn.Module:
        return self.make()

    def batches(self, seed: int) -> Stream:
        return Rows(self.parts["train"], self.recipe.batch, seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.criterion(model(batch[0]), batch[1])

    @torch.no_grad()
    def score(self, model: nn.Module, part: Part) -> float:
        training = model.training
        model.eval()
        x, y = self.parts[part]
        outputs = torch.cat([model(some) for some in x.split(1024)])
        model.train(training)
        return self.measure(outputs, y)

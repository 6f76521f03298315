"""What is learned: a task gives a model, batches, a loss, a score, and where its data is from.

A task is a frozen dataclass, so that a command line and a file can name it. Whatever it draws comes
from the seed that it is given: every arm of a comparison starts from the same weights and sees the
same batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altprop import ConfigError
from altprop.lab.settings import TrainConfig
from altprop.lab.state import Batch, Stream

Part = Literal["validation", "test"]


class AbstractTask(ABC):
    """Base of the tasks. Rates are searched on the part `validation`; results are of `test`.

    `name`; `score_name`, `unit` and `better` ("higher" or "lower") of the score; `rates`, where a
    search of the learning rate begins; `output`, the path of the linear map that makes the logits
    (`None`: the model's last); `hidden`, name patterns of the parameters that the control `frozen`
    leaves as they were drawn.
    """

    small_names: ClassVar[bool] = True  # digits stands for Digits on the command line
    name: ClassVar[str]
    score_name: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "%"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    rates: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 1e-2)
    output: ClassVar[str | None] = "head"
    hidden: ClassVar[tuple[str, ...]] = ("blocks.*",)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the data that was read: another process reads its own."""
        fields = getattr(self, "__dataclass_fields__", None)

        def given(name: str) -> bool:
            if fields is not None:
                return name in fields
            return not isinstance(getattr(type(self), name, None), cached_property)

        return {name: value for name, value in self.__dict__.items() if given(name)}

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the data is from, in a line."""

    @property
    @abstractmethod
    def recipe(self) -> TrainConfig:
        """How it is trained unless a comparison says otherwise: steps, batch, optimiser."""

    @property
    def chance(self) -> float | None:
        """The score of guessing, if it is known."""
        return None

    def model(self, seed: int) -> nn.Module:
        """Return the untrained model of that seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.network()

    @abstractmethod
    def network(self) -> nn.Module:
        """Return an untrained model, drawn from torch's global generator."""

    @abstractmethod
    def batches(self, seed: int) -> Stream:
        """Return what draws the batches of that seed."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a batch, a scalar."""

    @abstractmethod
    def score(self, model: nn.Module, part: Part) -> float:
        """Return how good a model is on a part of the data that it has not learned from."""


class Rows:
    """Draws endless batches of the rows of tensors, every row once in an epoch."""

    def __init__(self, data: Sequence[Tensor], batch: int, seed: int) -> None:
        if len(data[0]) < batch:
            raise ConfigError(f"a batch of {batch} rows, but there are only {len(data[0])}")
        self.data, self.batch = tuple(data), batch
        self.generator = torch.Generator().manual_seed(seed)
        self._left: list[Tensor] = []

    def draw(self) -> Batch:
        """Return the next batch; the last of an epoch may be smaller."""
        if not self._left:
            order = torch.randperm(len(self.data[0]), generator=self.generator)
            self._left = list(order.split(self.batch))[::-1]
        rows = self._left.pop()
        return tuple(part[rows] for part in self.data)


class MLP(nn.Module):
    """Hidden layers of one activation, as blocks, and a linear head."""

    def __init__(
        self, widths: Sequence[int], classes: int, activation: type[nn.Module], bias: bool = True
    ) -> None:
        super().__init__()
        pairs = zip(widths[:-1], widths[1:], strict=True)
        layers = [nn.Sequential(nn.Linear(a, b, bias=bias), activation()) for a, b in pairs]
        self.blocks = nn.ModuleList(layers)
        self.head = nn.Linear(widths[-1], classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class AbstractClassification(AbstractTask):
    """Base of tasks whose batches are inputs and classes: cross-entropy, and accuracy in per cent.

    A concrete task gives `data`, by `train`, `validation` and `test`, and says how many `classes`
    there are where it is not ten.
    """

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return 10

    @property
    @abstractmethod
    def data(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The inputs and classes of each part."""

    @property
    def chance(self) -> float | None:
        return 100 / self.classes

    def batches(self, seed: int) -> Stream:
        return Rows(self.data["train"], self.recipe.batch, seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y)

    @torch.no_grad()
    def score(self, model: nn.Module, part: Part) -> float:
        training = model.training
        model.eval()
        x, y = self.data[part]
        right = sum(
            int((model(some).argmax(-1) == those).sum())
            for some, those in zip(x.split(1024), y.split(1024), strict=True)
        )
        model.train(training)
        return 100 * right / len(y)


def split(x: Tensor, y: Tensor, sizes: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return training, validation and test rows, shuffled once for all by a fixed seed."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = order.split(list(sizes))
    names = ("train", "validation", "test")
    return {name: (x[rows], y[rows]) for name, rows in zip(names, parts, strict=True)}


def plain_adamw(steps: int, batch: int, lr: float) -> TrainConfig:
    """Return torch's own AdamW at a constant rate, without clipping, as small networks use it."""
    return TrainConfig(
        steps=steps, batch=batch, lr=lr, warmup=0, final_lr=1.0, weight_decay=0.01, beta2=0.999,
        clip=1e30, stabiliser=None, device="cpu",
    )  # fmt: skip

"""Sparse parity: the label is the parity of a few of many bits, and nothing says of which."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from altprop import ConfigError
from altprop.lab.settings import TrainConfig
from altprop.lab.tasks.task import MLP, AbstractClassification, plain_adamw


@dataclass(frozen=True)
class Parity(AbstractClassification):
    """Tell the parity of the first `k` of `bits` signs, from `examples` that come back every epoch.

    **Arguments:** `bits`, of an input; `k`, how many count; `examples`, to learn from; `width`, of
    the two hidden layers.
    """

    bits: int = 20
    k: int = 3
    examples: int = 2000
    width: int = 128

    name: ClassVar[str] = "parity"

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.bits:
            raise ConfigError(f"k is {self.k}, expected 1 to {self.bits}, the bits")
        if self.examples < self.recipe.batch or self.width < 1:
            raise ConfigError(
                f"examples is {self.examples} and width {self.width}, expected at least "
                f"{self.recipe.batch} and 1"
            )

    @property
    def classes(self) -> int:
        return 2

    @property
    def source(self) -> str:
        return f"generated: the parity of {self.k} of {self.bits} signs, {self.examples} examples"

    @property
    def recipe(self) -> TrainConfig:
        return plain_adamw(steps=2000, batch=32, lr=1e-3)

    @cached_property
    def data(self) -> dict[str, tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        sizes = {"train": self.examples, "validation": 1000, "test": 2000}
        return {part: self._draw(size, generator) for part, size in sizes.items()}

    def _draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        bits = torch.randint(2, (size, self.bits), generator=generator)
        return 2.0 * bits - 1, bits[:, : self.k].sum(1) % 2

    def network(self) -> nn.Module:
        return MLP((self.bits, self.width, self.width), 2, nn.ReLU)

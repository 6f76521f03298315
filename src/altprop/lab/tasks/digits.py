"""scikit-learn's digits: 1 797 images of 8 × 8 pixels, and a tanh network of two hidden layers."""

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
class Digits(AbstractClassification):
    """Classify scikit-learn's digits: 1 197 images to learn from, 240 to choose by, 360 to test.

    **Arguments:** `hidden_widths`, of the hidden layers.
    """

    hidden_widths: tuple[int, ...] = (256, 256)

    name: ClassVar[str] = "digits"

    @property
    def source(self) -> str:
        return "scikit-learn's digits, 1797 images of 8 × 8 pixels in [0, 1]"

    @property
    def recipe(self) -> TrainConfig:
        return plain_adamw(steps=570, batch=32, lr=3e-3)  # 15 epochs

    @cached_property
    def data(self) -> dict[str, tuple[Tensor, Tensor]]:
        return digits()

    def network(self) -> nn.Module:
        return MLP((64, *self.hidden_widths), 10, nn.Tanh)


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Return the digits by part.

    **Raises:** `DataError` without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError('the digits need scikit-learn: pip install "altprop[tasks]"') from None
    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32) / 16
    return split(x, torch.tensor(found.target), (1197, 240, 360))

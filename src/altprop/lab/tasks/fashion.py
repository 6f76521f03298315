"""Fashion-MNIST from IDX files: Debian's package `dataset-fashion-mnist`, or any folder of them."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from altprop import DataError
from altprop.lab.settings import TrainConfig
from altprop.lab.tasks.task import MLP, AbstractClassification, plain_adamw

DEBIAN = "/usr/share/datasets/fashion-mnist"
LARGEST = 2**30  # bytes of a file's numbers


@dataclass(frozen=True)
class Fashion(AbstractClassification):
    """Classify Fashion-MNIST: 55 000 images to learn from, 5 000 to choose by, 10 000 to test.

    **Arguments:** `folder`, with the four IDX files, plain or gzipped, MNIST's own too;
    `hidden_widths`, of the hidden layers.
    """

    folder: str = DEBIAN
    hidden_widths: tuple[int, ...] = (500,)

    name: ClassVar[str] = "fashion"
    rates: ClassVar[tuple[float, ...]] = (3e-4, 1e-3, 3e-3)

    @property
    def source(self) -> str:
        return f"IDX files in {self.folder}, images of 28 × 28 pixels in [0, 1]"

    @property
    def recipe(self) -> TrainConfig:
        return plain_adamw(steps=4300, batch=128, lr=1e-3)  # 10 epochs

    @cached_property
    def data(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The images and classes of each part.

        **Raises:** `DataError` for files that are not there, or that are none of this kind.
        """
        x, y = self._read("train")
        held = len(x) // 12
        test = self._read("t10k")
        return {"train": (x[:-held], y[:-held]), "validation": (x[-held:], y[-held:]), "test": test}

    def _read(self, part: str) -> tuple[Tensor, Tensor]:
        images = read_idx(self._file(f"{part}-images-idx3-ubyte"), 3)
        labels = read_idx(self._file(f"{part}-labels-idx1-ubyte"), 1)
        if len(images) != len(labels) or images[0].numel() != 784 or int(labels.max()) > 9:
            raise DataError(f"{self.folder}: {part} is not images of 28 × 28 in 10 classes")
        return images.flatten(1).float() / 255, labels.long()

    def _file(self, name: str) -> Path:
        folder = Path(self.folder).expanduser()
        for file in (folder / name, folder / f"{name}.gz"):
            if file.is_file():
                return file
        raise DataError(
            f"{self.folder} has no {name}: install Debian's package dataset-fashion-mnist, or "
            "name a folder of IDX files, Fashion(folder='…')"
        )

    def network(self) -> nn.Module:
        return MLP((784, *self.hidden_widths), 10, nn.Sigmoid)


def read_idx(file: Path, axes: int) -> Tensor:
    """Return the bytes of an IDX file, plain or gzipped, as a uint8 tensor of so many axes.

    **Raises:** `DataError` for a file that is no such, or is cut off.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            head = stream.read(4 + 4 * axes)
            shape = [int.from_bytes(head[i : i + 4], "big") for i in range(4, len(head), 4)]
            if head[:4] != bytes([0, 0, 8, axes]) or math.prod(shape) > LARGEST:
                raise DataError(f"{file}: not an IDX file of bytes on {axes} axes")
            body = stream.read(math.prod(shape) + 1)
    except (OSError, EOFError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from None
    if len(shape) != axes or len(body) != math.prod(shape):
        raise DataError(f"{file}: cut off or too long: {len(body)} bytes for the shape {shape}")
    return torch.from_numpy(np.frombuffer(body, np.uint8).reshape(shape).copy())

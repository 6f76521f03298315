"""Options that change what a run costs and not what it is: threads, compilation, checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from altprop import equilibria
from altprop.lab.settings import TrainConfig


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute by so many threads of the CPU in here; `None` leaves it as it is."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compile_parts(model: nn.Module, config: TrainConfig) -> None:
    """Compile, at its first call, what the run asks for: the dynamics of equilibria, or the model.

    The length of a relaxation depends on the data, so what it iterates over is compiled.
    """
    if config.compile:
        for part in [block.dynamics for _, block in equilibria(model)] or [model]:
            part.compile()

"""How well a model predicts a text that it has not learned from, and from which states."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from altprop.lab.guard import certificates, within
from altprop.lm.text import gather
from altprop.lm.text.token_file import Tokens


class Evaluation(NamedTuple):
    """Mean cross-entropy in nats per token, worst free residual, whether all are in the limit."""

    loss: float
    free_residual: float
    settled: bool

    def record(self, prefix: str) -> dict[str, Any]:
        """Return it as a run logs it."""
        return {f"{prefix}_{name}": value for name, value in self._asdict().items()}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    held_out: tuple[Tensor, Tensor],
    batch: int,
    device: torch.device,
    free_limit: float = math.inf,
    count: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Return what a model makes of fixed windows.

    **Arguments:** `held_out`, inputs and targets, each int64 `(N, T)`; `batch`, how many windows at
    a time; `free_limit`, the largest free residual of a state that counts as settled (solves of a
    fixed number of steps always do); `count`, called after every batch.
    """
    total, settled = 0.0, True
    residuals = [0.0]
    ids, targets = held_out
    training = model.training
    model.eval()
    for x, y in zip(ids.split(batch), targets.split(batch), strict=True):
        _, loss = model(x.to(device), y.to(device))
        total += float(loss) * len(x)
        for seen in certificates(model):
            residuals.append(float(seen.free_residual.max()))
            settled = settled and within(free_limit, seen.result, seen.free_residual)
        count()
    model.train(training)
    worst = float(torch.tensor(residuals, dtype=torch.float64).max())  # which keeps NaN, unlike max
    return Evaluation(total / len(ids), worst, settled)


def tiles(tokens: Tokens, most: int, context: int) -> tuple[Tensor, Tensor]:
    """Return the windows of a text, one after the other without overlap, as x and y, `(N, T)`.

    The last tokens, which fill no window, are left out. Of more than `most` windows, `most` evenly
    spaced ones are taken, the first among them.
    """
    count = count_tiles(tokens, context)
    chosen = np.arange(min(most, count)) * count // min(most, count)
    return gather(tokens, chosen * context, context)


def count_tiles(tokens: Tokens, context: int) -> int:
    """Return how many windows a text has without overlap."""
    return (len(tokens) - 1) // context

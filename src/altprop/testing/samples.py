"""The law of samples: the gradient of a batch is the sum of its samples' gradients.

Whatever a rule sends where, one sample's error must meet that sample alone. The model has every
kind of place (linear maps, attention's projections, blocks, sublayers), in both layouts.
Shapes: N samples, T tokens, C features, V outputs; (N, T, C), or (T, N, C) for sequence first.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from altprop.conversion.convert import convert
from altprop.conversion.learned import feedback_parameters
from altprop.feedback import generator_for
from altprop.rule import AbstractRule
from altprop.testing.contract import require

N, C, V = 3, 4, 5


@dataclass(frozen=True)
class _Arrangement:
    """Where samples and tokens lie: inside the blocks, and where the error is taken."""

    T: int
    inside_first: bool
    head: str
    """`"batch first"`, `"sequence first"` or `"pooled"`, an error without tokens."""

    def __str__(self) -> str:
        inside = "batch first" if self.inside_first else "sequence first"
        return f"{N} samples of {self.T} tokens, {inside} in the blocks, {self.head} at the head"


class _Model(nn.Module):
    """Two of torch's encoder layers and a head; `forward` takes and returns samples first."""

    def __init__(self, arrangement: _Arrangement) -> None:
        super().__init__()
        self.arrangement = arrangement
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                C, 2, 6, dropout=0.0, batch_first=arrangement.inside_first, dtype=torch.float64
            )
            for _ in range(2)
        )
        self.head = nn.Linear(C, V, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        own = self.arrangement
        x = x if own.inside_first else x.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        x = x if own.inside_first else x.transpose(0, 1)
        if own.head == "sequence first":
            return cast(Tensor, self.head(x.transpose(0, 1))).transpose(0, 1)
        return cast(Tensor, self.head(x.mean(1) if own.head == "pooled" else x))


def _gradients(model: _Model, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return what the loss `Σₙ wₙ ℓ(logitsₙ)` writes, learned feedback (not additive) left out."""
    model = copy.deepcopy(model)  # every pass is the first, with the same draws and feedback
    loss = (model(x).cos().flatten(1).sum(1) * weights).sum()
    loss.backward()
    learned = {id(p) for p in feedback_parameters(model)}
    found = {}
    for name, p in model.named_parameters():
        if id(p) not in learned:
            require(p.grad is not None, f"{name} got no gradient")
            found[name] = cast(Tensor, p.grad)
    return found


def check_samples(rule: AbstractRule) -> None:
    """Assert that a batch's gradient is the sum of its samples', in every arrangement of axes.

    **Raises:** `AssertionError`, with the arrangement and the parameter.
    """
    generator = generator_for(0, "check_samples")
    weights = torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    heads = ("batch first", "sequence first", "pooled")
    for arrangement in itertools.starmap(
        _Arrangement, itertools.product((N, N - 1), (True, False), heads)
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = convert(_Model(arrangement), rule, output="head")
        x = torch.randn(N, arrangement.T, C, generator=generator, dtype=torch.float64)
        whole = _gradients(model, x, weights)
        parts = [_gradients(model, x[n : n + 1], weights[n : n + 1]) for n in range(N)]
        for name, got in whole.items():
            wanted = torch.stack([part[name] for part in parts]).sum(0)
            error, size = float((got - wanted).norm()), float(wanted.norm())
            require(
                error <= 1e-10 * max(1.0, size),
                f"{name}: the gradient of a batch is off the sum of its samples' gradients by "
                f"{error:.1e} of {size:.1e} ({arrangement})",
            )

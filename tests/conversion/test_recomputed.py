"""Activation checkpoints anywhere in a model: what is recomputed is what was recorded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import altprop as ap
from conversions import assert_equal, gradients

X = torch.randn(6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
RULES = [
    ap.DirectFeedback(std=0.5),
    ap.DirectFeedback(pass_through="pure", std=0.5),
    ap.DirectFeedback(pass_through="pure", calibrate_every=2, std=0.5),
    ap.DirectFeedback(error="head_input", std=0.5),
    ap.DirectFeedback("block", std=0.5),
    ap.DirectFeedback("block", calibrate_every=2, std=0.5),
    ap.DirectFeedback("sublayer", std=0.5),
    ap.BlockDirectFeedback(std=0.5),
    ap.GrAPE(std=0.5, calibrate_every=2),
]


class Block(nn.Module):
    sublayer_outputs = ("one", "two")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.one, self.two = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x + torch.tanh(self.first(x)))
        out: Tensor = self.two(x + self.second(torch.tanh(x) * x))
        return out


class Net(nn.Module):
    """`parts`, which of block, tail (a block and the head) and head are recomputed."""

    def __init__(self, parts: str) -> None:
        super().__init__()
        self.embed, self.parts = nn.Linear(4, 4), parts.split()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(4, 5)

    def run(self, part: str, f: object, x: Tensor) -> Tensor:
        assert callable(f)
        out: Tensor = checkpoint(f, x, use_reentrant=False) if part in self.parts else f(x)
        return out

    def tail(self, x: Tensor) -> Tensor:
        return self.run(
            "head", self.head, torch.tanh(self.run("block", self.blocks[1], x)).square()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.run("tail", self.tail, self.run("block", self.blocks[0], self.embed(x)))


@pytest.mark.parametrize("parts", ["head", "tail", "block", "block head"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_part_that_is_recomputed_has_the_gradients_of_one_that_is_not(
    rule: ap.AbstractRule, parts: str
) -> None:
    models = []
    for checkpointed in ("", parts):
        torch.manual_seed(0)
        models.append(ap.convert(Net(checkpointed).double(), rule, output="head", batch_axis=0))
    for _ in range(3):  # some of which are calibrations
        assert_equal(gradients(models[1], X), gradients(models[0], X))


def test_a_feedback_that_was_changed_before_it_is_needed_is_noticed_under_a_checkpoint_too() -> (
    None
):
    for parts in ("", "head"):
        model = ap.convert(Net(parts).double(), ap.DirectFeedback(), output="head", batch_axis=0)
        loss = model(X).sum()
        with torch.no_grad():
            model.B_dfa_shared.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

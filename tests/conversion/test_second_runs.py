"""A model that is run once more to be measured: the pass itself must find everything as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from conversions import assert_equal, gradients

RULES = [
    ap.GrAPE(std=0.5),
    ap.DirectFeedback(std=0.5),  # whose samples are looked for, as many as tokens
    ap.DirectFeedback("block", std=0.5),
]


class Changing(nn.Module):
    """A model that changes its input, and buffers in place and by name, in any mode."""

    count: Tensor
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("sums", torch.zeros(4))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2)
        )
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor, given: dict[str, list[Tensor]] | None = None) -> Tensor:
        x.sub_(0.5)
        if given is not None:
            given["shift"][0].add_(1.0)
            x = x + given["shift"][0]
        x = x + self.count + self.sums
        self.count = self.count + 1.0
        self.sums.add_(x.detach().mean((0, 1)))
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_pass_computes_what_the_plain_model_computes(
    rule: ap.AbstractRule, training: bool
) -> None:
    torch.manual_seed(0)
    plain = Changing().double().train(training)
    model = ap.convert(copy.deepcopy(plain), rule, output="head")
    for _ in range(2):
        x = torch.randn(3, 3, 4, dtype=torch.float64)
        found = []
        for one in (plain, model):
            given, shift = x.clone(), torch.zeros(4, dtype=torch.float64)
            logits = one(given, {"shift": [shift]})
            logits.sum().backward()
            found.append((logits.detach(), given, shift, one.count, one.sums))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_buffer_that_is_first_made_in_a_pass_stays() -> None:
    class Growing(Changing):
        def forward(self, x: Tensor, given: Any = None) -> Tensor:
            if not hasattr(self, "mask"):
                self.register_buffer("mask", torch.ones(4).to(x))
            return super().forward(x * self.mask)

    model = ap.convert(Growing().double(), ap.GrAPE(), output="head")
    model(torch.randn(3, 3, 4, dtype=torch.float64)).sum().backward()
    assert hasattr(model, "mask")


def test_what_a_probe_might_change_is_not_given_to_it() -> None:
    class Cache:
        pass

    class Cached(Changing):
        def forward(self, x: Tensor, cache: Any = None) -> Tensor:
            return super().forward(x)

    model = ap.convert(Cached().double(), ap.GrAPE(), output="head")
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    with pytest.raises(ap.RuleError, match=r"GrAPE runs the model once more .* the Cache that it"):
        model(x, cache=Cache())
    model(x, cache=None)


class Tokens(nn.Module):
    """A model of (T, N, C), whose error is one of tokens or their mean's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mean: bool) -> Tensor:
        h = torch.tanh(self.up(x))
        logits: Tensor = self.head(h.mean(0) if mean else h)
        return logits


def test_what_one_kind_of_error_told_is_not_believed_of_another() -> None:
    torch.manual_seed(0)
    model = ap.convert(Tokens().double(), ap.DirectFeedback(std=1.0), output="head")
    x = torch.randn(4, 4, 4, dtype=torch.float64)
    gradients(model, torch.randn(5, 3, 4, dtype=torch.float64), False)  # tokens or samples: alike
    got = gradients(model, x, True)
    each = [gradients(model, x[:, i : i + 1], True) for i in range(4)]
    assert_equal(got, {name: sum(g[name] for g in each) for name in got})  # type: ignore[misc]

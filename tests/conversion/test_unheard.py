"""A map whose weight is read while its module is not called: no rule acts, and that is said."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import altprop as ap
from conversions import assert_equal, gradients

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """`how` the second block runs: by its module, by its weights, by its parts, or not at all."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        block: Any = self.blocks[1]
        if self.how == "weights":
            x = torch.tanh(F.linear(x, block[0].weight, block[0].bias))
        elif self.how == "parts":
            x = block[1](block[0](x))
        elif self.how == "module":
            x = block(x)
        elif self.how == "tied":  # another module has the weight and runs
            x = torch.tanh(self.blocks[0][0](x))  # type: ignore[index]
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("grain", ["matmul", "block"])
@pytest.mark.parametrize("how", ["weights", "parts", "module", "none", "tied"])
def test_what_is_read_and_never_called_is_named_once(how: str, grain: str) -> None:
    torch.manual_seed(0)
    model = Net(how).double()
    if how == "tied":
        model.blocks[1][0].weight = model.blocks[0][0].weight  # type: ignore[index]
    ap.convert(model, ap.DirectFeedback(grain), output="head", batch_axis=0)
    unheard = how == "weights" or (how == "parts" and grain == "block")
    name = "blocks.1.0" if grain == "matmul" else "blocks.1"
    if unheard:
        with pytest.warns(ap.RuleWarning, match=rf"^{name}: weights are read there, but the mod"):
            gradients(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(model, X)
        gradients(copy.deepcopy(model), X)


def test_a_pattern_says_that_it_is_meant() -> None:
    model = Net("weights").double()
    rules = {"blocks.1": ap.Backprop(), "*": ap.DirectFeedback()}
    ap.convert(model, rules, output="head")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(model, X)


def test_the_places_that_are_called_hear_the_error_as_ever() -> None:
    found = []
    for how in ("weights", "module"):
        torch.manual_seed(0)
        model = ap.convert(Net(how).double(), {"blocks.*": ap.DirectFeedback()}, output="head")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ap.RuleWarning)
            found.append(gradients(model, X))
    own = [{n: g for n, g in one.items() if n.startswith("blocks.0")} for one in found]
    assert_equal(*own)

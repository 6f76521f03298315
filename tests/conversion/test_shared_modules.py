"""A module that stands in several places of a model is one module, whichever path names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from conversions import assert_equal, gradients

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Twice(nn.Module):
    """A chain whose last map and first part have names of their own as well."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), nn.Linear(4, 5)
        )
        self.encoder, self.head = self.net[0], self.net[1]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def converted(rule: Any, **options: Any) -> Twice:
    torch.manual_seed(0)
    return ap.convert(Twice().double(), rule, **options)


FA, DFA = ap.FeedbackAlignment(std=1.0), ap.DirectFeedback(std=0.5)
BLOCK = ap.DirectFeedback("block", std=0.5)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (dict(rule=DFA, output="head"), dict(rule=DFA, output="net.1")),
        (dict(rule={"head": ap.Backprop(), "*": FA}), dict(rule={"net.1": ap.Backprop(), "*": FA})),
        (dict(rule={"encoder": FA}), dict(rule={"net.0": FA})),
        (dict(rule={"encoder.2": FA}), dict(rule={"net.0.2": FA})),
        (dict(rule={"encoder": BLOCK}, output="head"), dict(rule={"net.0": BLOCK}, output="net.1")),
        (
            dict(rule={"encoder": ap.Backprop(), "*": FA}),
            dict(rule={"net.0": ap.Backprop(), "*": FA}),
        ),
    ],
    ids=str,
)
def test_every_path_of_a_module_names_it(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert_equal(gradients(converted(**one), X), gradients(converted(**other), X))


class Sharing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(shared, nn.Tanh(), nn.Linear(4, 4)) for _ in range(2)
        )
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def test_a_map_of_two_blocks_has_no_one_block_whose_error_it_hears() -> None:
    rule = ap.BlockDirectFeedback(std=0.5)
    with pytest.raises(ap.RuleError, match=r"- blocks\.0\.0: it is in blocks\.0 and in blocks\.1"):
        ap.convert(Sharing(), rule)
    model = ap.convert(Sharing().double(), {"blocks.1.0": ap.Backprop(), "blocks": rule})
    told = {row.parameter: row.rule for row in ap.explain(model).rows}
    assert told["blocks.0.0.weight"] != told["blocks.0.2.weight"] == "BlockDirectFeedback"
    gradients(model, X)


@pytest.mark.parametrize("rule", [DFA, BLOCK, ap.GrAPE(std=0.5)], ids=str)
def test_a_map_of_two_blocks_hears_the_one_error_of_the_output(rule: ap.AbstractRule) -> None:
    assert gradients(ap.convert(Sharing().double(), rule, output="head"), X)


@pytest.mark.parametrize("rule", [BLOCK, ap.BlockDirectFeedback(std=0.5)], ids=str)
def test_a_list_of_blocks_is_no_block_and_stands_for_its_members(rule: ap.AbstractRule) -> None:
    found = []
    for pattern in ("blocks", "blocks.*"):
        torch.manual_seed(0)
        rules = {"blocks.*.0": ap.Backprop(), pattern: rule}
        model = ap.convert(Sharing().double(), rules, output="head")
        found.append(gradients(model, X))
    assert_equal(*found)
    plain = gradients(ap.revert(model), X)
    assert not torch.equal(found[0]["blocks.0.2.weight"], plain["blocks.0.2.weight"])

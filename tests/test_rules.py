"""The contract of every rule, in one list: a new rule is one line here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import altprop as ap
from altprop.testing import check_distributed, check_rule

RULES = [
    ap.Backprop(),
    ap.FeedbackAlignment(),
    ap.FeedbackAlignment(init="sparse", k=2),
    ap.SignSymmetry(),
    ap.SignSymmetry(scale="fan_in", variant="brsf"),
    ap.SignSymmetry(scale="none", variant="frsf"),
    ap.KolenPollack(),
    ap.WeightMirror(probes=4),
    ap.AlignedFeedback(probes=4),
    ap.AlignedFeedback(probes=4, normalize=True),
    ap.DirectFeedback(feedback="independent"),
    ap.DirectFeedback(pass_through="pure"),
    ap.DirectFeedback(granularity="sublayer"),
    ap.DirectFeedback(granularity="block", error="head_input", feedback="independent"),
    ap.DirectFeedback(granularity="block"),
    ap.DirectFeedback(granularity="block", calibrate_every=2),
    ap.BlockDirectFeedback(),
    ap.GrAPE(),
    ap.GrAPE(probes=2, every=2, normalize="output", calibrate_every=3, error="head_input"),
]


# whose kind is compiled in another one's case
LIKE = {
    ap.FeedbackAlignment(init="sparse", k=2),
    ap.SignSymmetry(scale="none", variant="frsf"),
    ap.AlignedFeedback(probes=4, normalize=True),
    ap.DirectFeedback(granularity="block", error="head_input", feedback="independent"),
    ap.GrAPE(probes=2, every=2, normalize="output", calibrate_every=3, error="head_input"),
}
assert set(RULES) > LIKE


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rule_keeps_the_contract(rule: ap.AbstractRule) -> None:
    check_rule(rule, compiled=rule not in LIKE, distributed=False)


def test_the_contract_takes_an_independent_formula_and_finds_a_rule_that_is_another() -> None:
    def as_published(W: Tensor, B: Tensor | None, noise: Tensor | None) -> Tensor:
        return torch.sign(W) * W.square().mean().sqrt()

    check_rule(ap.SignSymmetry(), matrix=as_published, compiled=False, distributed=False)
    with pytest.raises(AssertionError, match="gradient of x is off its closed form"):
        other = ap.SignSymmetry(scale="fan_in")
        check_rule(other, matrix=as_published, compiled=False, distributed=False)


def test_every_rule_gives_the_joint_gradient_in_two_processes() -> None:
    check_distributed(RULES)

"""Every rule on everybody's model against closed forms on a copy that was never converted."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from cases import Case, distance
from torch import Tensor, nn
from zoo import ALL, BROADCASTS, BY_NAME, CASES, RULES, TRANSPORTS, named

import altprop as ap

FEEDBACK = [r for r in TRANSPORTS if not isinstance(r, ap.SignSymmetry | ap.Backprop)]


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


@ALL
@pytest.mark.parametrize("rule", RULES, ids=named)
def test_every_gradient_is_the_rules_closed_form(case: Case, rule: ap.AbstractRule) -> None:
    model, got = case.trained(rule)
    assert distance(got, oracles.expected(case, rule, model)) <= 1e-9


@ALL
@pytest.mark.parametrize("rule", FEEDBACK, ids=named)
def test_feedback_equal_to_the_weight_is_backprop(case: Case, rule: ap.AbstractTransport) -> None:
    model = case.convert(rule)
    pairs = [(m, oracles.feedback(everything(model), m)) for m in oracles.ruled(case, model, rule)]
    assert pairs
    with torch.no_grad():
        for m, B in pairs:
            B.copy_(m.weight)
    got = case.gradients(model)
    assert distance(got, case.backprop) <= 1e-9
    for m, B in pairs if isinstance(rule, ap.KolenPollack) else []:
        wanted = got.get(m.parameter("weight"))  # of a tied weight the feedback hears a part
        assert wanted is None or torch.equal(B.grad, wanted.t() if m.flipped else wanted)


@ALL
@pytest.mark.parametrize("rule", [r for r in FEEDBACK if r.learned], ids=named)
def test_feedback_learns_if_and_only_if_its_weight_does(
    case: Case, rule: ap.AbstractTransport
) -> None:
    model, _ = case.trained(rule)
    for m in oracles.ruled(case, model, rule):
        B, learns = oracles.feedback(everything(model), m), m.weight.requires_grad
        assert B.requires_grad is learns and (B.grad is not None) is learns, m.path


TOPPED = [case for case in CASES if case.top is not None]


@pytest.mark.parametrize("case", TOPPED, ids=lambda case: case.name)
def test_the_heads_transpose_as_feedback_of_the_top_block_is_backprop_there(case: Case) -> None:
    rule = ap.DirectFeedback(granularity="block", feedback="independent")
    model = case.convert(rule)
    top = model.get_submodule(case.top)
    with torch.no_grad():
        top.B_dfa.copy_(case.output_module(model).weight.t())
    got = case.gradients(model)
    exact = {n: g for n, g in case.backprop.items() if n.startswith((case.top, case.output))}
    assert len(exact) >= 4 and distance(got, exact) <= 1e-9


OTHER_TOKENS = [
    (case, rule)
    for case in CASES if case.elsewhere
    for rule in BROADCASTS
    if case.name == "t5" or "maps" in rule.takes or isinstance(rule, ap.BlockDirectFeedback)
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "rule"), OTHER_TOKENS, ids=lambda v: v.name if isinstance(v, Case) else named(v)
)
def test_an_error_of_other_tokens_is_refused(case: Case, rule: Any) -> None:
    model = case.converted(rule)
    with pytest.raises(ap.RuleError, match="does not fit") as caught:
        case.gradients(model)
    assert "\n" not in str(caught.value)
    assert distance(case.gradients(ap.revert(model)), case.backprop) == 0.0


FOR_MAPS = [
    rule
    for rule in RULES
    if "maps" in rule.takes or isinstance(rule, ap.BlockDirectFeedback)
    if not isinstance(rule, ap.Backprop)
]


@pytest.mark.parametrize("rule", FOR_MAPS, ids=named)
def test_a_map_of_unknown_forward_is_refused_with_what_to_write(rule: ap.AbstractRule) -> None:
    case = BY_NAME["weight norm, then convert"]
    model = case.base()
    with pytest.raises(ap.RuleError, match="ParametrizedLinear.*by a pattern.*Backprop"):
        ap.convert(model, rule, output=case.output)
    assert distance(case.gradients(model), case.backprop) == 0.0

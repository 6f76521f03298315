"""One conversion after another, and parts and copies of converted models: no way leads nowhere.

The oracles are fresh conversions, and conversions whose patterns leave the same part out.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import altprop as ap
from conversions import TOKENS, assert_equal, assert_same_model, gradients, tiny
from refusals import one_line

FA = ap.FeedbackAlignment(std=0.5)
KINDS: dict[str, ap.AbstractRule] = {
    "transport": FA,
    "learned": ap.KolenPollack(),
    "noisy": ap.SignSymmetry(variant="brsf"),
    "matmul": ap.DirectFeedback(),
    "pure": ap.DirectFeedback(pass_through="pure", feedback="independent"),
    "block": ap.DirectFeedback(granularity="block", calibrate_every=2),
    "block-wise": ap.BlockDirectFeedback(),
    "grape": ap.GrAPE(),
    "stack": ap.AEP(),
}


def convert(model: nn.Module, kind: str, blocks: str = "blocks", output: str = "head") -> Any:
    rule = KINDS[kind]
    if isinstance(rule, ap.AbstractEstimator):
        return ap.convert(model, {blocks: rule})
    return ap.convert(model, rule, output=output)


@pytest.mark.parametrize(
    ("first", "second"), list(zip(KINDS, [*list(KINDS)[1:], next(iter(KINDS))], strict=True))
)
def test_a_conversion_after_another_one_is_as_if_it_were_the_first(first: str, second: str) -> None:
    model, fresh = convert(tiny(), first), convert(tiny(), second)
    gradients(model, TOKENS)
    ap.revert(model)
    assert_same_model(model, tiny())
    convert(model, second)
    assert_same_model(model, fresh)
    for _ in range(2):
        assert_equal(gradients(model, TOKENS), gradients(fresh, TOKENS), 0.0)
    rows = [str(ap.explain(m)) for m in (model, fresh)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "stack"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_part_reverted_alone_is_as_if_it_had_got_no_rule(kind: str, index: int) -> None:
    model = convert(tiny(), kind)
    gradients(model, TOKENS)
    assert ap.revert(model.blocks[index]) is model.blocks[index]
    assert_same_model(model.blocks[index], tiny().blocks[index])
    rules = {f"blocks.{1 - index}": KINDS[kind]}
    if kind in ("transport", "learned", "noisy"):
        rules["head"] = KINDS[kind]
    without = ap.convert(tiny(), rules, output="head")
    gradients(without, TOKENS)
    for _ in range(2):
        assert_equal(gradients(model, TOKENS), gradients(without, TOKENS))
    assert str(ap.explain(model)) == str(ap.explain(without))
    assert_same_model(ap.revert(model), tiny())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["child", "copy", "pickle", "moved"])
def test_no_part_of_a_converted_model_is_a_dead_end(kind: str, how: str) -> None:
    model = convert(tiny(), kind)
    gradients(model, TOKENS)
    part, plain = model.blocks[0], tiny().blocks[0]
    if how == "copy":
        part = copy.deepcopy(part)
    elif how == "pickle":
        part = pickle.loads(pickle.dumps(part))
    elif how == "moved":
        part, plain = nn.Sequential(part), nn.Sequential(plain)
        del model
    assert ap.explain(part).rows
    with pytest.raises(ap.RuleError, match=r"revert\(model\)"):
        ap.convert(part, FA)
    assert_same_model(ap.revert(part), plain)
    with pytest.raises(ap.RuleError, match="nothing to revert") as caught:
        ap.revert(part)
    one_line(caught)
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    assert_equal(gradients(ap.convert(part, FA), x), gradients(ap.convert(plain, FA), x))
    assert_same_model(ap.revert(part), ap.revert(plain))


def test_a_part_converted_anew_obeys_its_rule_within_the_whole() -> None:
    model = ap.convert(tiny(), FA)
    ap.convert(ap.revert(model.blocks[1]), ap.SignSymmetry())
    want = ap.convert(tiny(), {"blocks.1": ap.SignSymmetry(), "*": FA})
    assert_equal(gradients(model, TOKENS), gradients(want, TOKENS))
    assert [r.rule for r in ap.explain(model).rows] == [r.rule for r in ap.explain(want).rows]
    assert_same_model(ap.revert(model), tiny())


# --- stacks


def test_a_stack_of_which_a_block_was_reverted_refuses_to_run_until_all_are() -> None:
    model = convert(tiny(), "stack")
    ap.revert(model.blocks[1])
    with pytest.raises(ap.RuleError, match=r"blocks\.1 of the stack .*revert\(model\)") as caught:
        gradients(model, TOKENS)
    one_line(caught)
    assert_equal(gradients(ap.revert(model), TOKENS), gradients(tiny(), TOKENS))


def test_a_stack_is_reverted_by_its_list_of_blocks_and_may_be_made_again() -> None:
    model = convert(tiny(), "stack")
    assert_same_model(ap.revert(model.blocks), tiny().blocks)
    assert_equal(gradients(model, TOKENS), gradients(tiny(), TOKENS))
    assert {row.rule for row in ap.explain(model).rows} == {"Backprop"}
    convert(ap.revert(model), "stack")
    assert_equal(gradients(model, TOKENS), gradients(convert(tiny(), "stack"), TOKENS))


def test_a_replaced_block_of_a_stack_is_named_in_the_pass() -> None:
    model = convert(tiny(), "stack")
    model.blocks[0] = copy.deepcopy(tiny().blocks[0])
    with pytest.raises(ap.RuleError, match=r"if one was replaced: write revert\(model\)") as caught:
        gradients(model, TOKENS)
    one_line(caught)
    assert next(r for r in ap.explain(model).rows if "blocks.0" in r.parameter).rule == "Backprop"
    assert_same_model(ap.revert(model), tiny())


def test_no_rule_gets_into_a_level_of_a_stack() -> None:
    model = convert(tiny(), "stack")
    for part in (model, model.blocks, model.blocks[0]):
        with pytest.raises(ap.RuleError, match=r"it is already converted .*revert\(model\)"):
            ap.convert(part, FA)
    ap.convert(model.blocks[0].first, FA)  # which does not know what it is a part of
    with pytest.raises(ap.RuleError, match="converted by itself") as caught:
        gradients(model, TOKENS)
    one_line(caught)
    assert_same_model(ap.revert(model), tiny())

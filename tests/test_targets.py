"""The dry run says of every place what `convert` then does, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import altprop as ap
from altprop.conversion.record import record_of, sites_of
from conversions import assert_same_model, tiny

MAPPINGS: list[Any] = [
    ap.FeedbackAlignment(),
    ap.DirectFeedback(),
    ap.DirectFeedback(granularity="block"),
    ap.GrAPE(),
    ap.BlockDirectFeedback(),
    {"blocks": ap.AEP()},
    {"blocks.0": ap.Backprop(), "*": ap.SignSymmetry()},
    {"blocks.*": ap.DirectFeedback(), "head": ap.FeedbackAlignment()},
]


@pytest.mark.parametrize("rule", MAPPINGS, ids=str)
def test_what_would_be_taken_is_what_convert_takes(rule: Any) -> None:
    model = tiny()
    found = ap.targets(model, rule, output="head")
    assert_same_model(model, tiny())
    assert found.problems == () and all(bool(row.rule) != bool(row.why) for row in found.rows)
    ap.convert(model, rule, output="head")
    places = {path for path, module in model.named_modules() if sites_of(module)}
    assert {row.path for row in found.taken} == places
    explained = {row.parameter: row.rule for row in ap.explain(model).rows}
    for row in found.taken:
        below = {name: r for name, r in explained.items() if name.startswith(f"{row.path}.")}
        assert set(below.values()) == {row.rule}, row


def test_every_place_that_is_left_says_why() -> None:
    model = tiny()
    rules = {"blocks.0": ap.Backprop(), "blocks": ap.FeedbackAlignment()}
    told = {row.path: row.why for row in ap.targets(model, rules).rows}
    maps = {p for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert told.keys() == maps and told["head"] == "no pattern matches it"
    assert {told[p] for p in maps if p.startswith("blocks.0.")} == {"kept on backprop"}
    broadcast = {r.path: r.why for r in ap.targets(model, ap.GrAPE(), output="head").rows}
    assert broadcast["head"] == "it makes the logits: its gradient is exact"
    inside = next(p for p in maps if p.startswith("blocks.0."))
    assert broadcast[inside] == "part of blocks.0, which GrAPE takes as a whole"
    other = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Linear(3, 3), nn.LayerNorm(3))
    conv, linear = ap.targets(other, ap.FeedbackAlignment()).rows
    assert conv.why == "no linear map that is known: register_layer(Conv1d) if it is one"
    assert (linear.path, linear.kind, linear.rule) == ("1", "Linear", "FeedbackAlignment")


class Odd(nn.Linear):
    """A subclass, whose forward nobody knows."""


REFUSED: list[tuple[Any, Any, dict[str, Any]]] = [
    (tiny, ap.DirectFeedback(), {}),
    (tiny, {"nothing": ap.FeedbackAlignment()}, {}),
    (tiny, ap.AEP(), {}),
    (tiny, ap.DirectFeedback(), {"output": "hed"}),
    (lambda: nn.Sequential(nn.Linear(2, 2), Odd(2, 2)), ap.FeedbackAlignment(), {}),
    (lambda: nn.Linear(2, 2, device="meta"), ap.FeedbackAlignment(), {}),
    (lambda: ap.convert(tiny(), ap.SignSymmetry()), ap.FeedbackAlignment(), {}),
]


@pytest.mark.parametrize(("make", "rule", "how"), REFUSED)
def test_its_problems_are_those_for_which_convert_refuses(make: Any, rule: Any, how: Any) -> None:
    model = make()
    before = [record_of(module) for module in model.modules()]
    found = ap.targets(model, rule, **how)
    with pytest.raises(ap.RuleError) as error:
        ap.convert(model, rule, **how)
    assert found.problems and str(error.value).split("\n  - ")[1:] == list(found.problems)
    assert all(line in str(found) for line in found.problems)
    assert [record_of(module) for module in model.modules()] == before


def test_the_table_has_a_line_for_each_place() -> None:
    torch.manual_seed(0)
    found = ap.targets(tiny(), ap.FeedbackAlignment())
    lines = str(found).splitlines()
    assert len(lines) == 2 + len(found.rows) and lines[0].split() == [
        "place",
        "kind",
        "rule",
        "why",
        "not",
    ]
    with pytest.raises(ap.ConfigError, match="a rule must be a value"):
        ap.targets(tiny(), ap.FeedbackAlignment)  # type: ignore[arg-type]

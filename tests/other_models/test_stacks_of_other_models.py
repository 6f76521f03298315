"""A stack of anybody's blocks by AEP and by implicit gradients is backprop."""

from __future__ import annotations

import pytest
import torch
from cases import Case, distance
from torch import nn
from zoo import CASES, named

import altprop as ap

STACKS = [
    pytest.param(case, stack, id=f"{case.name}-{stack}") for case in CASES for stack in case.stacks
]
EVERY_STACK = pytest.mark.parametrize(("case", "stack"), STACKS)
ESTIMATORS = [(ap.AEP(), 1e-6), (ap.AEP(response=1e-5), 1e-6), (ap.Implicit(), 1e-6)]


def converted(case: Case, stack: str, estimator: ap.AbstractEstimator) -> nn.Module:
    return case.finish(ap.convert(case.base(), {stack: estimator}))


@EVERY_STACK
@pytest.mark.parametrize(
    ("estimator", "bound"), ESTIMATORS, ids=[named(estimator) for estimator, _ in ESTIMATORS]
)
def test_a_stack_is_backprop(
    case: Case, stack: str, estimator: ap.AbstractEstimator, bound: float
) -> None:
    model, batch = converted(case, stack, estimator), case.batch()
    assert torch.equal(case.logits(model, batch), case.logits(case.plain(), batch))
    assert distance(case.gradients(model), case.backprop) <= bound


@EVERY_STACK
def test_explain_tells_a_stack_from_what_is_above_and_below(case: Case, stack: str) -> None:
    model = converted(case, stack, ap.AEP())
    rows = {row.parameter: row for row in ap.explain(model).rows}
    assert rows.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        row = rows[name]
        inside = f"{case.inside}.{stack}.".lstrip(".") in name
        assert ("frozen" in row.signal) is not p.requires_grad
        if p.requires_grad:
            assert (row.rule == "AEP") is inside and ("level" in row.signal) is inside, row
    head = rows.get(f"{case.inside}.{case.output}.weight".lstrip("."))
    entry = rows.get(f"{case.entry}.weight")
    if head is not None and entry is not None and stack == case.stacks[-1]:  # they are not tied
        assert "adjoint" not in head.signal and "adjoint" in entry.signal


@EVERY_STACK
def test_revert_leaves_no_trace_of_a_stack(case: Case, stack: str) -> None:
    model = converted(case, stack, ap.AEP())
    keys = list(model.state_dict())
    case.gradients(model)
    ap.revert(model)
    case.assert_plain(model)
    assert list(model.state_dict()) == keys

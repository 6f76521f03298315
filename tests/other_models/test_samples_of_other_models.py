"""The gradient of a batch is the sum of its samples' gradients, whatever the layout."""

from __future__ import annotations

import pytest
from cases import Case, distance, without_noise, written
from zoo import ALL, RULES, named

import altprop as ap


@ALL
@pytest.mark.parametrize("rule", RULES, ids=named)
def test_a_batch_is_the_sum_of_its_samples(case: Case, rule: ap.AbstractRule) -> None:
    (model, whole), batch = case.trained(rule), case.batch()
    model.zero_grad()
    for n in range(len(batch)):
        case.loss(model, batch.sample(n)).backward()
    summed = written(model)
    assert distance(summed, without_noise(model, rule, whole)) <= 1e-9

"""A comparison that is resumed, or made again, is of the same rules, network, recipe and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import altprop as ap
from altprop.lab.compare import Comparison, compare, comparison
from altprop.lab.compare.arms import Arm
from altprop.lab.compare.results import _cells
from altprop.lab.tasks.supervised import Supervised
from made_comparisons import compare_quickly

x = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
y = (x[:, 0] * x[:, 1] > 0).long()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2))


def wider() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 2))


TASK = Supervised("own", network, (x[:60], y[:60]), (x[60:], y[60:]))
SETTINGS: dict[str, Any] = {"seeds": 2, "steps": 6, "rates": (1e-2,), "budget": 1}
SETTINGS |= {"equal_cost": False, "controls": ("backprop",)}
FA, SIGNS = ap.FeedbackAlignment(std=0.1), ap.SignSymmetry()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compare_quickly(monkeypatch, tmp_path)


def made(out: str, task: Supervised = TASK, rule: Any = FA, **changes: Any) -> Comparison:
    return compare(task, rules={"mine": rule}, out=Path(out), **{**SETTINGS, **changes})


def losses(found: Comparison) -> list[Any]:
    return [
        (arm["name"], arm["curves"], arm["audit"], arm["scores"]) for arm in found.results["arms"]
    ]


def test_what_a_model_draws_is_its_own_whoever_draws_beside_it() -> None:
    first = losses(made("a"))
    torch.manual_seed(7)
    assert losses(made("b")) == first
    assert losses(made("c", workers=2)) == first
    made("d", seeds=1)
    assert losses(made("d", resume=True)) == first


def test_an_arm_does_not_take_over_another_rule_of_its_name() -> None:
    made("a")
    before = Path("a/record.json").read_bytes()
    with pytest.raises(ap.CheckpointError, match="mine was FeedbackAlignment.* is SignSymmetry"):
        made("a", rule=SIGNS, resume=True)
    assert Path("a/record.json").read_bytes() == before
    assert made("a", seeds=3, resume=True).arm("mine")["scores"][2] is not None


@pytest.mark.parametrize("rule", [FA, ap.DirectFeedback(), {"*": ap.GrAPE(), "3": FA}], ids=str)
def test_an_arm_is_known_by_what_its_rule_does_by_default_too(rule: Any) -> None:
    whole = Arm("mine", rule).whole
    for each in rule.values() if isinstance(rule, dict) else [rule]:
        assert all(f"{field.name}={getattr(each, field.name)!r}" in whole for field in fields(each))


def test_another_version_is_another_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    made("a")
    monkeypatch.setattr(comparison, "__version__", "9")
    with pytest.raises(ap.CheckpointError, match="or by another version of altprop"):
        made("a", resume=True)


def test_calibration_alone_is_shared_by_rules_that_come_later() -> None:
    rules = {std: ap.DirectFeedback(std=std, calibrate_every=3) for std in (0.1, 0.2)}
    made("a", rule=rules[0.1], controls=("calibration",))
    task, given = TASK, {**SETTINGS, "controls": ("calibration",), "resume": True}
    both = {"other": rules[0.2], "mine": rules[0.1]}
    assert len(compare(task, rules=both, out=Path("a"), **given).results["arms"]) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda task: replace(task, make=wider),
        lambda task: replace(task, test=(task.test[0], 1 - task.test[1])),
        lambda task: replace(task, train=(task.train[0] + 1, task.train[1])),
        lambda task: replace(task, criterion=nn.MultiMarginLoss()),
        lambda task: replace(task, better="lower"),
        lambda task: replace(task, recipe=replace(task.recipe, batch=16)),
    ],
)
def test_another_network_data_or_recipe_is_another_comparison(
    change: Callable[[Supervised], Supervised],
) -> None:
    made("a")
    before = Path("a/record.json").read_bytes()
    with pytest.raises(ap.CheckpointError, match="another network, recipe or data of own"):
        made("a", change(TASK), resume=True)
    assert Path("a/record.json").read_bytes() == before
    made("a", replace(TASK), resume=True)


def test_a_task_of_ones_own_is_recorded_as_made_in_python() -> None:
    made("a")
    assert '"command": "in Python: compare(own, rules=' in Path("a/record.json").read_text()


def test_a_mean_of_the_seeds_that_did_not_fail_says_so() -> None:
    (arm,) = (arm for arm in made("a").results["arms"] if arm["name"] == "mine")
    assert "seeds" not in _cells(arm)[1]
    assert _cells({**arm, "scores": [50.0, None]})[1].endswith("(1 of 2 seeds)")

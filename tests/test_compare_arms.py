"""What an arm does to a model: what it freezes, where the logits are made, what is no rule."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from altprop.lab.compare import Comparison, compare
from altprop.lab.compare.arms import Arm, output_of
from altprop.lab.tasks import Parity
from altprop.lab.tasks.supervised import Supervised
from altprop.lab.tasks.task import AbstractTask
from made_comparisons import compare_quickly

TASK = Parity(bits=4, k=1, examples=64, width=6)
SMALL: dict[str, Any] = {"seeds": 2, "steps": 6, "rates": (3e-3,), "budget": 1}
FA = ap.FeedbackAlignment(std=0.3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compare_quickly(monkeypatch, tmp_path)


def small(**changes: Any) -> Comparison:
    given = {"task": TASK, "out": Path("out"), "equal_cost": False, **SMALL, **changes}
    return compare(given.pop("task"), **given)


class Turned(nn.Module):
    """Names its head first, calls another map last but one, and may tie it to its embedding."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.head = nn.Linear(6, 9, bias=False)
        self.tokens, self.body = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.unused = nn.Linear(6, 9)
        if tied:
            self.tokens.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.tokens(x).mean(1))))


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_leaves_the_map_that_makes_the_logits_to_learn_wherever_it_is_named(
    tied: bool,
) -> None:
    pair = torch.randint(9, (90, 4)), torch.randint(9, (90,))
    task = Supervised("own", lambda: Turned(tied), pair, pair)
    model = task.model(0)
    Arm("frozen", frozen=True).apply(task, model, 0)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight"]
    assert model.training and not any(m._forward_hooks for m in model.modules())
    Arm("DFA", ap.DirectFeedback()).apply(task, model, 0)  # whose error is at the same map


def test_without_a_hidden_layer_frozen_is_refused_and_the_others_run() -> None:
    pair = torch.randn(90, 3), torch.randint(2, (90,))
    found = small(
        task=Supervised("own", lambda: nn.Linear(3, 2), pair, pair), rules={"FA": FA},
        rates=(1e-2,),
    )  # fmt: skip
    assert "no hidden layer to freeze" in found.arm("frozen")["refused"]
    assert found.arm("FA")["mean"] is not None and found.arm("FA")["recovery"] is None


def test_a_score_may_be_a_tensor_and_a_task_may_keep_what_it_has_read() -> None:
    pair = torch.randn(60, 3), torch.randint(2, (60,))
    task = Supervised(
        "own", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), pair, pair,
        measure=lambda out, y: (out.argmax(-1) == y).float().mean(),  # type: ignore[arg-type,return-value]
    )  # fmt: skip
    options: dict[str, Any] = {"task": task, "rules": {"FA": FA}, "rates": (1e-2,)}
    found = small(**options)
    assert task.parts and isinstance(found.arm("FA")["scores"][0], float)
    again = small(**options, resume=True)
    assert again.results == found.results


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"FA": ap.FeedbackAlignment}, r"expected an object such as FeedbackAlignment\(\)"),
        ({"FA": "FA"}, "a rule is 'FA', expected an object"),
        ({"FA": {"blocks.*": "FA"}}, "a rule is 'FA', expected an object"),
        ((ap.FeedbackAlignment,), "expected an object"),
        (FA, "expected several: write rules="),
        ("FA", "expected several: write rules="),
        ({"": FA}, "an arm is called '', expected a name"),
        ({1: FA}, "an arm is called 1, expected a name"),
    ],
    ids=str,
)
def test_what_is_no_rule_is_refused_in_a_line(rules: Any, said: str) -> None:
    with pytest.raises(ap.ConfigError, match=said):
        small(rules=rules)
    assert not Path("out").exists()


class Counting(nn.Module):
    """Gives another thing in training, counts its passes, and draws by numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        out = self.head(torch.tanh(self.norm(self.body(x))) + np.random.rand())
        return {"out": out} if self.training else out


def test_looking_for_the_output_leaves_model_and_draws_as_they_were() -> None:
    pair = torch.randn(90, 3), torch.randint(2, (90,))
    task = Supervised(
        "own", Counting, pair, pair,
        criterion=lambda out, y: nn.functional.cross_entropy(out["out"], y),
    )  # fmt: skip
    model, drawn = task.model(0), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    assert output_of(task, model) == "head"
    assert int(model.norm.num_batches_tracked) == 0 and not model.norm.running_mean.any()
    assert np.random.get_state()[1].tolist() == drawn  # type: ignore[index,union-attr]


class Ends(nn.Module):
    """Makes its logits by a map of its own, by none, by two, or by an attention's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body, self.head = kind, nn.Linear(4, 4), nn.Linear(4, 4)
        self.other, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        if self.kind == "functional":
            return h @ self.head.weight
        if self.kind == "two":
            return self.head(h) + self.other(h).mean()
        if self.kind == "attention":
            return self.attention(h[:, None], h[:, None], h[:, None])[0][:, 0]
        return self.head(h)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("map", "head"), ("attention", "attention.out_proj"),
        ("functional", "body is the last .* and head.weight reaches the loss past it"),
        ("two", "other is the last .* and body.weight reaches the loss past it"),
    ],
)  # fmt: skip
def test_logits_that_no_single_map_makes_are_asked_for(kind: str, found: str) -> None:
    pair = torch.randn(90, 4), torch.randint(4, (90,))
    task = Supervised("own", lambda: Ends(kind), pair, pair)
    if kind in ("map", "attention"):
        assert output_of(task, task.model(0)) == found
    else:
        with pytest.raises(ap.RuleError, match=f"{found}: name .*output="):
            output_of(task, task.model(0))
        told = replace(task, output="head", hidden=("body.*",))
        Arm("frozen", frozen=True).apply(told, model := task.model(0), 0)
        assert not model.body.weight.requires_grad and model.head.weight.requires_grad


@dataclass(frozen=True)
class Kept(Parity):
    """Keeps what it has read in an attribute, as a frozen dataclass can."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", open(__file__))  # noqa: SIM115


def test_a_task_is_sent_without_what_it_has_read() -> None:
    task = Kept(bits=4, k=1, examples=64, width=6)
    assert pickle.loads(pickle.dumps(task)) == task
    task.file.close()  # type: ignore[attr-defined]


class Plain(AbstractTask):
    """A task that is no dataclass, and reads its numbers once."""

    def __init__(self) -> None:
        self.bits = 4

    @cached_property
    def read(self) -> int:
        return 7

    source, recipe = "here", TASK.recipe  # type: ignore[assignment]
    network = batches = loss = score = None  # type: ignore[assignment]


class Derived(Plain):
    read = 7  # type: ignore[assignment]


def test_a_task_that_is_no_dataclass_is_sent_with_what_it_was_given() -> None:
    plain, derived = Plain(), Derived()
    assert plain.read == 7 and plain.__getstate__() == {"bits": 4}
    derived.__dict__["read"] = 8  # its own class keeps no such property
    assert derived.__getstate__() == {"bits": 4, "read": 8}

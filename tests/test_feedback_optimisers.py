"""Learned feedback in the user's optimisers: each matrix moves with its weight, once."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import altprop as ap
from altprop.testing.rules import TinyModel

Optimizer = torch.optim.Optimizer


def model_of() -> TinyModel:
    torch.manual_seed(0)
    return TinyModel(tied=False).double()


def step(model: nn.Module, *optimizers: Optimizer) -> None:
    model.zero_grad()
    tokens = torch.arange(12).view(3, 4) % 7
    logits = model(tokens)
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten().roll(1)).backward()
    for optimizer in optimizers:
        optimizer.step()


def groups_of(model: nn.Module, *optimizers: Optimizer) -> dict[str, list[tuple[int, int]]]:
    """Return, for each parameter's name, the optimisers and groups that hold it."""
    found: dict[str, list[tuple[int, int]]] = {n: [] for n, _ in model.named_parameters()}
    names = {id(p): n for n, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                found[names[id(parameter)]].append((i, j))
    return found


def weight_of(name: str) -> str:
    return name.removesuffix("B") + "weight"


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_optimiser_of_named_parameters_gets_the_names_too(prefix: str) -> None:
    model = model_of()
    wrapped = nn.ModuleDict({"module": model}) if prefix else model
    optimizer = torch.optim.AdamW(
        [
            {"params": [(n, p) for n, p in wrapped.named_parameters() if p.dim() > 1]},
            {"params": [(n, p) for n, p in wrapped.named_parameters() if p.dim() < 2], "lr": 0.1},
        ]
    )
    ap.convert(model, ap.KolenPollack())
    ap.add_feedback(optimizer, model)
    parameters = dict(wrapped.named_parameters())
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert parameters[name] is parameter, name


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_saved_optimiser_with_feedback_continues_to_the_bit(
    named: bool, options: dict[str, Any]
) -> None:
    def setup() -> tuple[TinyModel, Optimizer]:
        model = model_of()
        given = model.named_parameters() if named else model.parameters()
        optimizer = torch.optim.AdamW(given, lr=1e-2, weight_decay=0.5, **options)
        ap.convert(model, ap.KolenPollack())
        ap.add_feedback(optimizer, model)
        return model, optimizer

    model, optimizer = setup()
    step(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    step(model, optimizer)
    again, other = setup()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    step(again, other)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_feedback_moves_at_its_weights_own_rate_and_decay(options: dict[str, Any]) -> None:
    model = model_of()
    groups = [
        {"params": [p], "lr": 0.01 * (i + 1), "weight_decay": 0.1 * (i + 1)}
        for i, p in enumerate(model.parameters())
    ]
    optimizer = torch.optim.SGD(groups, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    step(model, optimizer)  # state and schedule exist already when the rule comes
    schedule.step()
    order = [id(group) for group in optimizer.param_groups]
    ap.convert(model, ap.KolenPollack(std=0.3))
    ap.add_feedback(optimizer, model)
    assert [id(group) for group in optimizer.param_groups] == order
    parameters = dict(model.named_parameters())
    gaps = {
        n: (parameters[weight_of(n)] - p).detach().clone()
        for n, p in parameters.items()
        if n.endswith(".B")
    }
    assert len(gaps) == 9
    shrink = {n: 1.0 for n in gaps}
    for _ in range(3):
        where = groups_of(model, optimizer)
        for name in gaps:  # same gradient, so only the decay of the gap's own group is left
            ((_, at),) = where[name]
            assert where[weight_of(name)] == [(0, at)]
            group = optimizer.param_groups[at]
            shrink[name] *= 1 - group["lr"] * group["weight_decay"]
        step(model, optimizer)
        schedule.step()
    for name, gap in gaps.items():
        left = (parameters[weight_of(name)] - parameters[name]).detach()
        assert torch.allclose(left, gap * shrink[name], atol=1e-13), name


def by_kind(model: nn.Module) -> list[Optimizer]:
    """Return two optimisers as for Muon and AdamW: one of the blocks' matrices, one of the rest."""
    matrices = [p for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW(rest, lr=0.1)]


def by_depth(model: nn.Module) -> list[Optimizer]:
    first = list(model.blocks[0].parameters())
    ids = {id(p) for p in first}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [torch.optim.SGD(rest, lr=0.1), torch.optim.AdamW(first, lr=0.1)]


@pytest.mark.parametrize("split", [by_kind, by_depth])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("rule", [ap.KolenPollack(), ap.WeightMirror(), ap.GrAPE()], ids=str)
def test_with_several_optimisers_each_feedback_is_in_its_weights_own_and_in_no_other(
    rule: ap.AbstractRule, order: tuple[int, int], split: Any
) -> None:
    model = model_of()
    optimizers = split(model)
    ap.convert(model, rule, output="head")
    for i in (*order, *order):  # the second time adds nothing
        ap.add_feedback(optimizers[i], model)
    where = groups_of(model, *optimizers)
    assert Counter(map(len, where.values())) == {1: len(where)}
    for name, found in where.items():
        if name.endswith(".B"):
            assert found == where[weight_of(name)], name
        elif name.endswith(".B_dfa"):
            block = name.removesuffix("B_dfa")
            assert found == where[block + "first.up.weight"], name
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, *optimizers)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_an_optimiser_of_some_weights_takes_their_feedback_and_leaves_the_rest() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    ap.convert(model, ap.KolenPollack())
    ap.add_feedback(optimizer, model)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(model.head.weight),
        id(model.head.B),
    ]


def test_an_optimiser_of_no_weight_that_has_feedback_is_refused_in_one_line() -> None:
    model = ap.convert(model_of(), ap.KolenPollack())
    optimizer = torch.optim.SGD(model.embed.parameters(), lr=0.1)
    with pytest.raises(
        ap.RuleError, match=r"holds no weight .*first.up.B, .* and 4 more"
    ) as caught:
        ap.add_feedback(optimizer, model)
    assert "\n" not in str(caught.value)
    optimizer.add_param_group({"params": ap.feedback_parameters(model)})  # as the line says
    ap.add_feedback(optimizer, model)
    assert len(optimizer.param_groups) == 2
    for weight in (m.weight for m in model.modules() if isinstance(m, nn.Linear)):
        weight.requires_grad_(False)
    ap.add_feedback(torch.optim.SGD(model.embed.parameters()), model)  # nothing learns any more

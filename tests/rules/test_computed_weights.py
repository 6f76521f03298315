"""Feedback of a weight that is computed, by hooks or a parametrisation, follows what makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import altprop as ap
from conversions import gradients, mlp

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
X = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)


def unrecorded(model: nn.Module) -> None:
    """Run a model as an evaluation does, after which hooks leave a weight that learns nothing."""
    with torch.no_grad():
        model(X)


HOOKS = [nn.utils.weight_norm, nn.utils.spectral_norm, pruned]
AFTER = [parametrizations.weight_norm, parametrizations.orthogonal]
CASES = [(how, first) for how in HOOKS for first in (True, False)] + [(how, False) for how in AFTER]


def computed(how: Callable[[nn.Module], Any], first: bool) -> nn.Module:
    """Return a converted chain whose first weight is computed, from before `convert` or later."""
    model = mlp()
    if not first:
        ap.convert(model, ap.KolenPollack(std=0.3))
    how(model[0])
    unrecorded(model)
    return ap.convert(model, ap.KolenPollack(std=0.3)) if first else model


def own(layer: nn.Module) -> list[Tensor]:
    return [p for p in layer.parameters() if p is not layer.B]


@pytest.mark.parametrize(("how", "first"), CASES)
def test_it_is_in_the_group_of_what_its_weight_is_computed_from_and_moves_with_it(
    how: Callable[[nn.Module], Any], first: bool
) -> None:
    model = computed(how, first)
    groups = [{"params": own(model[0]), "lr": 0.1}, {"params": own(model[2])}]
    optimizer = torch.optim.SGD(groups, lr=0.2, weight_decay=0.1)
    ap.add_feedback(optimizer, model)
    assert [id(p) for p in ap.feedback_parameters(model)] == [id(m.B) for m in model[::2]]
    for group, layer in zip(optimizer.param_groups, model[::2], strict=True):
        assert [p is layer.B for p in group["params"]] == [False] * len(own(layer)) + [True]
    before, got = model[0].B.detach().clone(), gradients(model, X)["0.B"]
    assert model[0].B.requires_grad and got.any()
    model[0].B.grad = got
    optimizer.step()
    assert torch.allclose(model[0].B, before - 0.1 * (got + 0.1 * before))


@pytest.mark.parametrize(("how", "first"), CASES)
def test_it_rests_while_all_that_its_weight_is_computed_from_is_frozen(
    how: Callable[[nn.Module], Any], first: bool
) -> None:
    model = computed(how, first)
    for parameter in own(model[0]):
        parameter.requires_grad_(False)
    assert [id(p) for p in ap.feedback_parameters(model)] == [id(model[2].B)]
    assert "0.B" not in gradients(model, X)
    for parameter in own(model[0]):
        parameter.requires_grad_()
    assert len(ap.feedback_parameters(model)) == 2 and "0.B" in gradients(model, X)


@pytest.mark.parametrize("frozen", [False, True])
def test_it_is_with_the_largest_part_that_learns(frozen: bool) -> None:
    model = computed(parametrizations.weight_norm, first=False)
    direction = max(own(model[0]), key=Tensor.numel).requires_grad_(not frozen)
    size = next(p for p in own(model[0]) if p is not direction and p.dim() == 2)
    optimizer = torch.optim.SGD([{"params": [size]}, {"params": [direction]}], lr=0.1)
    ap.add_feedback(optimizer, model)
    with_size, with_direction = (group["params"][1:] for group in optimizer.param_groups)
    home, other = (with_size, with_direction) if frozen else (with_direction, with_size)
    assert [id(p) for p in home] == [id(model[0].B)] and not other

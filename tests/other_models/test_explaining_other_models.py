"""What `explain` says of everybody's model, against what is measured of its backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import Case, Gradients, distance
from torch import Tensor, nn
from zoo import ALL, BROADCASTS, RULES, named

import altprop as ap


@ALL
@pytest.mark.parametrize("rule", RULES, ids=named)
def test_explain_tells_which_gradients_are_not_backprops(case: Case, rule: ap.AbstractRule) -> None:
    (model, got), exact = case.trained(rule), case.backprop
    rows = {row.parameter: row for row in ap.explain(model).rows}
    assert rows.keys() == exact.keys()
    sizes = {n: 0.0 if g is None else float(g.norm()) for n, g in exact.items()}
    for name in exact:
        frozen = not model.get_parameter(name).requires_grad
        assert (rows[name].signal == "none (frozen)") is frozen is (got[name] is None), name
        if sizes[name] > 1e-9 * max(sizes.values()):  # a key's bias has no gradient
            differs = distance({name: got[name]}, {name: exact[name]}) > 1e-9
            signal = rows[name].signal  # of what is tied, one of two may be exact
            assert signal != "exact" if differs else "exact" in signal, rows[name]


SENDING = [ap.Backprop(), ap.SignSymmetry(), *BROADCASTS[:4]]


@ALL
@pytest.mark.parametrize("rule", SENDING, ids=named)
def test_explain_tells_which_weights_are_still_transported(
    case: Case, rule: ap.AbstractRule
) -> None:
    """A weight changed between the two passes changes others' gradients if it is transported."""
    model, _ = case.trained(rule)
    rows = {row.parameter: row for row in ap.explain(model).rows}
    loss, learning = recorded(case, model)
    before = gradients(loss, learning)
    measured, told = set(), set()
    for name, p in model.named_parameters():
        if p.dim() > 1 and name in rows and "parametrizations" not in name:
            with other_sizes(p):
                after = gradients(loss, learning)
            others = {n: g for n, g in before.items() if n != name}
            if distance(after, others) > 1e-9:
                measured.add(name)
            if rows[name].transports:
                told.add(name)
    if getattr(rule, "granularity", "") == "block" or getattr(rule, "pass_through", "") == "pure":
        assert measured <= told  # where nothing below hears what a weight sends, nothing shows
    else:
        assert measured == told


def recorded(case: Case, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, and all that learns or could: parameters and the first activations."""
    batch, first = case.batch(), {}

    def keep(_: nn.Module, __: object, out: Tensor) -> None:
        first[f"first {len(first)}"] = out.requires_grad_()

    if case.entry is None:
        (x,) = batch.inputs.values()
        first["first"] = x.requires_grad_()
    else:
        hook = model.get_submodule(case.entry).register_forward_hook(keep)
    loss = case.loss(model, batch)
    if case.entry is not None:
        hook.remove()
    own = {id(p) for p in ap.feedback_parameters(model)}
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in own}
    return loss, {**first, **named}


@contextmanager
def other_sizes(weight: Tensor) -> Iterator[None]:
    """Change a weight, behind autograd's back, but for its signs and its norm."""
    kept = weight.detach().clone()
    some = kept != 0  # the embedding of a padding token is zero
    weight.data[some] = kept[some].sign() * kept[some].abs().flip(0)
    try:
        yield
    finally:
        weight.data.copy_(kept)


def gradients(loss: Tensor, tensors: dict[str, Tensor]) -> Gradients:
    found = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True, allow_unused=True)
    return dict(zip(tensors, found, strict=True))

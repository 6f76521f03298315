"""An audit judges what a step kept, of anybody's parameters, and leaves the caller's alone."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from steps import BATCH, LAST, audited, backprop, loss, model, verdicts
from torch import Tensor, nn

import altprop as ap
from altprop import Verdict

V = Verdict


def test_a_loss_of_the_model_it_holds_is_refused_and_leaves_no_gradient() -> None:
    held = model()
    with pytest.raises(ap.ConfigError, match="of the model that it is given, and not of one that"):
        ap.audit_step(backprop, held, lambda _, batch: loss(held, batch), BATCH)
    assert all(p.grad is None and p.requires_grad for p in held.parameters())


def test_a_model_that_cannot_be_copied_is_refused_in_a_line() -> None:
    old = model()
    old.doubled = 2 * old[0].weight  # as the old weight_norm keeps what it computes
    with pytest.raises(ap.ConfigError, match="Sequential cannot be copied .*parametrizations"):
        audited(backprop, old)


def dropped(m: nn.Module, batch: Any, how: str) -> None:
    """Make every gradient, drop the hidden layers' before they serve, and train the head."""
    optimiser = torch.optim.SGD(m.parameters(), 0.1)
    backprop(m, batch)
    for layer in list(m.children())[:-1]:
        layer.zero_grad(set_to_none=how != "zero")
    optimiser.step()
    if how == "hebb":
        with torch.no_grad():
            m[0].weight += 0.01 * torch.tanh(m[0](batch[0])).T @ batch[0] / 64  # type: ignore[index,operator]


@pytest.mark.parametrize("how", ["none", "zero", "hebb"])
def test_a_gradient_that_was_thrown_away_is_none_of_the_steps(how: str) -> None:
    found = audited(partial(dropped, how=how))
    assert found[LAST].verdict is V.EXACT and found["2.weight"].verdict is V.UNTOUCHED
    first = found["0.weight"]
    assert first.by_change == (how == "hebb")
    assert (first.verdict is V.UNTOUCHED) == (how != "hebb") and first.verdict is not V.EXACT
    # nor is one that was only looked at
    looked = audited(lambda m, batch: (backprop(m, batch), m.zero_grad()))
    assert {row.verdict for row in looked.values()} == {V.UNTOUCHED}


def test_hooks_of_the_parameters_are_a_part_of_the_step() -> None:
    m = model()
    m[0].weight.register_hook(torch.randn_like)
    m[2].weight.register_hook(lambda g: 3 * g)
    m[4].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", -p.grad))
    found = audited(backprop, m)
    assert verdicts(found) == [V.UNCORRELATED, V.SCALED, V.BIASED]
    assert found["4.bias"].verdict is V.EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backprop_in_half_precision_is_exact(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True) for _ in range(4)]
    deep = nn.Sequential(nn.Embedding(30, 32), *layers, nn.Linear(32, 30)).to(dtype)
    batch = torch.randint(30, (4, 8)), torch.randint(30, (4, 8))

    def of_tokens(m: nn.Module, batch: Any) -> Tensor:
        return nnf.cross_entropy(m(batch[0]).float().flatten(0, 1), batch[1].flatten())

    found = ap.audit_step(lambda m, b: of_tokens(m, b).backward(), deep, of_tokens, batch)
    assert {row.verdict for row in found.values()} == {V.EXACT}


def test_both_parts_of_a_complex_gradient_are_judged() -> None:
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(40, 10, dtype=torch.cfloat))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.cfloat) @ self.w).abs()

    def conjugated(m: nn.Module, batch: Any) -> None:
        backprop(m, batch)
        m.w.grad = m.w.grad.conj()  # type: ignore[union-attr]

    assert audited(backprop, Wave())["w"].verdict is V.EXACT
    assert audited(conjugated, Wave())["w"].verdict is not V.EXACT


class Dropping(nn.Module):
    """Leaves out layers that it draws by Python's numbers, and units by numpy's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(40, 40) for _ in range(8)])
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if random.random() < 0.5:
                x = torch.tanh(layer(x)) * torch.from_numpy(np.random.rand(40)).float()
        return self.head(x)


def test_what_is_drawn_by_others_is_drawn_alike_in_both_runs() -> None:
    seen = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    found = audited(backprop, Dropping())
    assert {row.verdict for row in found.values()} <= {V.EXACT, V.UNTOUCHED}
    assert seen == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index,union-attr]


def test_what_an_optimiser_was_given_is_the_steps_though_it_moved_nothing() -> None:
    def warming(m: nn.Module, batch: Any) -> None:
        optimiser = torch.optim.AdamW(m.parameters(), lr=0.0)  # a warm-up begins there
        backprop(m, batch)
        optimiser.step()
        optimiser.zero_grad()

    assert {row.verdict for row in audited(warming).values()} == {V.EXACT}


def test_a_hook_of_another_optimiser_leaves_the_callers_model_alone() -> None:
    m = model()
    optimiser = torch.optim.SGD(m.parameters(), lr=0.1)
    backprop(m, BATCH)
    before = [(p.detach().clone(), p.grad, p.grad.clone()) for p in m.parameters()]  # type: ignore[union-attr]

    def apply(_: Tensor) -> None:
        optimiser.step()
        optimiser.zero_grad()

    handle = m[0].weight.register_post_accumulate_grad_hook(apply)
    with pytest.raises(ap.ConfigError, match="or a hook of the model's parameters, trained"):
        audited(backprop, m)
    for p, (weight, gradient, numbers) in zip(m.parameters(), before, strict=True):
        assert torch.equal(p, weight) and p.grad is gradient and torch.equal(gradient, numbers)  # type: ignore[arg-type]
    handle.remove()
    of = {m[0].weight: optimiser}  # as torch's page of optimisers in the backward writes it
    m[0].weight.register_post_accumulate_grad_hook(lambda p: of[p].step())
    with pytest.raises(ap.ConfigError, match=r"a hook of 0.weight fails on the copy .*KeyError"):
        audited(backprop, m)


def test_an_update_by_a_hook_is_judged_by_the_gradient_it_had() -> None:
    m = model()

    def apply(p: Tensor) -> None:
        with torch.no_grad():
            p.sub_(0.1 * p.grad)  # type: ignore[operator]
        p.grad = None

    for p in m.parameters():
        p.register_post_accumulate_grad_hook(apply)
    found = audited(backprop, m)
    assert {(row.verdict, row.by_change) for row in found.values()} == {(V.EXACT, False)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_change_that_rounding_has_eaten_tells_nothing(dtype: torch.dtype) -> None:
    def wandering(m: nn.Module, batch: Any) -> None:
        with torch.no_grad():
            for p in m.parameters():
                p.add_(1e-4 * torch.randn_like(p))

    half = BATCH[0].to(dtype), BATCH[1]
    found = ap.audit_step(wandering, model().to(dtype), loss, half)
    wanted = V.ROUNDED if dtype is torch.bfloat16 else V.UNCORRELATED
    assert {found[n].verdict for n in ("0.weight", "2.weight")} == {wanted}

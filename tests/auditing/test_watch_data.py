"""Data are no weight, whatever parameters are added or joined to them or looked up by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import altprop as ap
from altprop import Read

T, C, V = 8, 8, 8  # as many tokens as rows of the tables, and as wide as a state
Begin = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    """Two maps and a head, which begin by what a test says."""

    def __init__(self, begin: Begin) -> None:
        super().__init__()
        self.begin = begin
        self.place, self.gain = nn.Parameter(torch.randn(T, C)), nn.Parameter(torch.randn(T, C))
        self.token = nn.Parameter(torch.randn(1, 1, C))
        self.named, self.bag = nn.Embedding(V, C), nn.EmbeddingBag(V, C)
        self.cell = nn.GRUCell(C, C)
        self.first, self.second, self.head = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.begin(self, x)
        return self.head(h + self.second(torch.relu(self.first(h))))


def written(m: Any, x: Tensor) -> Tensor:
    h = x.new_empty(len(x), T + 1, C)
    h[:, :1] = m.token
    h[:, 1:] = x
    return h


def repeated(m: Any, x: Tensor) -> Tensor:
    h = m.place.repeat(len(x), 1, 1)
    h += x
    return h


def in_place(m: Any, x: Tensor) -> Tensor:
    h = x.clone()
    h += m.place
    h *= m.gain
    return h


def joined_anew(m: Any, x: Tensor) -> Tensor:
    def run(h: Tensor) -> Tensor:
        h = torch.cat([m.token.expand(len(h), -1, -1), h], 1)
        return h + m.second(torch.tanh(m.first(h)))

    return checkpoint(run, m.first(x), use_reentrant=False)


BEGINS: dict[str, tuple[Begin, str]] = {
    "added": (lambda m, x: x + m.place, "numbers"),
    "in place": (in_place, "numbers"),
    "repeated": (repeated, "numbers"),
    "written beside": (written, "numbers"),
    "joined": (lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], 1), "numbers"),
    "joined in a checkpoint": (joined_anew, "numbers"),
    "places looked up": (lambda m, x: x + m.named(torch.arange(T)), "numbers"),
    "tokens looked up": (lambda m, x: m.named(x) + m.place, "tokens"),
    "bags": (lambda m, x: m.bag(x), "tokens"),
    "chosen": (lambda m, x: torch.where(x[..., None] > 2, m.place[0], m.place[1]), "tokens"),
    "counted": (lambda m, x: x[..., None] * m.place, "tokens"),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", BEGINS)
def test_feedback_alignment_reads_no_weight_however_the_data_come_in(name: str, batch: int) -> None:
    begin, kind = BEGINS[name]
    torch.manual_seed(0)
    x = torch.randn(batch, T, C) if kind == "numbers" else torch.randint(V, (batch, T))
    model = Model(begin)
    for rule, wanted in ((ap.Backprop(), Read.MATRIX), (ap.FeedbackAlignment(), Read.NOT)):
        ap.convert(model, {"*": rule})
        with ap.watch(model) as seen:
            model(x).square().sum().backward()
        assert seen["second.weight"].how is wanted and seen["head.weight"].how is wanted
        elementwise = {"place", "gain"} if name in ("in place", "counted") else set()
        others = {n: r.how for n, r in seen.items() if n not in elementwise | HEARD}
        assert wanted is Read.MATRIX or set(others.values()) == {Read.NOT}
        ap.revert(model)


HEARD = {"cell.weight_ih", "cell.weight_hh"}


def test_a_state_that_begins_at_zero_is_no_weight() -> None:
    """As many samples as the state is wide: the first product has the weight's own shape."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(C, C)
        for i in range(3):
            h = m.cell(x[:, i], h)
        return h

    model = ap.convert(Model(run), {"*": ap.FeedbackAlignment()})
    with ap.watch(model) as seen:
        model(torch.randn(C, T, C)).square().sum().backward()
    assert {r.how for n, r in seen.items() if n not in HEARD} == {Read.NOT}


@pytest.mark.parametrize("rule", [ap.Backprop(), ap.FeedbackAlignment()], ids=repr)
def test_a_transform_of_functions_shows_the_same(rule: ap.AbstractRule) -> None:
    model = ap.convert(Model(BEGINS["joined"][0]), {"*": rule})
    given, x = dict(model.named_parameters()), torch.randn(3, T, C)

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, p, (x[None],)).square().sum()

    with ap.watch(model) as seen:
        vmap(grad(loss), in_dims=(None, 0))(given, x)
    carried = {n for n, r in seen.items() if r.how is Read.MATRIX}
    maps = {"first.weight", "second.weight", "head.weight"}
    assert carried == (maps if isinstance(rule, ap.Backprop) else set())


def test_data_in_an_object_and_sparse_data_are_data() -> None:
    class Batch:
        def __init__(self) -> None:
            self.x = torch.randn(2, T, C)

    beside = Model(lambda m, b: torch.cat([m.token.expand(2, -1, -1), b.x], 1))
    sparse = Model(lambda m, x: torch.sparse.mm(x, m.place))
    model: Any
    for model, given in ((beside, Batch()), (sparse, torch.eye(T).to_sparse())):
        ap.convert(model, {"*": ap.FeedbackAlignment()})
        with ap.watch(model) as seen:
            model(given).square().sum().backward()
        assert {r.how for n, r in seen.items() if n != "place"} == {Read.NOT}

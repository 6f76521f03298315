"""What each broadcast rule means, written from the papers and compared on widths that all differ.

The expected gradients are formulas of plain tensors, or autograd on the same formulas; nothing here
asks a rule for its cotangent or for its feedback's gradient.
Shapes: N samples, T tokens; a feedback `B` is (features, k), an error `e` is (N, T, k).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from uneven import (
    Exact,
    K,
    N,
    Stack,
    T,
    Uneven,
    close,
    feedback_of,
    inputs,
    loss_of,
    outer,
    trained,
)

import altprop as ap


@pytest.mark.parametrize("scale", [1.0, 7.0])
@pytest.mark.parametrize("feedback", ["shared", "independent"])
@pytest.mark.parametrize("error", ["logits", "head_input"])
@pytest.mark.parametrize("pass_through", ["hybrid", "pure"])
def test_a_map_learns_by_the_projected_error_and_sends_what_it_says(
    pass_through: str, error: str, feedback: str, scale: float
) -> None:
    model = Uneven()
    exact = Exact(model, scale)
    e = exact.e if error == "logits" else exact.above[1]
    rule = ap.DirectFeedback("matmul", error, feedback, pass_through, std=0.5)
    ap.convert(model, rule, output="head")
    to_x = trained(model, scale)
    B = feedback_of(model, feedback == "shared")
    assert [tuple(b.shape) for b in B] == [(7, e.shape[-1]), (6, e.shape[-1])]
    for block, b, x in zip(model.blocks, B, exact.h, strict=False):
        signal = torch.einsum("ntk,fk->ntf", e, b)  # no derivative of any activation
        close(block[0].weight.grad, outer(signal, x))
        close(block[0].bias.grad, signal.sum((0, 1)))
    close(model.head.weight.grad, exact.parameters[-2])
    close(model.head.bias.grad, exact.parameters[-1])
    close(to_x, exact.to_x if pass_through == "hybrid" else torch.zeros_like(exact.to_x))


@pytest.mark.parametrize("feedback", ["shared", "independent"])
@pytest.mark.parametrize("error", ["logits", "head_input"])
def test_a_block_hears_the_projected_error_and_nothing_from_above(
    error: str, feedback: str
) -> None:
    model = Uneven()
    exact = Exact(model, 3.0)
    e = exact.e if error == "logits" else exact.above[1]
    ap.convert(model, ap.DirectFeedback("block", error, feedback, std=0.5), output="head")
    to_x = trained(model, 3.0)
    B = feedback_of(model, feedback == "shared")
    for i, (block, b) in enumerate(zip(model.blocks, B, strict=True)):
        signal = torch.einsum("ntk,fk->ntf", e, b) * (1 - exact.h[i + 1] ** 2)
        close(block[0].weight.grad, outer(signal, exact.h[i]))
        close(block[0].bias.grad, signal.sum((0, 1)))
        if i == 0:
            close(to_x, signal @ block[0].weight.detach())
    close(model.head.weight.grad, exact.parameters[-2])


@pytest.mark.parametrize("feedback", ["shared", "independent"])
@pytest.mark.parametrize("error", ["logits", "head_input"])
def test_a_sublayer_hears_the_error_at_its_sum_where_the_residual_is_cut_too(
    error: str, feedback: str
) -> None:
    model = Stack()
    x, targets = inputs()
    parts = [part for block in model.blocks for part in (block.first, block.second)]
    h = [x]
    for part in parts:
        h.append(part(h[-1]))
    logits = model.head(h[-1])
    above = torch.autograd.grad(
        loss_of(logits, targets), logits if error == "logits" else h[-1], retain_graph=True
    )[0]
    leaves = [s.detach().requires_grad_() for s in h[:-1]]
    ap.convert(model, ap.DirectFeedback("sublayer", error, feedback, std=0.5), output="head")
    to_x = trained(model)
    if feedback == "shared":
        B = [model.B_dfa_shared] * 4
    else:
        B = [part.B_dfa for part in parts]
        assert not torch.equal(B[0], B[1])
    for i, part in enumerate(parts):
        U, D = (w.detach().clone().requires_grad_() for w in (part.up.weight, part.down.weight))
        out = leaves[i] + torch.tanh(leaves[i] @ U.T) @ D.T
        (out * torch.einsum("ntk,fk->ntf", above, B[i])).sum().backward()
        close(part.up.weight.grad, U.grad)
        close(part.down.weight.grad, D.grad)
    close(to_x, leaves[0].grad)


class Pooled(nn.Module):
    """Two maps of one width, before and after the tokens are pooled: (N, T, 6) and (N, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(5, 6, dtype=torch.float64)
        self.high = nn.Linear(6, 6, dtype=torch.float64)
        self.head = nn.Linear(6, K, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.high(torch.tanh(self.low(x)).mean(1))))


@pytest.mark.parametrize("feedback", ["shared", "independent"])
def test_taps_of_one_width_and_other_leading_axes_each_get_the_error_in_their_shape(
    feedback: str,
) -> None:
    model = Pooled()
    ap.convert(model, ap.DirectFeedback(feedback=feedback, std=0.5), output="head")
    x, _ = inputs()
    logits = model(x)
    logits.retain_grad()
    logits.square().sum().backward()
    shared = feedback == "shared"
    low = model.B_dfa_shared if shared else model.low.B_dfa
    high = model.B_dfa_shared if shared else model.high.B_dfa
    e = logits.grad
    signal = (e @ low.T)[:, None].expand(N, T, 6)  # every token hears its sample's error
    close(model.low.weight.grad, outer(signal, x))
    close(model.low.bias.grad, signal.sum((0, 1)))
    pooled = torch.tanh(F.linear(x, model.low.weight, model.low.bias)).mean(1)
    close(model.high.weight.grad, (e @ high.T).T @ pooled)
    close(model.high.bias.grad, (e @ high.T).sum(0))


class Regrouped(Uneven):
    """As many tokens at the head, in one axis."""

    def above(self, h: Tensor) -> Tensor:
        return self.head(self.blocks[1](h).flatten(0, 1))


class Fewer(Uneven):
    def above(self, h: Tensor) -> Tensor:
        return self.head(self.blocks[1](h)[:2])


def test_an_error_in_another_grouping_finds_its_own_and_one_of_other_samples_is_refused() -> None:
    model = ap.convert(Regrouped(), ap.DirectFeedback(feedback="independent"), output="head")
    x, targets = inputs()
    logits = model(x)
    logits.retain_grad()
    F.cross_entropy(logits, targets.flatten()).backward()
    layer, e = model.blocks[0][0], logits.grad.unflatten(0, (N, T))
    close(layer.weight.grad, outer(e @ layer.B_dfa.T, x))
    model = ap.convert(Fewer(), ap.DirectFeedback(), output="head")
    with pytest.raises(ap.RuleError, match=r"shape \(2, 2, 4\) does not fit a tap of shape \(3, 2"):
        model(x)


@dataclass(frozen=True)
class Plainest(ap.AbstractBroadcast):
    """What the base class alone makes of a broadcast."""

    def plan(self, scope: Any) -> None:
        scope.tap(scope.maps())

    def draw(self, site: Any, generator: torch.Generator) -> Tensor:
        return torch.randn(site.rows, site.columns, generator=generator)


def test_a_rule_that_says_no_more_has_its_own_feedbacks_and_sends_the_exact_cotangent() -> None:
    model = Uneven()
    exact = Exact(model)
    ap.convert(model, Plainest(), output="head")
    for _ in range(3):
        to_x = trained(model)
        for block, x in zip(model.blocks, exact.h, strict=False):
            signal = torch.einsum("ntk,fk->ntf", exact.e, block[0].B_dfa)
            close(block[0].weight.grad, outer(signal, x))
        close(to_x, exact.to_x)
    assert not ap.feedback_parameters(model)


class Halves(nn.Module):
    """A gated block: twelve features inside, of which six come out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lift = nn.Linear(width, 9, dtype=torch.float64)
        self.gates = nn.Linear(9, 12, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.gates(torch.tanh(self.lift(x))).chunk(2, -1)
        return a * torch.sigmoid(b)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Halves(5), Halves(6)])
        self.head = nn.Linear(6, K, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_blocks_own_error_is_projected_to_every_map_inside_it() -> None:
    model = Gated()
    x, targets = inputs()
    h = [x]
    for block in model.blocks:
        h.append(block(h[-1]))
    logits = model.head(h[-1])
    first, second, to_x, head = torch.autograd.grad(
        loss_of(logits, targets), [h[1], h[2], x, model.head.weight]
    )
    lifted = [torch.tanh(b.lift(s)).detach() for b, s in zip(model.blocks, h, strict=False)]
    ap.convert(model, ap.BlockDirectFeedback(features=6, std=0.5), output="head")
    got = trained(model)
    for block, e, below, inside in zip(model.blocks, (first, second), h, lifted, strict=False):
        for layer, into in ((block.lift, below), (block.gates, inside)):
            assert layer.B_dfa_block.shape == (layer.out_features, 6)
            signal = torch.einsum("ntk,fk->ntf", e, layer.B_dfa_block)
            close(layer.weight.grad, outer(signal, into))
            close(layer.bias.grad, signal.sum((0, 1)))
    close(got, to_x)  # between blocks the exact cotangent travels
    close(model.head.weight.grad, head)


@pytest.mark.parametrize(
    "rule",
    [
        ap.DirectFeedback("block", features=6, feedback="independent", std=0.5),
        ap.GrAPE(features=6, normalize="none", std=0.5),
    ],
    ids=lambda r: type(r).__name__,
)
def test_the_width_of_a_block_that_is_not_its_last_maps_is_what_it_is_told(
    rule: ap.AbstractBroadcast,
) -> None:
    model = Gated()
    x, targets = inputs()
    logits = model(x)
    (e,) = torch.autograd.grad(loss_of(logits, targets), logits)
    ap.convert(model, rule, output="head")
    trained(model)
    block = model.blocks[0]
    assert block.B_dfa.shape == (6, K)
    twin = Halves(5)
    twin.load_state_dict({k: v for k, v in block.state_dict().items() if "B_dfa" not in k})
    (twin(x.detach()) * (e @ block.B_dfa.T)).sum().backward()
    for got, want in zip((block.lift, block.gates), (twin.lift, twin.gates), strict=True):
        close(got.weight.grad, want.weight.grad)


@pytest.mark.parametrize("granularity", ["matmul", "sublayer", "block"])
def test_a_calibration_is_backprop_for_every_parameter_and_for_the_input(granularity: str) -> None:
    model: nn.Module = Stack() if granularity == "sublayer" else Uneven()
    to_x = trained(model)
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    rule = ap.DirectFeedback(granularity, pass_through="pure", calibrate_every=3)
    ap.convert(model, rule, output="head")
    exact = []
    for _ in range(7):
        with torch.no_grad():
            model(inputs()[0])  # only recorded passes are counted
        got = trained(model)
        pairs = [(got, to_x), *zip([p.grad for p in model.parameters()], wanted, strict=True)]
        exact.append(all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in pairs))
    assert exact == [False, False, True, False, False, True, False]

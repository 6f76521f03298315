"""What would get past an equilibrium's adjoint is refused, and who shares a sample is found out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from conversions import assert_equal, gradients

X = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Between = Callable[[Tensor], Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.map = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, h: Tensor, rest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rest = h if rest is None else h + rest  # as Mamba's blocks carry their residual
        return torch.tanh(self.map(self.norm(rest))), rest


class Model(nn.Module):
    """Blocks that hand on, read or look at what stands beside the state."""

    def __init__(self, use: str = "", between: Between = lambda h: h) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.use, self.between = use, between
        self.begin, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h, seen = self.begin(x), []
        rest = None
        for i, block in enumerate(self.blocks):
            h, beside = block(self.between(h) if i else h, rest)
            rest = beside if self.use == "handed on" else None
            seen.append(beside.detach() if self.use == "looked at" else beside)
        out = self.head(h)
        if self.use == "read":
            return out + seen[1].square().mean()
        return out + seen[0].square().mean() + (seen[1].mean() if self.use == "looked at" else 0)


@pytest.mark.parametrize("use", ["handed on", "read"])
def test_a_gradient_by_another_output_of_a_block_is_refused_where_levels_would_lose_it(
    use: str,
) -> None:
    model = ap.convert(Model(use), {"blocks": ap.AEP()})
    with pytest.raises(ap.RuleError, match="another output of blocks.[12] than its first"):
        model(X).sum().backward()


def test_the_first_blocks_further_outputs_and_what_is_only_looked_at_keep_their_gradients() -> None:
    model = Model("looked at")
    wanted = gradients(model, X)
    assert_equal(gradients(ap.convert(model, {"blocks": ap.AEP()}), X), wanted, 1e-7)


class Turned(torch.autograd.Function):
    """The same numbers, and the opposite gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # type: ignore[override]
        return -cotangent


@pytest.mark.parametrize(
    "between", [Tensor.detach, Turned.apply, lambda h: h * torch.ones_like(h)],
    ids="detached turned multiplied".split(),
)  # fmt: skip
def test_what_changes_the_gradient_between_blocks_and_not_the_numbers_is_refused(
    between: Between,
) -> None:
    model = ap.convert(Model("looked at", between), {"blocks": ap.AEP()})
    with pytest.raises(ap.RuleError, match=r"blocks.1 was not given the output of blocks.0"):
        model(X)


@pytest.mark.parametrize(
    "between", [Tensor.clone, lambda h: h.view_as(h)[:, :], lambda h: h.flatten(1).mT.mT],
    ids="cloned viewed turned".split(),
)  # fmt: skip
def test_what_changes_neither_may_stand_between_blocks(between: Between) -> None:
    wanted = gradients(Model("looked at"), X)
    model = ap.convert(Model("looked at", between), {"blocks": ap.AEP()})
    assert_equal(gradients(model, X), wanted, 1e-7)


def test_a_rule_that_is_in_a_force_or_block_already_is_refused() -> None:
    for ruled in (
        ap.convert(nn.Linear(5, 5), ap.FeedbackAlignment()),
        ap.LocalLinear(5, 5, method="fa"),
    ):
        force = ap.from_function(lambda z, x, f=ruled: x - z + torch.tanh(f(z)), ruled)
        with pytest.raises(ap.RuleError, match="has a learning rule, which would falsify"):
            ap.Equilibrium(force)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.Sequential(*[ap.LocalLinear(5, 5, method="fa") for _ in range(2)])
    )
    with pytest.raises(ap.RuleError, match=r"converted by itself|would falsify"):
        ap.convert(model, {"1": ap.AEP()})(X.float())


def test_forward_mode_through_an_equilibrium_is_refused_and_not_zero() -> None:
    torch.manual_seed(0)
    inner = nn.Linear(4, 4).double()
    dynamics = ap.from_function(lambda z, x: x - z + torch.tanh(inner(z)) / 2, inner)
    for solver in (ap.FixedPoint(tol=1e-10, max_steps=200), ap.Euler(step=0.5, max_steps=60)):
        block = ap.Equilibrium(dynamics, solver, ap.Implicit(), on_failure="accept")
        with torch.no_grad(), pytest.raises(ap.RuleError, match="is its forward-mode derivative"):
            torch.func.jvp(block, (X,), (torch.ones_like(X),))
        outer = nn.Linear(4, 4).double()
        around = ap.from_function(
            lambda z, x, f=outer, b=block: x - z + torch.tanh(f(b(z))) / 4, outer, block
        )
        with pytest.raises(ap.RuleError, match="is its forward-mode derivative"):
            ap.Equilibrium(around, ap.FixedPoint(tol=1e-8), ap.AEP(start="zero"))(
                X
            ).sum().backward()


class Attending(nn.Module):
    """Attention among the rows of one window, within the documents that are packed in it."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (m(h) for m in self.maps[:3])
        weights = (2 * q @ k.mT).masked_fill(~mask, -1e9).softmax(-1)
        return h + self.maps[3](torch.tanh(weights @ v))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.begin, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(Attending() for _ in range(3))
        self.double()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.begin(x)
        for block in self.blocks:
            h = block(h, mask)
        return self.head(h)


@pytest.mark.parametrize("lengths", [[5, 4, 3], [1, 5, 3, 1, 1, 1], [1] * 5 + [2] + [1] * 5])
def test_rows_that_see_one_another_are_one_sample_wherever_they_stand(lengths: list[int]) -> None:
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document) & torch.ones(12, 12, dtype=torch.bool).tril()
    x = torch.randn(12, 4, dtype=torch.float64)

    def grads(model: nn.Module, mask: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        model(x, mask)[:9].square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model = Packed()
    alone = torch.eye(12, dtype=torch.bool)
    wanted = [grads(model, mask), grads(model, alone), grads(model, mask)]
    ap.convert(model, {"blocks": ap.AEP()})
    for found, want in zip([grads(model, m) for m in (mask, alone, mask)], wanted, strict=True):
        assert_equal(found, want, 1e-6)
    (stack,) = (block for _, block in ap.equilibria(model))
    assert len(stack.certificate.free_residual) == 1


def test_a_frozen_attentions_learned_mask_gets_the_rules_gradient() -> None:
    torch.manual_seed(0)
    attention = ap.convert(nn.MultiheadAttention(6, 2, batch_first=True), ap.FeedbackAlignment())
    for p in attention.parameters():
        p.requires_grad_(False)
    h, found = torch.randn(3, 5, 6), []
    for learning in (False, True):
        mask = torch.randn(torch.Size([5, 5]), generator=torch.Generator().manual_seed(1))
        query = h.clone().requires_grad_(learning)
        out, _ = attention(query, h, h, attn_mask=mask.requires_grad_())
        out.square().sum().backward()
        assert mask.grad is not None
        found.append(mask.grad)
    torch.testing.assert_close(found[0], found[1])

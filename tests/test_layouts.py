"""An error meets its own sample, whichever axes count samples and tokens, squares included.

Oracles: gradients written by hand in float64 from the model's own tensors.
Shapes: N samples, T tokens, C features, V outputs; `x` is (N, T, C) wherever it is not said.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from altprop.layouts import fits, spread_error
from layout_models import BOTH, SHAPES, C, N, Net, Run, V, check_blocks, convert, draw, errors


@SHAPES
@BOTH
@pytest.mark.parametrize(
    ("reads", "place"),
    [
        (lambda h: h, lambda e: e),
        (lambda h: h.mean(1), lambda e: e[:, None]),
        (lambda h: h.mean(1, keepdim=True), lambda e: e),
        (lambda h: h[:, 1], lambda e: e[:, None]),
        (lambda h: h.flatten(0, 1), lambda e: e.view(N, -1, V)),
        (lambda h: h.transpose(0, 1), lambda e: e.transpose(0, 1)),
        (lambda h: h.transpose(0, 1).flatten(0, 1), lambda e: e.view(-1, N, V).transpose(0, 1)),
    ],
    ids=["tokens", "mean", "kept mean", "one token", "joined", "turned", "turned and joined"],
)
def test_an_error_finds_its_sample_however_the_head_sees_it(
    reads: Run, place: Run, granularity: str, T: int
) -> None:
    check_blocks(convert(Net(reads), granularity), draw(N, T, C), place)


@SHAPES
@BOTH
@pytest.mark.parametrize(
    ("reads", "place"),
    [
        (lambda h: h, lambda e: e),
        (lambda h: h.mean(0), lambda e: e[None]),
        (lambda h: h[0], lambda e: e[None]),
        (lambda h: h.mean(0, keepdim=True), lambda e: e),
        (lambda h: h.flatten(0, 1), lambda e: e.view(-1, N, V)),
        (lambda h: h.transpose(0, 1), lambda e: e.transpose(0, 1)),
    ],
    ids=["tokens", "mean", "one token", "kept mean", "joined", "turned"],
)
def test_an_error_finds_its_sample_where_the_sequence_comes_first(
    reads: Run, place: Run, granularity: str, T: int
) -> None:
    check_blocks(convert(Net(reads), granularity), draw(T, N, C), place)


@SHAPES
def test_blocks_of_one_model_may_have_different_layouts(T: int) -> None:
    model = convert(Net(between=lambda x: x.transpose(0, 1)))
    x = draw(N, T, C)
    e = errors(model, x)  # (N, T, V) again after two turns
    for block, signal in zip(model.blocks, (e.transpose(0, 1), e), strict=True):
        x = x.transpose(0, 1)
        with torch.no_grad():
            h = block(x)
        want = ((signal @ block.B_dfa.T) * (1 - h**2)).flatten(0, 1).T @ x.flatten(0, 1)
        assert torch.allclose(block[0].weight.grad, want, rtol=1e-10)
        x = h


@SHAPES
def test_maps_that_see_joined_tokens_hear_the_error_of_theirs(T: int) -> None:
    for turned in (False, True):
        order = (lambda h: h.transpose(0, 1)) if turned else (lambda h: h)
        model = convert(
            Net(
                reads=lambda h, o=order: o(h.view(*o(torch.empty(N, T)).shape, C)),
                between=lambda x, o=order: o(x).flatten(0, 1) if x.dim() == 3 else x,
            ),
            "matmul",
        )
        check_blocks(model, draw(N, T, C), lambda e, o=order: o(e).flatten(0, 1))


@SHAPES
def test_a_block_that_turns_its_input_projects_its_own_error_rightly(T: int) -> None:
    class Turning(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    model = Net()
    model.blocks[0] = Turning(*model.blocks[0])
    ap.convert(model, {"blocks.0": ap.BlockDirectFeedback(std=0.5)}, output="head")
    x = draw(N, T, C)
    e = errors(model, x)
    with torch.no_grad():
        h = model.blocks[0](x)
        above = (e @ model.head.weight) * (1 - model.blocks[1](h) ** 2) @ model.blocks[1][0].weight
    linear = model.blocks[0][0]
    want = torch.einsum("nto,nti->oi", above @ linear.B_dfa_block.T, x)
    assert torch.allclose(linear.weight.grad, want, rtol=1e-10)


class Attending(nn.Module):
    """Attention over what is given (and over a memory), tapped at its projections; a head."""

    def __init__(self, memory: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(C, 2, dtype=torch.float64, **options)
        self.head = nn.Linear(C, V, dtype=torch.float64)
        self.memory = memory

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.memory is None else self.memory
        self.mixed = self.attn(x, other, other, need_weights=False)[0]
        return self.head(x + self.mixed)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(3, 3, C), (3, 5, C), (5, C)], ids=str)
@pytest.mark.parametrize("kind", ["self", "memory", "kdim"])
@pytest.mark.parametrize("pass_through", ["hybrid", "pure"])
def test_attention_projections_pair_an_error_with_its_own_token(
    batch_first: bool, shape: tuple[int, ...], kind: str, pass_through: str
) -> None:
    options = {"kdim": 6, "vdim": 6} if kind == "kdim" else {}
    memory = None if kind == "self" else draw(*shape[:-1], 6 if kind == "kdim" else C)
    model = Attending(memory, batch_first=batch_first, **options)
    rule = ap.DirectFeedback(feedback="independent", pass_through=pass_through, std=0.5)
    ap.convert(model, rule, output="head")
    inputs = {}
    hook = model.attn.out_proj.register_forward_pre_hook(lambda m, a: inputs.update(out=a[0]))
    x = draw(*shape)
    e = errors(model, x)
    hook.remove()
    other, attn = (x if memory is None else memory), model.attn

    def outer(B: Tensor, source: Tensor) -> Tensor:
        return (e @ B.T).flatten(0, -2).T @ source.flatten(0, -2)

    if kind == "kdim":
        for name, source in (("q_proj", x), ("k_proj", other), ("v_proj", other)):
            want = outer(getattr(attn, f"B_dfa_{name}"), source)
            assert torch.allclose(getattr(attn, f"{name}_weight").grad, want, rtol=1e-10)
    else:
        parts = zip(attn.B_dfa_in_proj.chunk(3), (x, other, other), strict=True)
        want = torch.cat([outer(B, source) for B, source in parts])
        assert torch.allclose(attn.in_proj_weight.grad, want, rtol=1e-10)
    inside = inputs["out"].detach()  # (L, N, E), in torch's own layout
    inside = inside.squeeze(1) if len(shape) == 2 else inside
    inside = inside.transpose(0, 1) if batch_first and len(shape) == 3 else inside
    want = outer(attn.out_proj.B_dfa, inside)
    assert torch.allclose(attn.out_proj.weight.grad, want, rtol=1e-10)


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_memory_of_another_length_is_refused_with_the_pattern_to_write(batch_first: bool) -> None:
    axes = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    model = Attending(axes(draw(N, 7, C)), batch_first=batch_first)
    rules = {"*": ap.DirectFeedback()}
    ap.convert(model, rules, output="head")
    x = axes(draw(N, 4, C))
    with pytest.raises(ap.RuleError, match=r"'attn.in_proj': Backprop\(\)") as raised:
        model(x)
    assert "\n" not in str(raised.value)
    ap.revert(model)
    ap.convert(model, {"attn.in_proj": ap.Backprop(), **rules}, output="head")
    errors(model, x)
    assert model.attn.out_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("batch_first", [False, True])
@SHAPES
def test_a_decoder_hears_each_sample_alone(batch_first: bool, T: int) -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(
                nn.TransformerDecoderLayer(C, 2, 6, 0.0, batch_first=batch_first) for _ in range(2)
            )
            self.head = nn.Linear(C, V)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, memory)
            return self.head(x)

    dim = 0 if batch_first else 1
    x, memory = (draw(N, T, C) if batch_first else draw(T, N, C) for _ in range(2))
    for granularity in ("matmul", "sublayer", "block"):
        rule = ap.DirectFeedback(granularity, std=0.5)
        model = ap.convert(Decoder().double(), rule, output="head")
        whole, parts = copy.deepcopy(model), copy.deepcopy(model)
        whole(x, memory).cos().sum().backward()
        for n in range(N):
            parts(*(t.narrow(dim, n, 1) for t in (x, memory))).cos().sum().backward()
        for got, want in zip(whole.parameters(), parts.parameters(), strict=True):
            assert torch.allclose(got.grad, want.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_taps_of_attention_have_the_layout_of_its_caller(batch_first: bool) -> None:
    model = Attending(batch_first=batch_first)
    rule = ap.DirectFeedback(std=0.5)
    ap.convert(model, rule, output="head", batch_axis=0 if batch_first else 1)
    x = draw(N, N, C)
    e = errors(model, x)
    signal = e @ model.B_dfa_shared[: 3 * C].T
    want = torch.einsum("abo,abi->oi", signal, x)
    assert torch.allclose(model.attn.in_proj_weight.grad, want, rtol=1e-10)


# Shapes alone


def test_every_layout_pairs_a_tap_with_the_error_of_its_own_position() -> None:
    """Number the positions of an error; the oracle is what `movedim` of the numbers gives."""
    sizes = (2, 3, 4)
    for rank in (1, 2, 3):
        for a, b in itertools.product(range(rank), repeat=2):
            lead = sizes[:rank]
            number = torch.arange(torch.tensor(lead).prod()).view(*lead, 1)
            want = number.movedim(a, b)
            groups = fits(lead, tuple(want.shape[:-1]))
            turned = [group[0].turn(want) for group in groups]
            assert any(torch.equal(spread_error(number, t.shape), t) for t in turned)
            if rank < 3:
                assert len(groups) == 1


def test_sizes_of_one_and_empty_batches_leave_nothing_open() -> None:
    for have, want in [
        ((1, 6), (6, 1)),
        ((1,), (6, 1)),
        ((6,), (1, 6)),
        ((), (6,)),
        ((), (4, 6)),
        ((), ()),
    ] + [((0, 6), (0, 6)), ((0,), (0, 6)), ((0, 6), (0,)), ((4, 6, 1), (4, 1, 6))]:
        assert len(fits(have, want)) == 1, (have, want)
    for have, want in [((4, 6), (4, 7)), ((1,), (4, 6)), ((2, 12), (4, 6)), ((4, 6), (4,))]:
        assert not fits(have, want), (have, want)


def test_an_explicit_call_refuses_what_it_would_have_to_guess() -> None:
    layer = ap.LocalLinear(C, 2, method="dfa", seed=0)
    layer.set_dfa_target_dim(V)

    def gradient(x: Tensor, e: Tensor) -> Tensor:
        layer(x)
        layer.dfa_compute_grad(e)
        return layer.weight.grad

    x, e = torch.randn(N, N, C), torch.randn(N, V)
    with pytest.raises(ap.RuleError, match=r"e.unsqueeze\(1\)"):
        gradient(x, e)
    signal = e @ layer.B_dfa.T
    assert torch.allclose(gradient(x, e.unsqueeze(1)), torch.einsum("no,nti->oi", signal, x))
    assert torch.allclose(gradient(x, e.unsqueeze(0)), torch.einsum("no,tni->oi", signal, x))
    with pytest.raises(ap.RuleError, match="does not fit"):
        gradient(torch.randn(4, 6, C), torch.randn(6, 4, V))
    with pytest.raises(ap.RuleError, match="does not fit"):
        gradient(torch.randn(5, N, C), e)

"""An error meets its own sample, whichever axes count samples and tokens, squares included.

Oracles: gradients written by hand in float64 from the model's own tensors.
Shapes: N samples, T tokens, C features, V outputs; `x` is (N, T, C) wherever it is not said.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

import altprop as ap
from altprop.layouts import fits, spread_error
from altprop.testing.samples import check_samples

N, C, V = 3, 4, 5
Run = Callable[[Tensor], Tensor]
SHAPES = pytest.mark.parametrize("T", [N, N + 2], ids=["square", "oblong"])


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Net(nn.Module):
    """Two linear blocks with tanh, then `reads`, then a head: the blocks see what is given."""

    def __init__(self, reads: Run = lambda h: h, between: Run = lambda h: h) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(C, C, dtype=torch.float64), nn.Tanh()) for _ in range(2)
        )
        self.head = nn.Linear(C, V, dtype=torch.float64)
        self.reads, self.between = reads, between
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for block in self.blocks:
            x = block(self.between(x))
        return self.head(self.reads(x))


def convert(model: Net, granularity: str = "block", **options: Any) -> Net:
    rule = ap.DirectFeedback(granularity, feedback="independent", std=0.5)
    return ap.convert(model, rule, output="head", **options)


def errors(model: nn.Module, x: Tensor) -> Tensor:
    """Run one backward pass and return the error at the logits."""
    logits = model(x)
    logits.retain_grad()
    logits.cos().mul(torch.linspace(0.5, 2, logits.numel()).view(logits.shape)).sum().backward()
    return logits.grad


def check_blocks(model: Net, x: Tensor, place: Run) -> None:
    """Compare with `Σ (e Bᵀ ⊙ (1 − h²)) x`, where `place` says how `e` lies on (N, T)."""
    e = place(errors(model, x))
    for block in model.blocks:
        linear = block[0]
        x = model.between(x)
        with torch.no_grad():
            h = torch.tanh(linear(x))
        signal = (e @ getattr(block, "B_dfa", getattr(linear, "B_dfa", None)).T).expand(h.shape)
        if hasattr(block, "B_dfa"):
            signal = signal * (1 - h**2)
        want = signal.flatten(0, -2).T @ x.flatten(0, -2)
        assert torch.allclose(linear.weight.grad, want, rtol=1e-10, atol=1e-12)
        x = h


BOTH = pytest.mark.parametrize("granularity", ["block", "matmul"])


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


# What is measured, and when


def test_the_model_runs_once_more_in_the_first_square_pass_and_never_else() -> None:
    model = convert(Net(lambda h: h.mean(0)))
    for shape, calls in (((5, N, C), 1), ((5, N, C), 1), ((N, N, C), 2), ((N, N, C), 1)):
        model.calls = 0
        errors(model, draw(*shape))
        assert model.calls == calls
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(strip(model)))):
        twin.calls = 0
        twin.reads = model.reads = mean_of_first
        check_blocks(twin, draw(N, N, C), lambda e: e[None])
        assert twin.calls == 1, "a copy measured again"


def mean_of_first(h: Tensor) -> Tensor:
    return h.mean(0)


def same(h: Tensor) -> Tensor:
    return h


def strip(model: Net) -> Net:
    model.reads, model.between = mean_of_first, same
    return model


def test_measuring_leaves_no_trace_in_random_numbers_statistics_modes_or_gradients() -> None:
    class Noisy(Net):
        def __init__(self) -> None:
            super().__init__(mean_of_first, same)
            self.norm = nn.BatchNorm1d(C, dtype=torch.float64)
            self.blocks[1].eval()

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x.flatten(0, 1)).view(x.shape)
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    x = draw(N, N, C)
    results = []
    for options in ({}, {"batch_axis": 1}):
        model = convert(Noisy(), **options)
        torch.manual_seed(7)
        logits = model(x)
        assert all(p.grad is None for p in model.parameters())
        results.append((logits, torch.rand(3), model.norm.running_mean))
        assert [m.training for m in model.blocks] == [True, False] and model.norm.training
        assert int(model.norm.num_batches_tracked) == 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@BOTH
def test_a_head_of_zeros_hides_no_sample(granularity: str) -> None:
    model = Net(mean_of_first)
    nn.init.zeros_(model.head.weight)
    check_blocks(convert(model, granularity), draw(N, N, C), lambda e: e[None])


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_measuring_works_under_autocast_checkpointing_and_anomaly_detection() -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(x.mean(0))

    x = draw(N, N, C)
    for granularity in ("block", "matmul"):
        model = convert(Net(mean_of_first), granularity)
        wanted = errors(model, x), [p.grad for p in model.parameters()]
        twin = convert(Checkpointed(), granularity)
        got = errors(twin, x), [p.grad for p in twin.parameters()]
        assert torch.equal(got[0], wanted[0])
        assert all(torch.equal(a, b) for a, b in zip(got[1], wanted[1], strict=True))
        with torch.autograd.detect_anomaly():
            twin = convert(Net(mean_of_first), granularity)
            errors(twin, x)
        assert torch.equal(twin.blocks[0][0].weight.grad, wanted[1][0])
        half = convert(Net(mean_of_first).float(), granularity)
        with torch.autocast("cpu", torch.bfloat16):
            logits = half(x.float())
        logits.float().cos().sum().backward()
        assert half.blocks[0][0].weight.grad.isfinite().all()


def test_measuring_works_in_a_data_parallel_model(tmp_path: Path) -> None:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = convert(Net(mean_of_first))
        parallel = nn.parallel.DistributedDataParallel(model)
        x = draw(N, N, C)
        for _ in range(2):
            parallel(x).cos().sum().backward()
        alone = convert(Net(mean_of_first))
        for _ in range(2):
            alone(x).cos().sum().backward()
        for got, want in zip(model.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(got.grad, want.grad, rtol=1e-10)
    finally:
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager_and_an_open_square_names_what_to_write() -> None:
    def gradients(model: Net, x: Tensor, **how: Any) -> list[Tensor]:
        torch._dynamo.reset()
        errors(model if not how else torch.compile(model, backend="aot_eager", **how), x)
        return [p.grad for p in model.parameters()]

    def net(**options: Any) -> Net:
        model = Net(mean_of_first)
        model.blocks = model.blocks[:1]
        return convert(model, **options)

    oblong, square = draw(5, N, C), draw(N, N, C)
    known = net()
    known(square)  # a pass that is not compiled has measured it
    for model, x, fullgraph in (
        (net(), oblong, True),
        (net(), square, False),
        (net(batch_axis=1), square, True),
        (known, square, True),
    ):
        got = gradients(model, x, fullgraph=fullgraph, dynamic=True)
        wanted = gradients(net(), x)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    with pytest.raises(Exception, match="batch_axis=0"):
        gradients(net(), square, fullgraph=True)
    torch._dynamo.reset()


# What cannot be measured, and what a user may say


@pytest.mark.parametrize(
    "reads",
    [lambda h: (h - h.mean((0, 1))).mean(0), lambda h: h.sign().mean(0)],
    ids=["samples mixed", "not differentiable"],
)
def test_an_open_square_is_refused_unless_the_axis_is_given(reads: Run) -> None:
    x = draw(N, N, C)
    model = convert(Net(reads))
    with pytest.raises(ap.RuleError, match=r"write convert\(..., batch_axis=0\)") as raised:
        model(x)
    assert "\n" not in str(raised.value)
    assert model.training and all(p.grad is None for p in model.parameters())
    check_blocks(convert(Net(reads), batch_axis=1), x, lambda e: e[None])
    check_blocks(convert(Net(reads), batch_axis=0), x, lambda e: e[:, None])
    check_blocks(convert(Net(reads), batch_axis=(0, 1)), x, lambda e: e[None])
    check_blocks(convert(Net(reads)), draw(5, N, C), lambda e: e[None])


def test_what_a_user_says_of_the_axes_counts_and_must_fit() -> None:
    def turn(h: Tensor) -> Tensor:
        return h.transpose(0, 1)

    for T in (N, 5):
        x = draw(T, N, C)
        check_blocks(convert(Net(turn), batch_axis=(0, 1)), x, turn)
    with pytest.raises(ap.RuleError, match=r"batch axes \(0, 0\)"):
        convert(Net(turn), batch_axis=0)(x)
    with pytest.raises(ap.RuleError, match=r"batch axes \(0, 1\)"):
        convert(Net(), batch_axis=(0, 1))(x)
    for wrong in (-1, True, "0", (0,), (0, 1, 2), (0, -1), 1.0, [0, 1]):
        with pytest.raises(ap.ConfigError, match="batch_axis must be"):
            convert(Net(), batch_axis=wrong)
    with pytest.raises(ap.RuleError, match="batch_axis=1 is for broadcast rules"):
        ap.convert(Net(), ap.FeedbackAlignment(), batch_axis=1)
    with pytest.raises(ap.ConfigError, match="batch_axis is for broadcast rules"):
        ap.convert(Net(), ap.AEP(), stack="blocks", batch_axis=1)


def test_a_block_wise_rule_takes_the_taps_axis_of_a_pair() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(0, keepdim=True)

    model = Net(lambda h: h[0])
    model.blocks[1] = nn.Sequential(model.blocks[1][0], Mean())
    rules = {"blocks.1": ap.BlockDirectFeedback(std=0.5)}
    ap.convert(model, rules, output="head", batch_axis=(0, 1))
    x = draw(N, N, C)
    above = errors(model, x) @ model.head.weight.detach()
    linear = model.blocks[1][0]
    with torch.no_grad():
        h = model.blocks[0](x)
    want = torch.einsum("no,tni->oi", above @ linear.B_dfa_block.T, h)
    assert torch.allclose(linear.weight.grad, want, rtol=1e-10)


@SHAPES
def test_learned_feedback_is_the_same_in_both_layouts(T: int) -> None:
    x, found = draw(N, T, C), []
    for turned, axis in ((False, 0), (True, 1)):
        reads = mean_of_first if turned else (lambda h: h.mean(1))
        model = ap.convert(Net(reads), ap.GrAPE(std=0.5), output="head", batch_axis=axis)
        errors(model, x.transpose(0, 1) if turned else x)
        found.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(*found, strict=True))


def test_grape_measures_the_jacobian_of_turned_tokens() -> None:
    """Without activations `J` is the product of the weights above, whatever the layout."""
    for T in (N, 5):
        model = Net(lambda h: h.transpose(0, 1))
        for block in model.blocks:
            block[1] = nn.Identity()
        ap.convert(model, ap.GrAPE(probes=100, normalize="none"), output="head")
        errors(model, draw(T, N, C))
        jacobian = model.head.weight.detach()
        for block in reversed(model.blocks):
            # the gradient of Σ (1 − cos) is orthogonal to B and leads away from J
            down = -block.B_dfa.grad * block.B_dfa.detach().norm(dim=1, keepdim=True)
            B = nn.functional.normalize(block.B_dfa.detach(), dim=1)
            J = nn.functional.normalize(jacobian.T, dim=1)
            want = J - (J * B).sum(1, keepdim=True) * B
            assert torch.cosine_similarity(down.flatten(), want.flatten(), dim=0) > 0.98
            jacobian = jacobian @ block[0].weight.detach()


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


# The public law


def test_the_law_of_samples_notices_errors_that_meet_other_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("altprop.layouts.Fit.turn", lambda self, tap: tap.flip(0))
    for rule in (ap.DirectFeedback(), ap.DirectFeedback("block"), ap.BlockDirectFeedback()):
        with pytest.raises(AssertionError, match="sum of its samples'"):
            check_samples(rule)


@pytest.mark.parametrize(
    "rule", [ap.DirectFeedback("sublayer"), ap.SignSymmetry(variant="brsf")], ids=str
)
def test_the_law_of_samples_holds_for_rules_that_cut_or_draw(rule: ap.AbstractRule) -> None:
    check_samples(rule)

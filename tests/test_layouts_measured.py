"""When it is measured which axis counts the samples, what may be said of it, and the public law.

Shapes: N samples, T tokens, C features; `x` is (T, N, C) wherever it is not said.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

import altprop as ap
from altprop.testing.samples import check_samples
from layout_models import (
    BOTH,
    SHAPES,
    C,
    N,
    Net,
    Run,
    check_blocks,
    convert,
    draw,
    errors,
    mean_of_first,
)


def counted(model: Net, *shape: int) -> int:
    model.calls = 0
    errors(model, draw(*shape))
    model.zero_grad()
    return model.calls


def test_the_model_runs_once_more_in_the_first_open_pass_and_never_else() -> None:
    model = convert(Net(mean_of_first))
    for shape, calls in (((1, 1, C), 1), ((N, N, C), 2), ((N, N, C), 1), ((5, N, C), 1)):
        assert counted(model, *shape) == calls
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.calls = 0
        check_blocks(twin, draw(N, N, C), lambda e: e[None])
        assert twin.calls == 1, "a copy measured again"


def test_two_rules_with_one_output_are_each_measured() -> None:
    rules = [ap.DirectFeedback("block", feedback="independent", std=std) for std in (0.5, 0.25)]
    model = Net(mean_of_first)
    ap.convert(model, {"blocks.0": rules[0], "blocks.1": rules[1]}, output="head")
    check_blocks(model, draw(N, N, C), lambda e: e[None])


def test_what_the_shapes_of_one_pass_told_counts_in_the_next() -> None:
    model = convert(Net(mean_of_first))
    for shape in ((1, N, C), (N, 1, C)):  # here nothing is told of the samples
        assert counted(model, *shape) == 1
    fresh = copy.deepcopy(model)
    assert counted(fresh, N, N, C) == 2
    assert counted(model, 5, N, C) == 1
    model.calls = 0
    check_blocks(model, draw(N, N, C), lambda e: e[None])
    assert model.calls == 1


def test_measuring_leaves_no_trace_in_random_numbers_statistics_modes_or_gradients() -> None:
    class Noisy(Net):
        def __init__(self) -> None:
            super().__init__(mean_of_first)
            self.norm = nn.BatchNorm1d(C, dtype=torch.float64)
            self.blocks[1].eval()

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x.flatten(0, 1)).view(x.shape)
            return super().forward(nn.functional.dropout(x, 0.5))

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


def test_a_part_that_is_reverted_takes_what_was_known_of_its_layout_with_it() -> None:
    model, x = convert(Net(between=lambda h: h.transpose(0, 1))), draw(N, N, C)
    errors(model, x)  # of the blocks the first sees (T, N, C), and the second (N, T, C)
    ap.revert(model.blocks[0])
    model.zero_grad()
    e, block = errors(model, x), model.blocks[1]
    with torch.no_grad():
        below = model.blocks[0](x.transpose(0, 1)).transpose(0, 1)
        signal = e @ block.B_dfa.T * (1 - block(below) ** 2)
    want = signal.flatten(0, -2).T @ below.flatten(0, -2)
    assert torch.allclose(block[0].weight.grad, want, rtol=1e-10, atol=1e-12)


@BOTH
def test_a_head_of_zeros_hides_no_sample(granularity: str) -> None:
    model = Net(mean_of_first)
    nn.init.zeros_(model.head.weight)
    check_blocks(convert(model, granularity), draw(N, N, C), lambda e: e[None])


def test_a_frozen_part_that_changes_in_place_is_measured_too() -> None:
    model = Net(mean_of_first)
    model.blocks[0][1] = nn.Tanh()
    model.blocks[0][0].requires_grad_(False)
    model.blocks[0][1].forward = torch.tanh_
    convert(model, "matmul")
    x = draw(N, N, C)
    e = errors(model, x)
    with torch.no_grad():
        h = model.blocks[0](x)
    linear = model.blocks[1][0]
    want = torch.einsum("no,tni->oi", e @ linear.B_dfa.T, h)
    assert torch.allclose(linear.weight.grad, want, rtol=1e-10)


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


def test_a_block_inside_a_checkpoint_measures_for_itself() -> None:
    class Turning(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    x, found = draw(N, N, C), []
    for kind in (Net, Checkpointed):
        model = kind()
        model.blocks[0] = Turning(*model.blocks[0])
        ap.convert(model, ap.BlockDirectFeedback(std=0.5), output="head")
        errors(model, x)
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_a_second_run_might_change_is_not_run_again() -> None:
    class Cache:
        calls = 0

    class Counting(Net):
        def forward(self, x: Tensor, cache: object, *rest: object) -> Tensor:
            Cache.calls += 1
            return super().forward(x)

    model, x = convert(Counting(mean_of_first)), draw(N, N, C)
    with pytest.raises(ap.RuleError, match=r"the Cache that .*batch_axis=0"):
        model(x, [{"a": (Cache(),)}])
    assert Cache.calls == 1
    model(x, None, {"a": [1, 2.0, "b", x, torch.float32, len]})
    assert Cache.calls == 3
    convert(Counting(mean_of_first), batch_axis=1)(x, Cache())


def test_measuring_works_in_a_data_parallel_model(tmp_path: Path) -> None:
    def check() -> None:
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

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        check()  # its wrapper is gone before the group
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
    model = net()
    model.blocks[0].compile(backend="aot_eager", fullgraph=True)  # a part, and it is measured
    check_blocks(model, square, lambda e: e[None])
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


def test_a_module_that_runs_in_two_layouts_is_told_apart_by_shapes_or_refused() -> None:
    def shared() -> Net:
        model = Net(between=lambda x: x.transpose(0, 1))
        model.blocks[1] = model.blocks[0]
        return convert(model, "matmul")

    model, x = shared(), draw(N, 5, C)
    e = errors(model, x)
    linear = model.blocks[0][0]
    with torch.no_grad():
        h = model.blocks[0](x)
    want = sum(torch.einsum("nto,nti->oi", e @ linear.B_dfa.T, source) for source in (x, h))
    assert torch.allclose(linear.weight.grad, want, rtol=1e-10)
    for tried in (shared(), model):  # the second knows it of the shapes
        with pytest.raises(ap.RuleError, match="several times, with the samples on different axes"):
            tried(draw(N, N, C))


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

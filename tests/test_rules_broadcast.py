"""Broadcast rules against gradients written by hand in float64; how learned feedback behaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

import altprop as ap


class Chain(nn.Module):
    """head(f₂(f₁(x))): linear blocks with an optional tanh, so that everything has a formula."""

    def __init__(self, tanh: bool, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        body = nn.Tanh() if tanh else nn.Identity()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(a, 6, dtype=torch.float64), body) for a in (5, 6)
        )
        self.head = nn.Linear(6, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (3, 2), generator=generator)


def trained(model: Chain) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run one backward pass; return the error, each map's input and each block's output."""
    x, targets = data()
    states = [x]
    with torch.no_grad():
        for block in model.blocks:
            states.append(block(states[-1]))
    logits = model(x)
    logits.retain_grad()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    assert logits.grad is not None
    return logits.grad, states[:-1], states[1:]


def close(got: Tensor | None, want: Tensor, tolerance: float = 1e-12) -> None:
    assert got is not None
    assert float((got - want).abs().max()) <= tolerance


def outer(signal: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("bto,bti->oi", signal, x)


def test_a_map_left_to_backprop_is_no_part_of_its_blocks_rule() -> None:
    rules = {"blocks.1.0": ap.Backprop(), "blocks.*": ap.BlockDirectFeedback(std=0.5)}
    model = ap.convert(Chain(tanh=True), rules, output="head")
    e, inputs, outputs = trained(model)
    top = (e @ model.head.weight.detach()) * (1 - outputs[1] ** 2)
    close(model.blocks[1][0].weight.grad, outer(top, inputs[1]))
    below = top @ model.blocks[1][0].weight.detach()
    close(
        model.blocks[0][0].weight.grad, outer(below @ model.blocks[0][0].B_dfa_block.T, inputs[0])
    )
    assert [row.rule for row in ap.explain(model).rows][2:4] == ["Backprop", "Backprop"]


@pytest.mark.parametrize("granularity", ["matmul", "block"])
def test_the_exact_jacobian_as_feedback_is_backprop(granularity: str) -> None:
    model, plain = Chain(tanh=False), Chain(tanh=False)
    ap.convert(model, ap.DirectFeedback(granularity, feedback="independent"), output="head")
    jacobian = model.head.weight.detach()
    for block in reversed(model.blocks):
        (block if granularity == "block" else block[0]).B_dfa.copy_(jacobian.T)
        jacobian = jacobian @ block[0].weight.detach()
    trained(model)
    trained(plain)
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        close(got.grad, want.grad, 1e-10)


def test_a_rule_per_block_measures_before_any_block_collects() -> None:
    rules = {"blocks.0": ap.GrAPE(), "blocks.1": ap.GrAPE(probes=2)}
    model = ap.convert(Chain(tanh=True), rules, output="head")
    trained(model)
    assert all(block.B_dfa.grad.abs().max() > 0 for block in model.blocks)


def test_a_probe_measures_the_jacobian_product_with_dropout_and_rules_off() -> None:
    class Noisy(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5, self.training))

    model = ap.convert(Noisy(tanh=False), ap.GrAPE(), output="head")
    x, _ = data()
    torch.manual_seed(3)
    first = model(x)
    ap.revert(model)
    torch.manual_seed(3)
    assert torch.equal(first, model(x)), "the probe disturbed the dropout of the pass"
    assert model.training and model.head.training


def test_a_probe_under_join_is_refused_for_a_rank_may_be_missing(tmp_path: Path) -> None:
    def probe() -> None:
        model = ap.convert(Chain(tanh=True), ap.GrAPE(), output="head")
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(data()[0]).sum().backward()
        with pytest.raises(ap.RuleError, match="drop join"), parallel.join():
            parallel(data()[0])

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        probe()
    finally:
        # The wrapper is gone by now: were the group's last reference its, the group would end
        # under Python's lock and could wait forever for its thread, which wants that lock.
        distributed.destroy_process_group()


def test_kolen_pollack_contracts_by_the_rate_times_the_decay() -> None:
    model = ap.convert(Chain(tanh=True), ap.KolenPollack())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=2.0)
    linear = model.blocks[1][0]
    # The same gradient and the same moments: only the decay is left of the difference.
    gap = (linear.weight - linear.B).detach().clone()
    for step in range(1, 6):
        optimizer.zero_grad()
        trained(model)
        optimizer.step()
        close((linear.weight - linear.B).detach(), gap * (1 - 0.01 * 2.0) ** step)


def test_feedback_alignment_aligns_a_linear_network() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(12, 24, bias=False), nn.Linear(24, 6, bias=False)).double()
    with torch.no_grad():
        for linear in student:
            linear.weight.mul_(0.1)
    ap.convert(student, ap.FeedbackAlignment(std=0.3))
    teacher = torch.randn(6, 12, dtype=torch.float64)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02)

    def angle() -> float:
        W, B = student[1].weight.detach().flatten(), student[1].B.flatten()
        return float(torch.rad2deg(torch.acos(torch.cosine_similarity(W, B, dim=0))))

    before = angle()
    for _ in range(400):
        x = torch.randn(32, 12, dtype=torch.float64)
        loss = (student(x) - x @ teacher.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before > 80 and angle() < 45, (before, angle())


def test_a_mirror_and_aligned_feedback_come_to_point_along_the_weight() -> None:
    for rule, rate in ((ap.WeightMirror(probes=64), 0.2), (ap.AlignedFeedback(probes=64), 1e-3)):
        torch.manual_seed(0)
        layer = ap.convert(nn.Linear(8, 6), rule)
        optimizer = torch.optim.SGD([layer.B], lr=rate)
        x = torch.randn(4, 8)
        for _ in range(150):
            optimizer.zero_grad()
            layer(x).sum().backward()
            optimizer.step()
        W, B = layer.weight.detach().flatten(), layer.B.detach().flatten()
        assert torch.cosine_similarity(W, B, dim=0) > 0.9, rule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ap.FeedbackAlignment(init="ortogonal"), "did you mean orthogonal"),
        (lambda: ap.SignSymmetry(scale="frob"), "did you mean frobenius"),
        (lambda: ap.SignSymmetry(variant="sgn"), "did you mean sign"),
        (lambda: ap.DirectFeedback("blok"), "did you mean block"),
        (lambda: ap.DirectFeedback(calibrate_every=1), "no step to the rule"),
        (lambda: ap.GrAPE(normalize="rows"), "Known: hidden, none, output"),
        (lambda: ap.GrAPE(probes=0), "at least 1"),
        (lambda: ap.WeightMirror(probes=1), "centres its noise"),
    ],
)
def test_a_rule_refuses_what_it_does_not_know(make: object, message: str) -> None:
    with pytest.raises(ap.ConfigError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("granularity", ["matmul", "block"])
def test_what_taps_have_received_cannot_be_differentiated_again(granularity: str) -> None:
    model = ap.convert(Chain(tanh=True), ap.DirectFeedback(granularity), output="head")
    x, _ = data()
    weights = [block[0].weight for block in model.blocks]
    first = torch.autograd.grad(model(x).cos().sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(first[0].square().sum(), [model.head.weight])

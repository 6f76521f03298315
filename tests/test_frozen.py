"""Feedback of a frozen weight neither learns nor decays, and learns again when its weight does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn

import altprop as ap
from altprop.assign import assign_transport
from altprop.testing.rules import TinyModel

LEARNED = [
    ap.KolenPollack(std=0.3),
    ap.WeightMirror(probes=4),
    ap.AlignedFeedback(probes=4),
    ap.GrAPE(),
    ap.GrAPE(error="head_input", calibrate_every=3),
]


def model_of(rule: ap.AbstractRule | None = None, frozen: str = "") -> TinyModel:
    torch.manual_seed(0)
    model = TinyModel(tied=False).double()
    freeze(model, frozen)
    return model if rule is None else ap.convert(model, rule, output="head")


def freeze(model: nn.Module, prefix: str, learns: bool = False) -> None:
    """Freeze what a user would: the weights by name, and nothing else."""
    for name, parameter in model.named_parameters():
        if prefix and name.startswith(prefix) and not is_feedback(name):
            parameter.requires_grad_(learns)


def is_feedback(name: str) -> bool:
    return name.rpartition(".")[2].startswith("B")


def feedback(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if is_feedback(n)}


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    model.zero_grad()
    tokens = torch.arange(12).view(3, 4) % 7
    logits = model(tokens)
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten().roll(1)).backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def train(model: nn.Module, steps: int = 4) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(steps):
        grads(model)
        optimizer.step()


@pytest.mark.parametrize("before", [True, False], ids=["frozen before convert", "after"])
@pytest.mark.parametrize("rule", LEARNED, ids=str)
def test_feedback_of_frozen_weights_stays_to_the_bit_under_weight_decay(
    rule: ap.AbstractRule, before: bool
) -> None:
    model = model_of(rule, "blocks.0" if before else "")
    freeze(model, "blocks.0")
    start = {n: t.clone() for n, t in model.state_dict().items()}
    assert any(is_feedback(n) and n.startswith("blocks.0") for n in start)
    train(model)
    for name, value in model.state_dict().items():
        still = name.startswith("blocks.0") and not name.endswith("B_step")
        assert torch.equal(value, start[name]) == still, name
    assert all(p.grad is None for n, p in feedback(model).items() if n.startswith("blocks.0"))


@pytest.mark.parametrize("rule", LEARNED, ids=str)
def test_freezing_changes_no_other_gradient(rule: ap.AbstractRule) -> None:
    plain, frozen = grads(model_of(rule)), grads(model_of(rule, "blocks.0"))
    for name, gradient in frozen.items():
        if name.startswith("blocks.0"):
            assert gradient is None and plain[name] is not None, name
        else:
            assert gradient is not None and torch.equal(gradient, plain[name]), name


@pytest.mark.parametrize("before", [True, False], ids=["frozen before convert", "after"])
@pytest.mark.parametrize("rule", LEARNED, ids=str)
def test_feedback_learns_again_when_its_weight_does(rule: ap.AbstractRule, before: bool) -> None:
    model = model_of(rule, "blocks.0" if before else "")
    freeze(model, "blocks.0")
    freeze(model, "blocks.0", learns=True)
    got, want = grads(model), grads(model_of(rule))
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert gradient is not None and torch.equal(gradient, want[name]), name


@pytest.mark.parametrize("rule", LEARNED, ids=str)
def test_feedback_that_the_user_froze_stays_frozen(rule: ap.AbstractRule) -> None:
    model = model_of(rule)
    for parameter in feedback(model).values():
        parameter.requires_grad_(False)
    for name, gradient in grads(model).items():
        assert (gradient is None) == is_feedback(name), name


def test_feedback_parameters_are_those_whose_weights_learn() -> None:
    model = model_of(ap.KolenPollack(), "blocks.0")
    learns = [p for n, p in feedback(model).items() if not n.startswith("blocks.0")]
    assert len(learns) == 5 and len(feedback(model)) == 9
    assert [id(p) for p in ap.feedback_parameters(model)] == [id(p) for p in learns]
    freeze(model, "blocks.0", learns=True)
    assert len(ap.feedback_parameters(model)) == 9


def test_a_frozen_projection_of_attention_keeps_its_own_feedback_only() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, kdim=4, vdim=4, dtype=torch.float64)
    attention.k_proj_weight.requires_grad_(False)
    ap.convert(attention, ap.KolenPollack())
    q, kv = (torch.randn(3, 2, k, dtype=torch.float64) for k in (6, 4))
    attention(q, kv, kv)[0].square().sum().backward()
    found = {n: p.grad is not None for n, p in attention.named_parameters() if "B" in n}
    assert found == {"B_q_proj": True, "B_k_proj": False, "B_v_proj": True, "out_proj.B": True}


def test_a_frozen_feedback_does_not_stall_data_parallel_reduction(tmp_path: Path) -> None:
    def passes() -> None:
        parallel = nn.parallel.DistributedDataParallel(model_of(ap.KolenPollack(), "blocks.0"))
        for _ in range(2):  # a parameter that never gets its gradient shows in the second
            grads(parallel)

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        passes()
    finally:
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
def test_a_compiled_model_leaves_the_feedback_of_frozen_weights() -> None:
    torch._dynamo.reset()
    model = model_of(ap.KolenPollack())
    freeze(model, "blocks.0")
    want = grads(model)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    tokens = torch.arange(12).view(3, 4) % 7
    nn.functional.cross_entropy(run(tokens).flatten(0, 1), tokens.flatten().roll(1)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (want[name] is None), name
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, want[name], atol=1e-12), name
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # theirs, not ours
@pytest.mark.parametrize("adapted_first", [True, False])
def test_lora_trains_its_own_feedback_and_none_of_the_base(adapted_first: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
    base = model_of()
    if adapted_first:
        model = ap.convert(peft.get_peft_model(base, config), ap.KolenPollack())
    else:
        model = peft.get_peft_model(ap.convert(base, ap.KolenPollack()), config)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    wanted = {n for n in start if "lora_" in n and (adapted_first or not is_feedback(n))}
    assert trainable == wanted
    optimizer = torch.optim.AdamW(
        [p for n, p in model.named_parameters() if "lora_" in n and not is_feedback(n)],
        lr=1e-2, weight_decay=0.5,
    )  # fmt: skip
    ap.add_feedback(optimizer, model)  # the frozen base is in no optimiser, and need not be
    for _ in range(2):
        grads(model)
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == wanted


@pytest.mark.parametrize("before", [True, False], ids=["frozen before convert", "after"])
def test_a_blocks_feedback_learns_while_any_of_its_weights_does(before: bool) -> None:
    model = model_of(ap.GrAPE(), "blocks.0.first" if before else "")
    freeze(model, "blocks.0.first")
    assert model.blocks[0].B_dfa.requires_grad
    assert torch.equal(
        grads(model)["blocks.0.B_dfa"], grads(model_of(ap.GrAPE()))["blocks.0.B_dfa"]
    )
    start = [id(p) for p in ap.feedback_parameters(model)]
    assert start == [id(block.B_dfa) for block in model.blocks]
    # and it goes with a weight that learns, the only ones that an optimiser need hold
    optimizer = torch.optim.SGD(
        [p for n, p in model.named_parameters() if p.requires_grad and not is_feedback(n)]
    )
    ap.add_feedback(optimizer, model)
    assert set(start) <= {id(p) for p in optimizer.param_groups[0]["params"]}


def test_a_feedback_that_requires_a_gradient_gets_it_beside_a_frozen_weight_too() -> None:
    x, W, B, g = (torch.randn(*s) for s in ((5, 3), (4, 3), (4, 3), (5, 4)))
    assign_transport(x, W, None, ap.KolenPollack(), B.requires_grad_()).backward(g)
    assert torch.equal(B.grad, g.T @ x)

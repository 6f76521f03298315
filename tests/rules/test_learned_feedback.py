"""Learned feedback in the user's optimisers, and that of frozen weights, which rests with them."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import altprop as ap
from altprop.assign import assign_transport
from altprop.testing.rules import TinyModel

Optimizer = torch.optim.Optimizer
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


def step(model: nn.Module, *optimizers: Optimizer) -> None:
    grads(model)
    for optimizer in optimizers:
        optimizer.step()


FIRST_BLOCK = "blocks.0"
WHEN = pytest.mark.parametrize("before", [True, False], ids=["frozen before convert", "after"])


@WHEN
@pytest.mark.parametrize("rule", LEARNED, ids=str)
def test_feedback_of_frozen_weights_stays_to_the_bit_under_weight_decay_and_learns_again(
    rule: ap.AbstractRule, before: bool
) -> None:
    model = model_of(rule, FIRST_BLOCK if before else "")
    freeze(model, FIRST_BLOCK)
    start = {n: t.clone() for n, t in model.state_dict().items()}
    assert any(is_feedback(n) and n.startswith(FIRST_BLOCK) for n in start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(4):
        step(model, optimizer)
    for name, value in model.state_dict().items():
        still = name.startswith(FIRST_BLOCK) and not name.endswith("B_step")
        assert torch.equal(value, start[name]) == still, name
    # freezing changes no other gradient, and is undone by undoing it
    model, wanted = model_of(rule, FIRST_BLOCK if before else ""), grads(model_of(rule))
    freeze(model, FIRST_BLOCK)
    frozen = grads(model)
    freeze(model, FIRST_BLOCK, learns=True)
    model.load_state_dict(model_of(rule).state_dict())
    again = grads(model)
    assert frozen.keys() == again.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.equal(again[name], gradient), name
        if name.startswith(FIRST_BLOCK):
            assert frozen[name] is None, name
        else:
            assert torch.equal(frozen[name], gradient), name


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


# optimisers


def groups_of(model: nn.Module, *optimizers: Optimizer) -> dict[str, list[tuple[int, int]]]:
    """Return, for each parameter's name, the optimisers and groups that hold it."""
    found: dict[str, list[tuple[int, int]]] = {n: [] for n, _ in model.named_parameters()}
    names = {id(p): n for n, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                found[names[id(parameter)]].append((i, j))
    return found


def weight_of(name: str) -> str:
    return name.removesuffix("B") + "weight"


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_optimiser_of_named_parameters_gets_the_names_too(prefix: str) -> None:
    model = model_of()
    wrapped = nn.ModuleDict({"module": model}) if prefix else model
    optimizer = torch.optim.AdamW(
        [
            {"params": [(n, p) for n, p in wrapped.named_parameters() if p.dim() > 1]},
            {"params": [(n, p) for n, p in wrapped.named_parameters() if p.dim() < 2], "lr": 0.1},
        ]
    )
    ap.convert(model, ap.KolenPollack())
    ap.add_feedback(optimizer, model)
    parameters = dict(wrapped.named_parameters())
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert parameters[name] is parameter, name


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_saved_optimiser_with_feedback_continues_to_the_bit(
    named: bool, options: dict[str, Any]
) -> None:
    def setup() -> tuple[TinyModel, Optimizer]:
        model = model_of()
        given = model.named_parameters() if named else model.parameters()
        optimizer = torch.optim.AdamW(given, lr=1e-2, weight_decay=0.5, **options)
        ap.convert(model, ap.KolenPollack())
        ap.add_feedback(optimizer, model)
        return model, optimizer

    model, optimizer = setup()
    step(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    step(model, optimizer)
    again, other = setup()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    step(again, other)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_feedback_moves_at_its_weights_own_rate_and_decay(options: dict[str, Any]) -> None:
    model = model_of()
    groups = [
        {"params": [p], "lr": 0.01 * (i + 1), "weight_decay": 0.1 * (i + 1)}
        for i, p in enumerate(model.parameters())
    ]
    optimizer = torch.optim.SGD(groups, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    step(model, optimizer)  # state and schedule exist already when the rule comes
    schedule.step()
    order = [id(group) for group in optimizer.param_groups]
    ap.convert(model, ap.KolenPollack(std=0.3))
    ap.add_feedback(optimizer, model)
    assert [id(group) for group in optimizer.param_groups] == order
    parameters = dict(model.named_parameters())
    gaps = {
        n: (parameters[weight_of(n)] - p).detach().clone()
        for n, p in parameters.items()
        if n.endswith(".B")
    }
    assert len(gaps) == 9
    shrink = {n: 1.0 for n in gaps}
    for _ in range(3):
        where = groups_of(model, optimizer)
        for name in gaps:  # same gradient, so only the decay of the gap's own group is left
            ((_, at),) = where[name]
            assert where[weight_of(name)] == [(0, at)]
            group = optimizer.param_groups[at]
            shrink[name] *= 1 - group["lr"] * group["weight_decay"]
        step(model, optimizer)
        schedule.step()
    for name, gap in gaps.items():
        left = (parameters[weight_of(name)] - parameters[name]).detach()
        assert torch.allclose(left, gap * shrink[name], atol=1e-13), name


def by_kind(model: nn.Module) -> list[Optimizer]:
    """Return two optimisers as for Muon and AdamW: one of the blocks' matrices, one of the rest."""
    matrices = [p for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW(rest, lr=0.1)]


def by_depth(model: nn.Module) -> list[Optimizer]:
    first = list(model.blocks[0].parameters())
    ids = {id(p) for p in first}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [torch.optim.SGD(rest, lr=0.1), torch.optim.AdamW(first, lr=0.1)]


@pytest.mark.parametrize("split", [by_kind, by_depth])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("rule", [ap.KolenPollack(), ap.WeightMirror(), ap.GrAPE()], ids=str)
def test_with_several_optimisers_each_feedback_is_in_its_weights_own_and_in_no_other(
    rule: ap.AbstractRule, order: tuple[int, int], split: Any
) -> None:
    model = model_of()
    optimizers = split(model)
    ap.convert(model, rule, output="head")
    for i in (*order, *order):  # the second time adds nothing
        ap.add_feedback(optimizers[i], model)
    where = groups_of(model, *optimizers)
    assert Counter(map(len, where.values())) == {1: len(where)}
    for name, found in where.items():
        if name.endswith(".B"):
            assert found == where[weight_of(name)], name
        elif name.endswith(".B_dfa"):
            block = name.removesuffix("B_dfa")
            assert found == where[block + "first.up.weight"], name
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, *optimizers)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_an_optimiser_of_no_weight_that_has_feedback_is_refused_in_one_line() -> None:
    model = ap.convert(model_of(), ap.KolenPollack())
    optimizer = torch.optim.SGD(model.embed.parameters(), lr=0.1)
    with pytest.raises(
        ap.RuleError, match=r"holds no weight .*first.up.B, .* and 4 more"
    ) as caught:
        ap.add_feedback(optimizer, model)
    assert "\n" not in str(caught.value)
    optimizer.add_param_group({"params": ap.feedback_parameters(model)})  # as the line says
    ap.add_feedback(optimizer, model)
    assert len(optimizer.param_groups) == 2
    for weight in (m.weight for m in model.modules() if isinstance(m, nn.Linear)):
        weight.requires_grad_(False)
    ap.add_feedback(torch.optim.SGD(model.embed.parameters()), model)  # nothing learns any more

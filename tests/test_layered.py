"""A dynamics of layers: AEP on it is backprop, level by level, and its forward pass is ordinary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from altprop.lm.model import GPT, Block, ModelConfig
from systems import Gradients, cosine, worst


def blocks(depth: int = 6, C: int = 8, std: float = 0.15) -> list[nn.Module]:
    torch.manual_seed(0)
    made = [Block(C, 2) for _ in range(depth)]
    for p in nn.ModuleList(made).parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=std)
    return made


def collect(module: nn.Module, x: Tensor, weight: Tensor) -> tuple[Tensor, Gradients]:
    leaf = x.clone().requires_grad_()
    module.zero_grad()
    out = module(leaf)
    (out * weight).sum().backward()
    named = {"x": leaf, **dict(module.named_parameters())}
    return out.detach(), {
        k.replace("dynamics.blocks.", ""): torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for k, p in named.items()
    }


def problem(depth: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    """Return blocks in a chain, an input, and what its output is weighed by."""
    made = nn.Sequential(*blocks(depth)).double()
    x, weight = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    return made, x, weight


@pytest.mark.parametrize("phases", ["sweep", "synchronous"])
@pytest.mark.parametrize("start", ["adjoint", "zero"])
def test_aep_equals_backprop_on_a_layered_dynamics(phases: str, start: str) -> None:
    made, x, weight = problem(6 if phases == "sweep" else 3)
    wanted_out, wanted = collect(made, x, weight)
    estimator = ap.AEP(beta=1e-3, tol=1e-8, start=start)
    block = ap.Equilibrium(ap.Layered(made, phases=phases), estimator=estimator)
    out, got = collect(block, x, weight)
    assert torch.equal(out, wanted_out)
    assert worst(got, wanted) <= 1e-6


def test_the_bias_of_layered_aep_falls_as_beta_squared() -> None:
    made, x, weight = problem()
    _, wanted = collect(made, x, weight)
    errors = []
    for beta in (0.02, 0.01):
        estimator = ap.AEP(beta=beta, tol=1e-11)
        block = ap.Equilibrium(ap.Layered(made), estimator=estimator)
        errors.append(worst(collect(block, x, weight)[1], wanted))
    assert 3.5 <= errors[0] / errors[1] <= 4.5


def gpt() -> tuple[GPT, Callable[[], Gradients]]:
    """Return a GPT at its own initialisation, and what computes its gradients on a text."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(11, 8, 16, 2, layers=6))
    ids = torch.randint(11, (2, 9))

    def taken() -> Gradients:
        model.zero_grad()
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    return model, taken


def test_with_two_pairs_a_gpt_at_its_own_initialisation_gets_backprops_gradient() -> None:
    model, taken = gpt()
    model.double()

    def errors(sides: Literal[2, 4]) -> float:
        rule = ap.AEP(beta=1e-3, sides=sides, tol=1e-8)
        ap.convert(model, {"blocks": rule})
        got = taken()
        ap.revert(model)
        return worst(got, wanted)

    wanted = taken()
    # the embeddings are N(0, 0.02), so this nudge moves the states by 0.4 % and β² shows
    assert errors(sides=4) <= 1e-7 and errors(sides=2) >= 1e-5


def test_in_float32_every_parameter_of_a_gpt_gets_backprops_direction() -> None:
    model, taken = gpt()
    wanted = taken()
    ap.convert(model, {"blocks": ap.AEP()})
    got = taken()
    assert min(cosine(got[name], wanted[name]) for name in wanted) >= 0.99999
    assert any(not torch.equal(got[name], wanted[name]) for name in wanted)  # it is no backprop


def test_each_block_is_evaluated_once_per_force_and_once_in_the_forward_pass() -> None:
    made = blocks(3)
    calls: list[int] = []
    for level, block in enumerate(made):
        block.register_forward_hook(lambda *_, level=level: calls.append(level))
    block = ap.Equilibrium(ap.Layered(made))
    for _ in range(2):  # in which it is found out where the samples are
        block(torch.randn(2, 4, 8))
    calls.clear()
    block(torch.randn(2, 4, 8))
    assert calls == [0, 1, 2]


def test_levels_may_differ_in_shape() -> None:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Unflatten(1, (1, 7)), nn.Linear(7, 2))
    made = made.double()
    x, weight = torch.randn(4, 3).double(), torch.randn(4, 1, 2).double()
    wanted_out, wanted = collect(made, x, weight)
    block = ap.Equilibrium(ap.Layered(made), estimator=ap.AEP(beta=1e-4, tol=1e-9))
    out, got = collect(block, x, weight)
    assert torch.equal(out, wanted_out) and worst(got, wanted) <= 1e-6


def test_samples_do_not_know_each_other() -> None:
    made, x, weight = problem(2)
    block = ap.Equilibrium(ap.Layered(made))
    _, whole = collect(block, x, weight)
    _, alone = collect(block, x[:1], weight[:1])
    assert torch.allclose(whole["x"][:1], alone["x"], rtol=1e-9)


def test_plain_ep_is_not_exact_on_a_stack() -> None:
    made, x, weight = problem()
    _, wanted = collect(made, x, weight)
    block = ap.Equilibrium(ap.Layered(made), estimator=ap.EP(tol=1e-8))
    assert worst(collect(block, x, weight)[1], wanted) >= 0.1


def test_unit_steps_of_bptt_reach_backprop_in_as_many_steps_as_levels() -> None:
    made, x, weight = problem()
    _, wanted = collect(made, x, weight)
    solver = ap.Euler(step=1.0, max_steps=3)
    _, got = collect(ap.Equilibrium(ap.Layered(made), solver, ap.BPTT()), x, weight)
    assert worst(got, wanted) <= 1e-12


def test_the_hinge_leaves_a_stack_alone() -> None:
    block = ap.Equilibrium(ap.Layered(blocks(2)))
    block(torch.randn(2, 4, 8)).sum().backward()
    hinge = ap.JacobianHinge(target=1e-6, every=1)
    before = [p.grad.clone() for p in block.parameters()]
    assert hinge.apply(block, hinge.init(torch.Generator()), 0) == {}
    assert all(torch.equal(p.grad, g) for p, g in zip(block.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ap.Layered([]), "no blocks"),
        (lambda: ap.Layered([nn.Linear(2, 2)], phases="both"), "phases is 'both'"),
        (lambda: ap.Layered([nn.BatchNorm1d(2)]), "batch norm"),
    ],
)
def test_what_is_no_stack_is_refused(make: object, says: str) -> None:
    with pytest.raises(ap.AltpropError, match=says):
        make()  # type: ignore[operator]

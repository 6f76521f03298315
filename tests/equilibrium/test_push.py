"""The push of a hinge as a difference: of one draw of the noise, and at a step that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from systems import error, flat, randn

X = randn(3, 4, seed=3)


class Noisy(ap.AbstractDynamics):
    """`F = x − z + α ⊙ tanh(W(z + σε))/3`, with `ε` drawn anew each time; it keeps them."""

    draws = "fresh"

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.alpha = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.sigma = 1e-4
        self.seen: list[Tensor] = []

    @property
    def gate(self) -> nn.Parameter:
        return self.alpha

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.seen.append(torch.randn_like(z))
        return x - z + self.alpha * torch.tanh(self.inner(z + self.sigma * self.seen[-1])) / 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "hinge",
    [ap.JacobianHinge(target=0.01, every=1), ap.GateHinge(target=0.01, every=1)],
    ids=lambda hinge: type(hinge).__name__,
)
def test_what_a_stabiliser_compares_has_one_draw(
    hinge: ap.AbstractStabiliser, training: bool
) -> None:
    torch.manual_seed(0)
    dynamics = Noisy().double().train(training)
    block = ap.Equilibrium(dynamics, ap.Euler(step=0.5, max_steps=30), ap.OneStep())
    block(X).sum().backward()
    dynamics.seen.clear()
    block.zero_grad()
    said = hinge.apply(block, hinge.init(torch.Generator().manual_seed(0)), 0)
    assert said["jacobian_gain"] > 0.01 and dynamics.alpha.grad.any()
    assert len(dynamics.seen) > 1
    assert all(torch.equal(noise, dynamics.seen[0]) for noise in dynamics.seen)
    hinge.apply(block, hinge.init(torch.Generator().manual_seed(0)), 1)
    assert not torch.equal(dynamics.seen[0], dynamics.seen[-1])  # the next one has another


def test_noise_changes_a_push_by_its_own_size_and_is_not_divided_by_the_step() -> None:
    torch.manual_seed(0)
    dynamics, pushes = Noisy().double(), []
    block = ap.Equilibrium(dynamics, ap.Euler(step=0.5, max_steps=30), ap.OneStep())
    block(X).sum().backward()
    hinge = ap.JacobianHinge(target=0.01, every=1)
    for sigma in (0.0, 1e-4):
        dynamics.sigma = sigma
        block.zero_grad()
        hinge.apply(block, hinge.init(torch.Generator().manual_seed(0)), 0)
        pushes.append(flat(p.grad for p in dynamics.parameters()))
    assert error(pushes[1], pushes[0]) <= 1e-2


@pytest.mark.parametrize("tokens", [8, 256])
def test_one_token_of_a_long_window_is_pushed_as_exactly_as_one_of_a_short_one(tokens: int) -> None:
    """In float32 against float64, whose push is that of the penalty to seven digits."""
    torch.manual_seed(0)
    single = ap.GatedBlock(16, 2, init_std=0.35)
    nn.init.constant_(single.alpha, 1.2)
    double = ap.GatedBlock(16, 2).double()
    double.load_state_dict(single.state_dict())
    x, states, pushes = torch.randn(1, tokens, 16), list[Tensor](), list[Tensor]()
    hinge = ap.JacobianHinge(target=1e9, token_target=0.05, power=6)
    for dynamics in (single, double):
        own = x.to(dynamics.alpha.dtype)
        block = ap.Equilibrium(dynamics, ap.Anderson(max_steps=300), on_failure="accept")
        with torch.no_grad():
            states.append(block(own))
        block.certificate = replace(block.certificate, state=states[0].to(own))
        said = hinge.apply(block, hinge.init(torch.Generator().manual_seed(1)), 0)
        assert said["jacobian_gain"] > 1
        pushes.append(flat(p.grad for p in dynamics.parameters() if p.grad is not None).double())
    assert error(*pushes) <= 2e-3

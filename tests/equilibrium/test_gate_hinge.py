"""The stabiliser without derivatives: what it measures, and which way it turns the gate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from systems import gated


class Feedback(ap.AbstractDynamics):
    """`F = α ⊙ x ⊙ z − z + 1`: the contraction of a sample is `α x`, if all of it is alike."""

    def __init__(self, gate: float = 1.0) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((4,), gate, dtype=torch.float64))

    @property
    def gate(self) -> nn.Parameter:
        return self.alpha

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.alpha * x * z - z + 1


RATES = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
X = RATES[:, None].expand(3, 4)


def settled(dynamics: ap.AbstractDynamics, x: Tensor, tol: float = 1e-4) -> ap.Equilibrium:
    block = ap.Equilibrium(dynamics, ap.FixedPoint(tol=tol, max_steps=400), ap.Implicit(1e-6, 400))
    block(x).sum().backward()
    block.zero_grad()
    return block


def apply(hinge: ap.GateHinge, block: nn.Module, step: int = 0, **how: Any) -> dict[str, float]:
    return hinge.apply(block, hinge.init(torch.Generator()), step, **how)


def test_it_measures_what_a_step_leaves_and_turns_the_gate_along_the_penaltys_gradient() -> None:
    block = settled(Feedback(), X)
    hinge = ap.GateHinge(target=0.3, every=2, weight=1.5)
    assert apply(hinge, block)["jacobian_gain"] == pytest.approx(0.8, rel=1e-9)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)  # of the whole gate
    penalty = 1.5 * 2 * (scale * RATES - 0.3).clamp_min(0).square().mean()
    (wanted,) = torch.autograd.grad(penalty, scale)
    gate = block.dynamics.gate
    assert gate is not None and gate.grad is not None
    assert float((gate.grad * gate.detach()).sum()) == pytest.approx(float(wanted), rel=1e-9)
    assert torch.allclose(gate.grad / gate, gate.grad[0] / gate[0])


def test_the_step_that_it_watches_is_the_one_of_the_dynamics() -> None:
    slow = Feedback()
    slow.step = 0.5
    gain = apply(ap.GateHinge(), settled(slow, X))["jacobian_gain"]
    assert gain == pytest.approx(1 - 0.5 * (1 - 0.8), rel=1e-9)


def test_descending_it_brings_the_slowest_sample_to_the_margin_and_no_further() -> None:
    block, hinge = settled(Feedback(), X), ap.GateHinge(target=0.4)
    optimiser = torch.optim.SGD(block.parameters(), lr=0.3)
    for step in range(0, 400, 2):
        block(X).sum().backward()
        block.zero_grad()
        gain = apply(hinge, block, step)["jacobian_gain"]
        optimiser.step()
    assert gain == pytest.approx(0.4, rel=0.02)
    assert not apply(hinge, block, 1) and apply(hinge, block, 1, urgent=True)


def test_a_state_solved_to_the_last_digit_is_not_pushed() -> None:
    block = settled(Feedback(), X, tol=1e-15)
    assert apply(ap.GateHinge(target=1e-3), block) == {"jacobian_gain": 0.0}
    assert not block.dynamics.gate.grad.any()


def test_only_the_gate_of_a_block_is_turned_and_a_lost_state_turns_nothing() -> None:
    this, hinge = gated(gate=0.9), ap.GateHinge(target=1e-3)
    block = this.block(ap.Implicit(), solver=ap.FixedPoint(tol=1e-2))
    this.cost(block(this.x)).backward()
    block.zero_grad()
    assert apply(hinge, block)["jacobian_gain"] > 1e-3
    assert [n for n, p in block.named_parameters() if p.grad is not None] == ["dynamics.alpha"]
    block.zero_grad()
    lost = torch.full_like(block.certificate.state, torch.nan)
    block.certificate = replace(block.certificate, state=lost)
    apply(hinge, block)
    assert block.dynamics.alpha.grad is None


def test_a_dynamics_without_a_gate_is_refused() -> None:
    block = settled(ap.DampedAttention(4, heads=1).double(), torch.randn(2, 3, 4).double())
    with pytest.raises(ap.RuleError, match="DampedAttention has none: write JacobianHinge"):
        apply(ap.GateHinge(), block)


@pytest.mark.parametrize(("field", "value"), [("target", 0), ("weight", -1), ("every", 1.5)])
def test_numbers_that_make_no_hinge_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ap.ConfigError, match=f"GateHinge: {field} is {value}, expected"):
        ap.GateHinge(**{field: value})

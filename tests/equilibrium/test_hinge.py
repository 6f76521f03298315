"""The Jacobian hinge: its gradient, what it measures of a call, and when it does nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from altprop.equilibrium.hinge import HingeState
from systems import SymmetricMemory, System, damped, gated, jacobian, task


def prepared(this: System) -> ap.Equilibrium:
    """Return a block after one backward pass, without gradients."""
    block = this.block(ap.Implicit(tol=1e-9, max_steps=300))
    this.cost(block(this.x)).backward()
    block.zero_grad()
    return block


def blind(this: System) -> ap.Equilibrium:
    """Return a prepared block whose backward pass left no direction to look along."""
    block = prepared(this)
    block.certificate = replace(block.certificate, adjoint_remainder=None)
    return block


def fresh(hinge: ap.JacobianHinge, seed: int = 0) -> HingeState:
    return hinge.init(torch.Generator().manual_seed(seed))


def gain(
    hinge: ap.JacobianHinge, block: nn.Module, state: HingeState | None = None, step: int = 0
) -> float:
    return hinge.apply(block, state or fresh(hinge), step)["jacobian_gain"]


def gradients(block: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}


def mapped_jacobian(block: ap.Equilibrium) -> list[Tensor]:
    """Return `∂g/∂z = 1 + ε ∂F/∂z` at the last state, one matrix per sample."""
    seen, dynamics = block.certificate, block.dynamics
    return [
        torch.eye(z[0].numel()).to(z) + dynamics.step * jacobian(dynamics, z, x)
        for z, x in zip(seen.state.split(1), seen.input.split(1), strict=True)
    ]


def own_blocks(block: ap.Equilibrium) -> list[list[Tensor]]:
    """Return the blocks on the diagonal of `J_g`, one per token of each sample."""
    width = block.certificate.state.shape[2]
    return [
        [m[t : t + width, t : t + width] for t in range(0, len(m), width)]
        for m in mapped_jacobian(block)
    ]


@pytest.mark.parametrize(
    "margins",
    [{"target": 0.05, "token_target": None}, {"target": 1e9, "token_target": 0.05}],
    ids=["samples", "tokens"],
)
@pytest.mark.parametrize("this", [damped(B=1), gated(gate=0.9, B=1)], ids=["damped", "gated"])
def test_its_gradient_is_that_of_the_penalty(this: System, margins: dict[str, Any]) -> None:
    """Central differences of `w · every · max(0, ρ − τ)²`, state, input and probe held constant."""
    hinge = ap.JacobianHinge(**margins, every=2, weight=1.5, power=0)
    block = prepared(this)

    def penalty() -> float:
        return 1.5 * 2 * (gain(hinge, block) - 0.05) ** 2

    penalty()
    got = gradients(block)
    # (a constant that is added to the force is no part of its Jacobian)
    assert dict(block.named_parameters()).keys() - got.keys() <= {"dynamics.down.bias"}
    with torch.no_grad():
        for name, p in block.named_parameters():
            direction = torch.randn_like(p)
            direction /= direction.norm()
            ends = []
            for move in (1e-5, -2e-5):
                p += move * direction
                ends.append(penalty())
            p += 1e-5 * direction
            push = got.get(name, torch.zeros_like(p))
            slope, wanted = (ends[0] - ends[1]) / 2e-5, float((push * direction).sum())
            assert abs(slope - wanted) <= 1e-6 * (float(push.norm()) or 1.0), name


def test_the_push_of_a_batch_is_the_mean_of_its_samples_pushes() -> None:
    this, hinge = gated(B=4, gate=0.9), ap.JacobianHinge(target=0.203, token_target=None)
    block = prepared(this)
    z, x = block.certificate.state, block.certificate.input
    probes = torch.randn(z.shape, dtype=z.dtype)
    remainders = block.certificate.adjoint_remainder

    def push(rows: slice) -> tuple[float, dict[str, Tensor]]:
        block.zero_grad()
        block(x[rows])
        block.certificate = replace(block.certificate, adjoint_remainder=remainders[rows])
        state = fresh(hinge)
        state.probes[""] = probes[rows]
        return gain(hinge, block, state), gradients(block)

    gains, pushes = zip(*(push(slice(b, b + 1)) for b in range(4)), strict=True)
    largest, pushed = push(slice(None))
    assert largest == pytest.approx(max(gains), rel=1e-9)
    assert min(gains) < 0.203 < max(gains)  # some are pushed and some are not
    for name, got in pushed.items():
        wanted = sum(own.get(name, torch.zeros_like(got)) for own in pushes) / 4
        assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-9 * float(wanted.abs().max())), name


class Scaled(ap.AbstractDynamics):
    """`F = (x ⊙ z) W − z + 1`: a sample's gain is as large as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.eye(6, dtype=torch.float64))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return (x * z) @ self.W - z + 1


def test_an_outlier_that_the_batch_hides_is_found_and_pushed_back() -> None:
    block = ap.Equilibrium(
        Scaled(), ap.FixedPoint(tol=1e-10, max_steps=1000), ap.Implicit(1e-8, 1000)
    )
    x = torch.full((16, 6), 0.1, dtype=torch.float64)
    x[11] = 0.9

    def settle() -> None:
        block(x).sum().backward()
        block.zero_grad()

    settle()
    block.certificate = replace(block.certificate, adjoint_remainder=None)
    assert gain(ap.JacobianHinge(target=0.4, per="batch", power=0), block) < 0.4
    assert not gradients(block)
    hinge = ap.JacobianHinge(target=0.4)
    optimiser = torch.optim.SGD(block.parameters(), lr=0.3)
    gains, state = [], fresh(hinge)
    for step in range(0, 300, 2):
        settle()
        gains.append(gain(hinge, block, state, step))
        optimiser.step()
    assert gains[0] == pytest.approx(0.9) and max(gains[-20:]) < 0.43


@pytest.mark.parametrize("this", [damped(), gated(gate=0.9)], ids=["damped", "gated"])
@pytest.mark.parametrize("power", [0, 1, 3])
def test_power_steps_turn_the_probes_of_windows_and_of_tokens_before_they_are_measured(
    this: System, power: int
) -> None:
    hinge = ap.JacobianHinge(target=1e9, token_target=1e9, power=power)
    block = blind(this)
    probe = torch.randn_like(block.certificate.state)

    def largest(maps: list[Tensor], starts: list[Tensor]) -> float:
        turned = [
            torch.linalg.matrix_power(m.mT, power) @ v for m, v in zip(maps, starts, strict=True)
        ]
        return max(float((m.mT @ v).norm() / v.norm()) for m, v in zip(maps, turned, strict=True))

    tokens = [m for own in own_blocks(block) for m in own]
    for name, maps, starts in (
        ("", mapped_jacobian(block), list(probe.flatten(1))),
        (".tokens", tokens, list(probe.flatten(0, 1))),
    ):
        state = fresh(hinge)
        state.probes = {"": torch.zeros_like(probe), ".tokens": torch.zeros_like(probe)}
        state.probes[name] = probe
        assert gain(hinge, block, state) == pytest.approx(largest(maps, starts), rel=1e-9)


def test_each_application_goes_on_with_the_direction_that_the_last_one_found() -> None:
    block = blind(gated(B=1, gate=0.9))
    hinge = ap.JacobianHinge(target=1e9, power=0, token_target=None, fresh=0.0, every=1)
    state, m = fresh(hinge), mapped_jacobian(block)[0].mT
    state.probes[""] = torch.randn_like(block.certificate.state)
    v = state.probes[""].flatten()
    for step in range(4):
        wanted = float((m @ v).norm() / v.norm())
        assert gain(hinge, block, state, step) == pytest.approx(wanted, rel=1e-9)
        v = m @ v


def test_it_looks_along_the_probe_and_the_remainder_alike_however_small_that_is() -> None:
    hinge = ap.JacobianHinge(target=1e9, every=1, power=0, token_target=None)
    block = prepared(damped(B=1))
    probe, remainder = torch.randn(2, *block.certificate.state.shape, dtype=torch.float64)
    state = fresh(hinge)
    state.probes[""] = probe
    block.certificate = replace(block.certificate, adjoint_remainder=1e-6 * remainder)
    v = probe / probe.norm() + remainder / remainder.norm()
    wanted = mapped_jacobian(block)[0].mT @ (v / v.norm()).flatten()
    assert gain(hinge, block, state) == pytest.approx(float(wanted.norm()), rel=1e-5)


def test_it_needs_no_remainder() -> None:
    this, hinge = gated(), ap.JacobianHinge(target=0.01)
    block = this.block()
    with torch.no_grad():
        block(this.x)
    assert block.certificate.adjoint_remainder is None
    without = gain(hinge, block)
    assert math.isfinite(without) and gradients(block)
    # an adjoint that was solved to the last digit leaves nothing, which is no direction either
    nothing = torch.zeros_like(block.certificate.state)
    block.certificate = replace(block.certificate, adjoint_remainder=nothing)
    assert gain(hinge, block) == pytest.approx(without)


def test_tokens_are_looked_at_where_the_dynamics_tells_them_apart() -> None:
    for this, tells in ((task(SymmetricMemory(6, 3), B=2, T=3), False), (gated(gate=0.9), True)):
        block, pushed = prepared(this), []
        for hinge in (ap.JacobianHinge(token_target=1e-3), ap.JacobianHinge(token_target=None)):
            block.zero_grad()
            gain(hinge, block)
            pushed.append(gradients(block).keys())
        assert (pushed[0] != pushed[1]) == tells


def test_a_token_that_excites_itself_is_found_in_a_quiet_window() -> None:
    torch.manual_seed(0)
    dynamics = ap.GatedBlock(8, heads=2, expansion=2, init_std=0.3).double()
    nn.init.constant_(dynamics.alpha, 0.3)
    block = ap.Equilibrium(dynamics, ap.FixedPoint(tol=1e-9), ap.Implicit(1e-9))
    block(torch.randn(8, 40, 8, dtype=torch.float64)).sum().backward()
    radii = [torch.linalg.eigvals(m).abs().max() for own in own_blocks(block) for m in own]
    assert gain(ap.JacobianHinge(power=4), block) >= 0.9 * float(max(radii))


def settled_gains(block: ap.Equilibrium, steps: int) -> list[float]:
    """Return the gains of `steps` steps at one state, by the carried probe alone, once settled."""
    hinge = ap.JacobianHinge(every=1, fresh=0.0, target=1e6, token_target=None)
    state = fresh(hinge)
    return [gain(hinge, block, state) for _ in range(steps + 100)][100:]


@pytest.mark.parametrize(
    "this",
    [damped(B=1), gated(gate=0.9, B=1), task(SymmetricMemory(6, 3), B=2, T=3)],
    ids=["damped", "gated", "symmetric"],
)
def test_the_gain_converges_to_the_spectral_radius_in_the_mean(this: System) -> None:
    """The probe is iterated with `J_gᵀ`, not with `J_g J_gᵀ`: what lasts is what it finds."""
    block = blind(this)
    maps = mapped_jacobian(block)
    radius = max(float(torch.linalg.eigvals(m).abs().max()) for m in maps)
    largest = max(float(torch.linalg.matrix_norm(m, 2)) for m in maps)
    gains = settled_gains(block, 100)
    assert max(gains) <= largest * (1 + 1e-9)
    assert (radius < 0.99 * largest) == (not isinstance(this.dynamics, SymmetricMemory))
    mean = math.exp(sum(map(math.log, gains)) / len(gains))  # a complex pair makes them oscillate
    assert mean == pytest.approx(radius, rel=0.02)


def test_a_margin_may_move() -> None:
    block = prepared(gated(gate=0.9))
    found = gain(ap.JacobianHinge(), block)
    # at half the way it passes the gain
    hinge = ap.JacobianHinge(target=1.5 * found, start=0.5 * found, over=100, every=1)
    pushed = []
    for step in (0, 40, 49, 51, 100, 10_000):
        block.zero_grad()
        gain(hinge, block, step=step)
        pushed.append(bool(gradients(block)))
    assert pushed == [True, True, True, False, False, False]


def test_it_adds_to_the_gradients_that_are_there_and_nothing_below_the_margin() -> None:
    block, hinge = prepared(gated()), ap.JacobianHinge(target=0.05)
    assert 0 < gain(ap.JacobianHinge(target=1e3), block) < 1e3 and not gradients(block)
    gain(hinge, block)
    alone = gradients(block)
    for p in block.parameters():
        p.grad = torch.ones_like(p)
    gain(hinge, block)
    for name, g in gradients(block).items():
        assert torch.allclose(g, 1 + alone.get(name, torch.zeros_like(g)))


def test_it_acts_on_every_so_many_steps_and_rests_in_between() -> None:
    hinge = ap.JacobianHinge(target=0.01, every=3)
    block, state = prepared(gated()), fresh(ap.JacobianHinge())
    acted = []
    for step in range(7):
        block.zero_grad()
        before = state.generator.get_state()
        measured = hinge.apply(block, state, step)
        acted.append(bool(measured))
        assert bool(gradients(block)) == acted[-1]
        assert torch.equal(before, state.generator.get_state()) != acted[-1]
    assert acted == [True, False, False, True, False, False, True]
    assert hinge.apply(block, state, 1, urgent=True)  # a refused step is no time to rest


def test_at_a_closed_gate_there_is_no_nan_and_it_wakes_up_later() -> None:
    torch.manual_seed(0)
    dynamics = ap.GatedBlock(8, heads=2, init_std=0.5)
    block, hinge = ap.Equilibrium(dynamics), ap.JacobianHinge(target=0.3, every=1)
    state, x = fresh(hinge), torch.randn(2, 5, 8)

    def measured() -> float:
        block(x).sum().backward()
        block.zero_grad()
        return gain(hinge, block, state)

    for _ in range(3):
        assert measured() <= 1e-5 and not gradients(block)
        assert all(p.isfinite().all() for p in state.probes.values())
    nn.init.constant_(dynamics.alpha, 0.8)
    assert max(measured() for _ in range(5)) > 0.3
    assert float(dynamics.alpha.grad.sum()) > 0  # closes the gate


@pytest.mark.parametrize("what", ["state", "adjoint_remainder"])
def test_what_is_lost_on_one_step_does_not_disable_it_on_the_next(what: str) -> None:
    block, hinge = prepared(gated()), ap.JacobianHinge(target=0.01)
    state, good = fresh(hinge), block.certificate
    block.certificate = replace(good, **{what: torch.full_like(good.state, math.nan)})
    assert math.isnan(gain(hinge, block, state)) == (what == "state")
    assert all(g.isfinite().all() for g in gradients(block).values())
    for beside in (prepared(gated(seed=1)), block), (block, prepared(gated(seed=1))):
        worst = gain(hinge, nn.Sequential(*beside))  # of several blocks the lost one is told
        assert math.isnan(worst) == (what == "state")
    block.certificate = good
    assert gain(hinge, block, state) > 0.01 and gradients(block)


def test_frozen_blocks_and_untouched_models_are_left_alone() -> None:
    hinge = ap.JacobianHinge(target=0.01)
    assert hinge.apply(nn.Linear(2, 2), fresh(hinge), step=0) == {}
    assert hinge.apply(gated().block(), fresh(hinge), step=0) == {}  # never called
    block = prepared(gated())
    block.requires_grad_(False)
    assert gain(hinge, block) > 0.01
    block.dynamics.down.bias.requires_grad_(True)  # trainable, and without effect on the Jacobian
    gain(hinge, block)
    assert not any(g.any() for g in gradients(block).values())


def test_a_state_of_its_own_makes_it_repeatable_and_resumable() -> None:
    block, hinge = prepared(gated()), ap.JacobianHinge()
    state, twin = fresh(hinge), fresh(hinge)
    for step in (0, 2, 4):
        assert hinge.apply(block, state, step) == hinge.apply(block, twin, step)
    resumed = fresh(hinge, seed=9)
    resumed.load_state_dict(state.state_dict())
    assert hinge.apply(block, resumed, 6) == hinge.apply(block, state, 6)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"target": v} for v in (0, math.nan)),
        *({"weight": v} for v in (-1, None)),
        *({"every": v} for v in (0, 1.5)),
        *({"fresh": v} for v in (-0.1, math.inf)),
        *({"power": v} for v in (-1, 0.5)),
        *({"per": v} for v in ("layer", 1)),
        {"start": 0.5},
        {"over": 10},
        {"start": -1.0, "over": 10},
    ],
    ids=str,
)
def test_numbers_that_make_no_hinge_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ap.ConfigError, match=f"JacobianHinge: ({'|'.join(wrong)}|start) is"):
        ap.JacobianHinge(**wrong)

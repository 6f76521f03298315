"""The Jacobian hinge: its gradient, its guards, and when it does nothing."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import altprop as ap
from altprop.equilibrium.hinge import HingeState
from helpers import SymmetricMemory, Task, damped, gated, jacobian, task

MINUTE = timedelta(minutes=1)


def prepared(this: Task, estimator: ap.AbstractEstimator | None = None) -> ap.Equilibrium:
    """Return a block after one backward pass, without gradients."""
    block = this.block(estimator or ap.Implicit(tol=1e-9, max_steps=300))
    this.cost(block(this.x)).backward()
    block.zero_grad()
    return block


def fresh(hinge: ap.JacobianHinge, seed: int = 0) -> HingeState:
    return hinge.init(torch.Generator().manual_seed(seed))


def gradients(block: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in block.named_parameters() if p.grad is not None}


def mapped_jacobian(block: ap.Equilibrium) -> list[Tensor]:
    """Return `∂g/∂z = 1 + ε ∂F/∂z` at the last state, one matrix per sample."""
    seen, dynamics = block.certificate, block.dynamics
    return [
        torch.eye(z[0].numel()).to(z) + dynamics.step * jacobian(dynamics, z, x)
        for z, x in zip(seen.state.split(1), seen.input.split(1), strict=True)
    ]


SAMPLES: dict[str, Any] = {"target": 0.05, "token_target": None}
TOKENS: dict[str, Any] = {"target": 1e9, "token_target": 0.05}


@pytest.mark.parametrize("margins", [SAMPLES, TOKENS], ids=["samples", "tokens"])
@pytest.mark.parametrize("this", [damped(B=1), gated(gate=0.9, B=1)], ids=["damped", "gated"])
def test_its_gradient_is_that_of_the_penalty(this: Task, margins: dict[str, Any]) -> None:
    """Central differences of `w · every · max(0, ρ − τ)²`, state, input and probe held constant."""
    hinge = ap.JacobianHinge(**margins, every=2, weight=1.5, power=0)
    block = prepared(this)

    def penalty() -> float:
        gain = hinge.apply(block, fresh(hinge), step=0)["jacobian_gain"]
        return 1.5 * 2 * (gain - 0.05) ** 2

    penalty()
    got = {name: g.clone() for name, g in gradients(block).items()}
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
            slope = (ends[0] - ends[1]) / 2e-5
            wanted = float((got[name] * direction).sum()) if name in got else 0.0
            size = float(got[name].norm()) if name in got else 1.0
            assert abs(slope - wanted) <= 1e-6 * size, name


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
        gain = hinge.apply(block, state, step=0)["jacobian_gain"]
        return gain, {name: g.clone() for name, g in gradients(block).items()}

    gains, pushes = zip(*(push(slice(b, b + 1)) for b in range(4)), strict=True)
    gain, pushed = push(slice(None))
    assert gain == pytest.approx(max(gains), rel=1e-9)
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
    block(x).sum().backward()
    block.zero_grad()
    block.certificate = replace(block.certificate, adjoint_remainder=None)
    mean = ap.JacobianHinge(target=0.4, per="batch", power=0)
    assert mean.apply(block, fresh(mean), step=0)["jacobian_gain"] < 0.4
    assert not gradients(block)
    hinge = ap.JacobianHinge(target=0.4)
    optimiser = torch.optim.SGD(block.parameters(), lr=0.3)
    gains, state = [], fresh(hinge)
    for step in range(0, 300, 2):
        block(x).sum().backward()
        block.zero_grad()
        gains.append(hinge.apply(block, state, step)["jacobian_gain"])
        optimiser.step()
    assert gains[0] == pytest.approx(0.9) and max(gains[-20:]) < 0.43


def own_blocks(block: ap.Equilibrium) -> list[list[Tensor]]:
    """Return the blocks on the diagonal of `J_g`, one per token of each sample."""
    width = block.certificate.state.shape[2]
    return [
        [m[t : t + width, t : t + width] for t in range(0, len(m), width)]
        for m in mapped_jacobian(block)
    ]


@pytest.mark.parametrize("this", [damped(), gated(gate=0.9)], ids=["damped", "gated"])
@pytest.mark.parametrize("power", [0, 1, 3])
def test_a_token_has_a_gain_of_its_own(this: Task, power: int) -> None:
    hinge = ap.JacobianHinge(target=1e9, token_target=1e9, power=power)
    block, state = prepared(this), fresh(hinge)
    probe = torch.randn_like(block.certificate.state)
    state.probes[".tokens"] = probe
    state.probes[""] = torch.zeros_like(probe)  # and of the window as a whole nothing
    block.certificate = replace(block.certificate, adjoint_remainder=None)
    wanted = 0.0
    for blocks, vs in zip(own_blocks(block), probe, strict=True):
        for own, start in zip(blocks, vs, strict=True):
            v = torch.linalg.matrix_power(own.mT, power) @ start
            wanted = max(wanted, float((own.mT @ v).norm() / v.norm()))
    got = hinge.apply(block, state, step=0)["jacobian_gain"]
    assert got == pytest.approx(wanted, rel=1e-9)


def test_the_tokens_own_blocks_have_the_whole_windows_radius() -> None:
    block = prepared(gated(gate=0.9))
    for own, whole in zip(own_blocks(block), mapped_jacobian(block), strict=True):
        radius = max(float(torch.linalg.eigvals(m).abs().max()) for m in own)
        assert radius == pytest.approx(float(torch.linalg.eigvals(whole).abs().max()), rel=1e-6)


def test_tokens_are_looked_at_where_the_dynamics_tells_them_apart() -> None:
    for this, tells in ((task(SymmetricMemory(6, 3), B=2, T=3), False), (gated(gate=0.9), True)):
        block, pushed = prepared(this), []
        for hinge in (ap.JacobianHinge(token_target=1e-3), ap.JacobianHinge(token_target=None)):
            block.zero_grad()
            hinge.apply(block, fresh(hinge), step=0)
            pushed.append({name: g.clone() for name, g in gradients(block).items()})
        assert (pushed[0].keys() != pushed[1].keys()) == tells


def test_a_token_that_excites_itself_is_found_in_a_quiet_window() -> None:
    torch.manual_seed(0)
    dynamics = ap.GatedBlock(8, heads=2, expansion=2, init_std=0.3).double()
    nn.init.constant_(dynamics.alpha, 0.3)
    block = ap.Equilibrium(dynamics, ap.FixedPoint(tol=1e-9), ap.Implicit(1e-9))
    x = torch.randn(16, 40, 8, dtype=torch.float64)
    block(x).sum().backward()
    radii = [
        max(float(torch.linalg.eigvals(m).abs().max()) for m in own) for own in own_blocks(block)
    ]
    hinge = ap.JacobianHinge(power=4)
    got = hinge.apply(block, fresh(hinge), step=0)["jacobian_gain"]
    assert got >= 0.9 * max(radii)


def test_a_margin_may_move() -> None:
    block = prepared(gated(gate=0.9))
    gain = ap.JacobianHinge().apply(block, fresh(ap.JacobianHinge()), step=0)["jacobian_gain"]
    # at half the way it passes the gain
    hinge = ap.JacobianHinge(target=0.5 * gain, final=1.5 * gain, over=100, every=1)
    pushed = []
    for step in (0, 40, 49, 51, 100, 10_000):
        block.zero_grad()
        hinge.apply(block, fresh(hinge), step)
        pushed.append(bool(gradients(block)))
    assert pushed == [True, True, True, False, False, False]
    for given in ({"final": 0.5}, {"over": 10}, {"final": -1.0, "over": 10}):
        with pytest.raises(ap.ConfigError, match="JacobianHinge: (final|over) is"):
            ap.JacobianHinge(**given)


def test_power_steps_turn_the_probe_before_it_is_measured() -> None:
    block = prepared(gated(B=1, gate=0.9))
    block.certificate = replace(block.certificate, adjoint_remainder=None)
    probe = torch.randn_like(block.certificate.state)
    m = mapped_jacobian(block)[0].mT
    for power in range(4):
        hinge = ap.JacobianHinge(target=1e9, power=power, token_target=None)
        state = fresh(hinge)
        state.probes[""] = probe
        v = torch.linalg.matrix_power(m, power) @ probe.flatten()
        wanted = (m @ v).norm() / v.norm()
        got = hinge.apply(block, state, step=0)["jacobian_gain"]
        assert got == pytest.approx(float(wanted), rel=1e-9)


def test_each_application_goes_on_with_the_direction_that_the_last_one_found() -> None:
    block = prepared(gated(B=1, gate=0.9))
    block.certificate = replace(block.certificate, adjoint_remainder=None)
    hinge = ap.JacobianHinge(target=1e9, power=0, token_target=None, fresh=0.0, every=1)
    state, m = fresh(hinge), mapped_jacobian(block)[0].mT
    state.probes[""] = torch.randn_like(block.certificate.state)
    v = state.probes[""].flatten()
    for step in range(4):
        wanted = (m @ v).norm() / v.norm()
        got = hinge.apply(block, state, step=step)["jacobian_gain"]
        assert got == pytest.approx(float(wanted), rel=1e-9)
        v = m @ v


def test_it_adds_to_the_gradients_that_are_there() -> None:
    hinge = ap.JacobianHinge(target=0.05)
    block = prepared(gated())
    hinge.apply(block, fresh(hinge), step=0)
    alone = {name: g.clone() for name, g in gradients(block).items()}
    for p in block.parameters():
        p.grad = torch.ones_like(p)
    hinge.apply(block, fresh(hinge), step=0)
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


def test_it_does_nothing_below_the_margin() -> None:
    hinge = ap.JacobianHinge(target=1e3)
    block = prepared(gated())
    gain = hinge.apply(block, fresh(hinge), step=0)["jacobian_gain"]
    assert 0 < gain < 1e3 and not gradients(block)


def settled_gains(block: ap.Equilibrium, steps: int) -> list[float]:
    """Return the gains of `steps` steps at one state, by the carried probe alone, once settled."""
    hinge = ap.JacobianHinge(every=1, fresh=0.0, target=1e6, token_target=None)
    state = fresh(hinge)
    block.certificate = replace(block.certificate, adjoint_remainder=None)
    gains = [hinge.apply(block, state, 0)["jacobian_gain"] for _ in range(steps + 100)]
    return gains[100:]


def test_the_gain_converges_to_the_largest_singular_value_of_a_symmetric_map() -> None:
    block = prepared(task(SymmetricMemory(6, 3), B=2, T=3))
    largest = max(float(torch.linalg.matrix_norm(m, 2)) for m in mapped_jacobian(block))
    assert settled_gains(block, 10) == pytest.approx([largest] * 10, rel=1e-3)


@pytest.mark.parametrize("this", [damped(B=1), gated(gate=0.9, B=1)], ids=["damped", "gated"])
def test_the_gain_converges_to_the_spectral_radius_of_any_map_in_the_mean(this: Task) -> None:
    """The probe is iterated with `J_gᵀ`, not with `J_g J_gᵀ`: what lasts is what it finds."""
    block = prepared(this)
    maps = mapped_jacobian(block)
    radius = max(float(torch.linalg.eigvals(m).abs().max()) for m in maps)
    largest = max(float(torch.linalg.matrix_norm(m, 2)) for m in maps)
    gains = settled_gains(block, 100)
    assert max(gains) <= largest * (1 + 1e-9) and radius < 0.99 * largest
    mean = math.exp(sum(map(math.log, gains)) / len(gains))  # a complex pair makes them oscillate
    assert mean == pytest.approx(radius, rel=0.02)


def test_at_a_closed_gate_there_is_no_nan_and_it_wakes_up_later() -> None:
    torch.manual_seed(0)
    dynamics = ap.GatedBlock(8, heads=2, init_std=0.5)
    block = ap.Equilibrium(dynamics, estimator=ap.AEP())
    hinge = ap.JacobianHinge(target=0.3, every=1)
    state, x = fresh(hinge), torch.randn(2, 5, 8)
    for _ in range(3):
        block(x).sum().backward()
        block.zero_grad()
        assert hinge.apply(block, state, 0)["jacobian_gain"] <= 1e-5
        assert not gradients(block) and all(p.isfinite().all() for p in state.probes.values())
    nn.init.constant_(dynamics.alpha, 0.8)
    for _ in range(5):
        block(x).sum().backward()
        block.zero_grad()
        gain = hinge.apply(block, state, 0)["jacobian_gain"]
    assert gain > 0.3
    push = dynamics.alpha.grad
    assert push is not None and push.isfinite().all() and float(push.sum()) > 0  # closes the gate


def test_it_needs_no_remainder() -> None:
    this = gated()
    block = this.block()
    with torch.no_grad():
        block(this.x)
    assert block.certificate.adjoint_remainder is None
    hinge = ap.JacobianHinge(target=0.01)
    without = hinge.apply(block, fresh(hinge), step=0)["jacobian_gain"]
    assert math.isfinite(without) and gradients(block)
    # an adjoint that was solved to the last digit leaves nothing, which is no direction either
    nothing = torch.zeros_like(block.certificate.state)
    block.certificate = replace(block.certificate, adjoint_remainder=nothing)
    assert hinge.apply(block, fresh(hinge), step=0)["jacobian_gain"] == pytest.approx(without)


def test_a_remainder_steers_the_probe() -> None:
    block = prepared(gated())
    hinge = ap.JacobianHinge()
    steered = hinge.apply(block, fresh(hinge), step=0)["jacobian_gain"]
    block.certificate = replace(block.certificate, adjoint_remainder=None)
    assert hinge.apply(block, fresh(hinge), step=0)["jacobian_gain"] != steered


def test_it_looks_along_the_probe_and_the_remainder_alike_however_small_that_is() -> None:
    hinge = ap.JacobianHinge(target=1e9, every=1, power=0, token_target=None)
    block = prepared(damped(B=1))
    probe, remainder = torch.randn(2, *block.certificate.state.shape, dtype=torch.float64)
    state = fresh(hinge)
    state.probes[""] = probe
    block.certificate = replace(block.certificate, adjoint_remainder=1e-6 * remainder)
    v = probe / probe.norm() + remainder / remainder.norm()
    wanted = mapped_jacobian(block)[0].mT @ (v / v.norm()).flatten()
    got = hinge.apply(block, state, step=0)["jacobian_gain"]
    assert got == pytest.approx(float(wanted.norm()), rel=1e-5)


@pytest.mark.parametrize("what", ["state", "adjoint_remainder"])
def test_what_is_lost_on_one_step_does_not_disable_it_on_the_next(what: str) -> None:
    block = prepared(gated())
    hinge = ap.JacobianHinge(target=0.01)
    state, good = fresh(hinge), block.certificate
    block.certificate = replace(good, **{what: torch.full_like(good.state, math.nan)})
    gain = hinge.apply(block, state, step=0)["jacobian_gain"]
    assert math.isnan(gain) == (what == "state")
    assert all(g.isfinite().all() for g in gradients(block).values())
    block.certificate = good
    assert hinge.apply(block, state, step=0)["jacobian_gain"] > 0.01 and gradients(block)


def test_one_lost_block_among_several_is_the_gain_that_is_reported() -> None:
    for lost in (0, 1):
        blocks = nn.Sequential(prepared(gated()), prepared(gated(seed=1)))
        bad = blocks[lost]
        bad.certificate = replace(
            bad.certificate, state=torch.full_like(bad.certificate.state, math.nan)
        )
        hinge = ap.JacobianHinge()
        assert math.isnan(hinge.apply(blocks, fresh(hinge), step=0)["jacobian_gain"])


def test_frozen_blocks_and_untouched_models_are_left_alone() -> None:
    hinge = ap.JacobianHinge(target=0.01)
    assert hinge.apply(nn.Linear(2, 2), fresh(hinge), step=0) == {}
    assert hinge.apply(gated().block(), fresh(hinge), step=0) == {}  # never called
    block = prepared(gated())
    block.requires_grad_(False)
    assert hinge.apply(block, fresh(hinge), step=0)["jacobian_gain"] > 0.01
    block.dynamics.down.bias.requires_grad_(True)  # trainable, and without effect on the Jacobian
    hinge.apply(block, fresh(hinge), step=0)
    assert not any(g.any() for g in gradients(block).values())


def test_a_state_of_its_own_makes_it_repeatable_and_resumable() -> None:
    block, hinge = prepared(gated()), ap.JacobianHinge()
    state, twin = fresh(hinge), fresh(hinge)
    for step in (0, 2, 4):
        assert hinge.apply(block, state, step) == hinge.apply(block, twin, step)
    resumed = fresh(hinge, seed=9)
    resumed.load_state_dict(state.state_dict())
    assert hinge.apply(block, resumed, 6) == hinge.apply(block, state, 6)


def rank_push(rank: int, store: str) -> None:
    """Take part as one of two ranks, of which only the first is past the margin."""
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(store, 2), rank=rank, world_size=2, timeout=MINUTE
    )
    try:
        block, hinge = prepared(gated()), ap.JacobianHinge(target=0.01)
        hinge.apply(block, fresh(hinge), step=0)
        alone = {name: g.clone() for name, g in gradients(block).items()}
        block.zero_grad()
        if rank == 1:
            hinge = ap.JacobianHinge(target=1e3)
        hinge.apply(nn.parallel.DistributedDataParallel(block), fresh(hinge), step=0)
        for name, p in block.named_parameters():
            wanted = alone[name] / 2 if name in alone else torch.zeros_like(p)
            # a difference over a step of 6e-6 magnifies what rounding differs by between processes
            assert p.grad is not None and (p.grad - wanted).norm() <= 1e-8 * wanted.norm(), name
    finally:
        distributed.destroy_process_group()


def test_ranks_of_a_data_parallel_run_share_the_push(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    code = f"from {__name__} import rank_push; rank_push(1, {store!r})"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    other = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    try:
        rank_push(0, store)
        assert other.wait(timeout=60) == 0
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize(
    ("field", "value"),
    [("target", 0), ("target", math.nan), ("weight", -1), ("every", 0), ("every", 1.5)]
    + [
        ("fresh", -0.1),
        ("fresh", math.inf),
        ("power", -1),
        ("power", 0.5),
        ("per", "layer"),
        ("per", 1),
    ],
)
def test_numbers_that_make_no_hinge_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ap.ConfigError, match=f"JacobianHinge: {field} is {value!r}, expected"):
        ap.JacobianHinge(**{field: value})

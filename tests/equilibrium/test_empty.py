"""Batches without samples and windows without tokens: as torch's modules, nothing and zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import altprop as ap

PLAIN = ap.Euler(step=0.5, max_steps=5)
SOLVERS = [
    ap.Anderson(),
    PLAIN,
    ap.Euler(step=0.5, max_steps=50, tol=1e-4),
    ap.NewtonKrylov(),
    ap.Adaptive(),
    ap.Scattered(),
    ap.Fallback(),
]
ESTIMATORS = [
    ap.AEP(),
    ap.AEP(start="zero", sides=4),
    ap.AEP(linearise="tracking"),
    ap.AEP(nudge="cost"),
    ap.EP(sides=1),
    ap.Implicit(),
    ap.Implicit(solver=ap.GMRES()),
    ap.OneStep(k=3, certify=True),
    ap.DyadicEP(),
    ap.HolomorphicEP(),
    ap.PublishedEP(),
    ap.PublishedAEP(),
    ap.BPTT(),
]


def blocks() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]


def own() -> ap.AbstractDynamics:
    W = nn.Linear(8, 8)
    return ap.from_function(lambda z, x: x - z + 0.1 * torch.tanh(W(z)), W)


KINDS: dict[str, Callable[[], ap.AbstractDynamics]] = {
    "damped": lambda: ap.DampedAttention(8, 2),
    "gated": lambda: ap.GatedBlock(8, 2),
    "thick": lambda: ap.ThickBlock(8, 2, norm="rms", qk_norm=True, channel_gain=True),
    "memory": lambda: ap.HopfieldMemory(8),
    "layered": lambda: ap.Layered(blocks()),
    "side by side": lambda: ap.Layered(blocks(), phases="synchronous"),
    "own": own,
}
ANALYTIC = ("damped", "gated", "thick")
SHAPES = [(0, 5, 8), (3, 0, 8)]
LONG = (0, 700, 8)  # to attention


def cost(z: Tensor) -> Tensor:
    return z.square().sum()


def check(block: ap.Equilibrium, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    block.zero_grad()
    z = block(x, cost=cost)
    assert z.shape == shape and block.certificate.result
    assert block.certificate.free_residual.shape == shape[:1]
    cost(z).backward()
    assert x.grad.shape == shape
    for name, p in block.named_parameters():
        assert p.grad is not None and not p.grad.any(), name
    with torch.no_grad():
        assert block(x).shape == shape


@pytest.mark.parametrize("kind", KINDS)
def test_every_estimator_gives_nothing_and_zero_gradients(kind: str) -> None:
    dynamics = KINDS[kind]()
    for estimator in ESTIMATORS:
        if isinstance(estimator, ap.HolomorphicEP) and kind not in ANALYTIC:
            continue
        for shape in SHAPES:
            check(ap.Equilibrium(dynamics, PLAIN, estimator), shape)
    check(ap.Equilibrium(dynamics), LONG)


@pytest.mark.parametrize("kind", KINDS)
def test_every_solver_does(kind: str) -> None:
    dynamics = KINDS[kind]()
    for solver in SOLVERS:
        for shape in SHAPES:
            check(ap.Equilibrium(dynamics, solver), shape)


@pytest.mark.parametrize("kind", ANALYTIC)
def test_a_cache_of_nothing_and_nothing_after_a_cache(kind: str) -> None:
    dynamics = KINDS[kind]()
    block = ap.Equilibrium(dynamics)
    nothing, cache = block.extend(torch.zeros(2, 0, 8))
    assert nothing.shape == (2, 0, 8)
    x = torch.randn(2, 3, 8)
    z, cache = block.extend(x, cache)
    assert torch.allclose(z, block(x), atol=1e-2)
    assert block.extend(x[:, :0], cache)[1].keys.shape == cache.keys.shape
    assert block.extend(x[:0], None)[0].shape == (0, 3, 8)


def test_a_hinge_without_samples_measures_nothing_and_keeps_its_probe() -> None:
    block, hinge = ap.Equilibrium(ap.DampedAttention(8, 2)), ap.JacobianHinge(target=1e-3, every=1)
    state, x = hinge.init(torch.Generator().manual_seed(0)), torch.randn(2, 3, 8)
    block(x).sum().backward()
    hinge.apply(block, state, 0)
    probe = state.probes[""].clone()
    block.zero_grad()
    for shape in SHAPES:
        block(torch.zeros(shape)).sum().backward()
        assert hinge.apply(block, state, 1) == {}
    assert torch.equal(state.probes[""], probe)
    assert not any(p.grad.any() for p in block.parameters())


def test_spectra_of_no_samples_are_empty_and_of_no_numbers_are_refused() -> None:
    dynamics = ap.DampedAttention(8, 2)
    none = torch.zeros(0, 5, 8)
    assert ap.spectrum(dynamics, none, none).abscissa.shape == (0,)
    assert ap.token_spectrum(dynamics, none, none).abscissa.shape == (0, 5)
    z = torch.zeros(3, 0, 8)
    for of in (ap.spectrum, ap.token_spectrum, ap.numerical_abscissa):
        with pytest.raises(ap.ConfigError, match="samples without numbers"):
            of(dynamics, z, z)


def test_an_empty_window_teaches_nothing_about_a_stacks_axes() -> None:
    """A stack whose blocks mix axis 0 keeps its samples on axis 1, whatever was empty between."""
    layer = nn.MultiheadAttention(8, 2)

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, h: Tensor) -> Tensor:
            return h + self.layer(h, h, h, need_weights=False)[0]

    stack = ap.Equilibrium(ap.Layered([Attend(), Attend()]))
    x = torch.randn(3, 2, 8)
    for shape in (x.shape, (3, 0, 8), x.shape):
        z = stack(torch.zeros(shape) if 0 in shape else x)
        z.sum().backward()
        assert z.shape == shape
    assert stack.certificate.adjoint_residual.shape == (2,)

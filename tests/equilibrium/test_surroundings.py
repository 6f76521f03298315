"""Batches without samples, windows without tokens, and a user's default device or dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from altprop.testing import check_dynamics
from systems import ESTIMATORS, PLAIN, SOLVERS


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


def fits(estimator: ap.AbstractEstimator, kind: str) -> bool:
    return kind in ANALYTIC or not isinstance(estimator, ap.HolomorphicEP)


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
def test_every_solver_and_estimator_gives_nothing_and_zero_gradients(kind: str) -> None:
    dynamics = KINDS[kind]()
    for shape in SHAPES:
        for estimator in ESTIMATORS:
            if fits(estimator, kind):
                check(ap.Equilibrium(dynamics, PLAIN, estimator), shape)
        for solver in SOLVERS:
            check(ap.Equilibrium(dynamics, solver), shape)
    check(ap.Equilibrium(dynamics), LONG)


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


# a default device or dtype changes where parameters are made, and nothing else


TRIALS = [(solver, ap.AEP()) for solver in SOLVERS]
TRIALS += [(ap.Euler(step=0.5, max_steps=5), estimator) for estimator in ESTIMATORS]
TRIALS += [(ap.Anderson(), ap.Implicit(solver=solver)) for solver in (ap.GMRES(), ap.Scattered())]


@pytest.fixture
def _defaults() -> Iterator[None]:
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def step(block: ap.Equilibrium, x: Tensor) -> list[Tensor]:
    """Return the gradients of one training step, stabiliser included, and the spectrum."""
    block.zero_grad()
    hinge = ap.JacobianHinge(target=1e-3, every=1)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(5)

    def cost(z: Tensor) -> Tensor:
        return z.square().sum()

    cost(block(leaf, cost=cost)).backward()
    hinge.apply(block, hinge.init(torch.Generator("cpu").manual_seed(0)), 0)
    found = ap.spectrum(block.certificate, dimension=4)
    return [leaf.grad, *(p.grad for p in block.parameters()), found.values]


@pytest.mark.usefixtures("_defaults")
@pytest.mark.parametrize("kind", KINDS)
def test_a_default_device_changes_no_step(kind: str) -> None:
    dynamics, x = KINDS[kind](), torch.randn(2, 3, 8)
    for solver, estimator in TRIALS:
        if not fits(estimator, kind):
            continue
        block = ap.Equilibrium(dynamics, solver, estimator, on_failure="accept")
        torch.set_default_device(None)
        wanted = step(block, x)
        torch.set_default_device("meta")  # where any tensor that is made without a device is lost
        for own, reference in zip(step(block, x), wanted, strict=True):
            assert own.device.type == "cpu"
            assert torch.equal(own, reference) or bool(reference.isnan().any())


@pytest.mark.usefixtures("_defaults")
@pytest.mark.parametrize("kind", KINDS)
def test_a_default_dtype_is_that_of_the_parameters_and_of_nothing_else(kind: str) -> None:
    torch.set_default_dtype(torch.float64)
    dynamics, x = KINDS[kind](), torch.randn(2, 3, 8)
    assert {p.dtype for p in dynamics.parameters()} == {torch.float64}
    ap.Equilibrium(dynamics)(x).sum().backward()
    dynamics.float()
    for solver, estimator in TRIALS[:9]:
        block = ap.Equilibrium(dynamics, solver, estimator, on_failure="accept")
        found = step(block, x.float())
        assert {t.dtype for t in found[:-1]} == {torch.float32}
        assert found[-1].dtype == torch.complex64 and block.certificate.state.dtype == torch.float32


@pytest.mark.usefixtures("_defaults")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_built_on_the_meta_device_relaxes_once_it_has_numbers(kind: str) -> None:
    torch.manual_seed(0)
    real, x = KINDS[kind](), torch.randn(2, 3, 8)
    with torch.device("meta"):
        empty = KINDS[kind]()
    assert all(p.is_meta for p in empty.parameters())
    with pytest.raises(ap.ConfigError, match="meta device, which has no numbers") as error:
        ap.Equilibrium(empty)(x.to("meta"))
    assert "\n" not in str(error.value)
    empty.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(ap.Equilibrium(empty)(x), ap.Equilibrium(real)(x))


@pytest.mark.usefixtures("_defaults")
def test_the_contract_of_dynamics_runs_under_a_default_device() -> None:
    dynamics, x = KINDS["damped"]().double(), torch.randn(2, 3, 8).double()
    torch.set_default_device("meta")
    check_dynamics(dynamics, x)

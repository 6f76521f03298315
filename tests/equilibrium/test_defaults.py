"""A default device or dtype of the user's changes where parameters are made, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_empty import ANALYTIC, ESTIMATORS, KINDS, SOLVERS
from torch import Tensor

import altprop as ap
from altprop.testing import check_dynamics

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
        if isinstance(estimator, ap.HolomorphicEP) and kind not in ANALYTIC:
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

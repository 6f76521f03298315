"""What a call is given: one number per sample as a state, and `None` for what is not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from systems import ESTIMATORS, PLAIN, SOLVERS, TIGHT, error, randn


class Masked(ap.AbstractDynamics):
    """`F = x − z + mask ⊙ a sin(z)`, which is analytic where there is no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([0.4], dtype=torch.float64))

    @property
    def gate(self) -> nn.Parameter:
        return self.alpha

    def forward(
        self, z: Tensor, x: Tensor, mask: Tensor | None = None, gain: float | None = 2.0
    ) -> Tensor:
        felt = self.alpha * z.sin() * (1.0 if gain is None else gain) / 2
        return x - z + (felt if mask is None else mask * felt)

    def analytic(self, z: Tensor, x: Tensor) -> Tensor:
        return x - z + self.alpha * z.sin()


TRIALS = [(solver, ap.AEP()) for solver in SOLVERS] + [(PLAIN, e) for e in ESTIMATORS]


@pytest.mark.parametrize(("solver", "estimator"), TRIALS, ids=str)
def test_a_state_of_one_number_per_sample_needs_no_axis(
    solver: ap.AbstractSolver, estimator: ap.AbstractEstimator
) -> None:
    dynamics, found = Masked(), []
    block = ap.Equilibrium(dynamics, solver, estimator, on_failure="accept")
    hinges = ap.JacobianHinge(target=1e-3, every=1), ap.GateHinge(target=1e-3, every=1)
    for shape in ((3,), (3, 1)):
        x = randn(3, seed=1).reshape(shape).requires_grad_()
        dynamics.zero_grad()
        cost = lambda z: z.square().sum()  # noqa: E731
        z = block(x, cost=cost)
        assert z.shape == shape and block.certificate.free_residual.shape == (3,)
        cost(z).backward()
        told = [z.flatten(), x.grad.flatten(), dynamics.alpha.grad.clone()]
        for hinge in hinges:
            state = hinge.init(torch.Generator().manual_seed(0))
            told.append(torch.tensor(hinge.apply(block, state, 0)["jacobian_gain"]))
        told += [dynamics.alpha.grad, ap.spectrum(block.certificate).abscissa]
        found.append(told)
    for own, wanted in zip(*found, strict=True):
        assert torch.allclose(own, wanted, rtol=1e-12, atol=1e-14)


NOTHING: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((None,), {}),
    ((), {"mask": None}),
    ((), {}),
]


@pytest.mark.parametrize(("args", "kwargs"), NOTHING)
def test_none_that_is_there_by_default_is_no_further_argument(args: Any, kwargs: Any) -> None:
    dynamics, x = Masked(), randn(3, 2, seed=1).requires_grad_()
    block = ap.Equilibrium(dynamics, TIGHT, ap.HolomorphicEP(tol=1e-9))
    z = block(x, *args, **kwargs)
    z.sum().backward()
    assert error(x.grad, 1 / (1 - dynamics.alpha * z.cos())) <= 1e-6
    assert block.certificate.system.samples(torch.tensor([True, False, True])) is not None


def test_what_is_no_default_is_a_further_argument() -> None:
    block = ap.Equilibrium(Masked(), TIGHT, ap.HolomorphicEP())
    x = randn(3, 2, seed=1).requires_grad_()
    whole, half = block(x), block(x, gain=None)
    assert not torch.allclose(whole, half)
    for args, kwargs in ([(torch.ones(2),), {}], [(None, None), {}], [(), {"gain": None}]):
        with pytest.raises(ap.RuleError, match="not with further arguments"):
            block(x, *args, **kwargs).sum().backward()
    asked = ap.from_function(lambda z, x, mask: x - z if mask is None else mask * (x - z))
    assert torch.allclose(ap.Equilibrium(asked)(x, None), x)

"""Solving a causal window's first tokens first saves evaluations and changes no gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import altprop as ap
from altprop.equilibrium.estimators.problem import Adjoint, Problem
from systems import System, error, worst

TIGHT = ap.Anderson(tol=1e-11, max_steps=400)


def window(prefix: int, width: int = 16) -> System:
    torch.manual_seed(0)
    dynamics = ap.DampedAttention(width, heads=2).double()
    dynamics.prefix = prefix
    x = torch.randn(3, 20, width, dtype=torch.float64)
    w = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)
    return System(dynamics, x, lambda z: (z * w).sum() + (z**2).sum(), TIGHT)


@pytest.mark.parametrize(
    "estimator",
    [ap.Implicit(tol=1e-9), ap.AEP(tol=1e-9), ap.AEP(tol=1e-9, start="zero")],
    ids=repr,
)
def test_the_state_and_the_gradient_stay(estimator: ap.AbstractEstimator) -> None:
    parts, whole = window(2), window(0)
    assert worst(parts.gradients(estimator), whole.gradients(estimator)) <= 1e-7
    block = parts.block(estimator)
    z = block(parts.x)
    assert error(z, whole.block()(whole.x)) <= 1e-8
    parts.cost(z).backward()
    assert float(block.certificate.adjoint_residual.max()) <= 1e-9


@dataclass(frozen=True)
class Checked(ap.AbstractEstimator):
    """Implicit differentiation that checks what its solution says of itself."""

    tol: float

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        found = ap.Implicit(tol=self.tol).adjoint(problem, cotangent)
        solved = found.value - problem.step * found.remainder  # what it was measured at
        residual = problem.linearise().vjp(solved) + cotangent
        assert torch.allclose(found.remainder, residual, rtol=1e-8, atol=1e-10)
        size = residual.flatten(1).norm(dim=1)
        assert found.residual is not None and torch.allclose(found.residual, size)
        assert float(size.max()) <= self.tol
        return found


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
def test_the_remainder_is_the_residual_of_the_whole_window(tol: float) -> None:
    window(2).gradients(Checked(tol=tol))


def test_it_saves_evaluations_where_attention_averages() -> None:
    x, counts = 0.02 * torch.randn(4, 64, 64), []
    for prefix in (0, 8):
        dynamics = window(prefix, 64).dynamics.float()
        block = ap.Equilibrium(dynamics, estimator=ap.Implicit())
        block(x).square().sum().backward()
        seen = block.certificate
        counts.append((seen.free_evaluations, seen.adjoint_evaluations))
    assert counts[1][0] <= counts[0][0] - 2 and counts[1][1] < 0.8 * counts[0][1]


def test_a_sample_without_a_cotangent_gets_none() -> None:
    x = torch.randn(2, 20, 16, requires_grad=True)
    ap.Equilibrium(window(2).dynamics.float(), estimator=ap.Implicit())(x)[0].sum().backward()
    assert float(x.grad[1].abs().max()) == 0 < float(x.grad[0].abs().max())


@pytest.mark.parametrize(
    ("solver", "tokens"),
    [(ap.Euler(0.3, 200, 1e-4), 20), (ap.Anderson(), 15), (ap.Anderson(tol=0, max_steps=9), 20)],
    ids=["a relaxation in time", "a short window", "a fixed number of steps"],
)
def test_others_solve_the_window_as_a_whole(solver: ap.AbstractSolver, tokens: int) -> None:
    this, seen = window(2).dynamics.float(), set()
    this.register_forward_hook(lambda _, given, __: seen.add(given[0].shape[1]))
    ap.Equilibrium(this, solver)(torch.randn(2, tokens, 16))
    assert seen == {tokens}

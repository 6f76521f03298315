"""Solving a causal window's first tokens first saves evaluations and changes no gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import altprop as ap
from altprop.equilibrium.estimators.problem import Adjoint, Problem

ESTIMATORS = [ap.Implicit(tol=1e-9), ap.AEP(tol=1e-9), ap.AEP(tol=1e-9, start="zero")]
TIGHT = ap.Anderson(tol=1e-11, max_steps=400)


def dynamics(
    prefix: int, dtype: torch.dtype = torch.float64, width: int = 16
) -> ap.DampedAttention:
    torch.manual_seed(0)
    made = ap.DampedAttention(width, heads=2).to(dtype)
    made.prefix = prefix
    return made


def gradient(block: ap.Equilibrium, x: Tensor) -> tuple[Tensor, list[Tensor], ap.Certificate]:
    x = x.clone().requires_grad_()
    z = block(x)
    parts = torch.autograd.grad(
        (z * torch.linspace(-1, 1, z.numel()).view(z.shape).to(z)).sum() + (z**2).sum(),
        [x, *block.parameters()],
    )
    assert block.certificate is not None
    return z.detach(), list(parts), block.certificate


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_the_state_and_the_gradient_stay(estimator: ap.AbstractEstimator) -> None:
    x = torch.randn(3, 20, 16, dtype=torch.float64)
    found, wanted = (gradient(ap.Equilibrium(dynamics(k), TIGHT, estimator), x) for k in (2, 0))
    assert torch.allclose(found[0], wanted[0], rtol=1e-8, atol=1e-9)
    for mine, theirs in zip(found[1], wanted[1], strict=True):
        assert float((mine - theirs).norm()) <= 1e-7 * float(theirs.norm())
    residual = found[2].adjoint_residual
    assert residual is not None and float(residual.max()) <= 1e-9


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
    x = torch.randn(3, 20, 16, dtype=torch.float64)
    gradient(ap.Equilibrium(dynamics(2), TIGHT, Checked(tol=tol)), x)


def test_it_saves_evaluations_where_attention_averages() -> None:
    x = 0.02 * torch.randn(4, 64, 64)
    counts = []
    for k in (0, 8):
        block = ap.Equilibrium(dynamics(k, x.dtype, 64), estimator=ap.Implicit())
        _, _, seen = gradient(block, x)
        counts.append((seen.free_evaluations, seen.adjoint_evaluations))
    assert counts[1][0] <= counts[0][0] - 2 and counts[1][1] < 0.8 * counts[0][1]


def test_a_sample_without_a_cotangent_gets_none() -> None:
    x = torch.randn(2, 20, 16, requires_grad=True)
    ap.Equilibrium(dynamics(2, x.dtype), estimator=ap.Implicit())(x)[0].sum().backward()
    assert x.grad is not None and float(x.grad[1].abs().max()) == 0 < float(x.grad[0].abs().max())


@pytest.mark.parametrize(
    ("solver", "tokens"),
    [(ap.Euler(0.3, 200, 1e-4), 20), (ap.Anderson(), 15), (ap.Anderson(tol=0, max_steps=9), 20)],
    ids=["a relaxation in time", "a short window", "a fixed number of steps"],
)
def test_others_solve_the_window_as_a_whole(solver: ap.AbstractSolver, tokens: int) -> None:
    this, seen = dynamics(2, torch.float32), set()
    this.register_forward_hook(lambda _, given, __: seen.add(given[0].shape[1]))
    ap.Equilibrium(this, solver)(torch.randn(2, tokens, 16))
    assert seen == {tokens}

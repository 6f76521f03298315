"""Solving for a few samples at a time changes the memory and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from instances import TIGHT, error, system

import altprop as ap
from altprop.memory import peak_live_bytes

ESTIMATORS = [
    ap.Implicit(tol=1e-9),
    ap.AEP(tol=1e-9),
    ap.AEP(tol=1e-9, start="zero"),
    ap.EP(tol=1e-9),
    ap.DyadicEP(tol=1e-9),
    ap.OneStep(3),
    ap.HolomorphicEP(tol=1e-9),
]


def gradient(
    estimator: ap.AbstractEstimator, chunk: int | None
) -> tuple[torch.Tensor, ap.Certificate]:
    s = system("damped", seed=1)
    x = torch.cat([s.x, s.x.flip(1), 2 * s.x])[:5].requires_grad_()
    block = ap.Equilibrium(s.dynamics, TIGHT, estimator, chunk=chunk)
    z = block(x)
    parts = torch.autograd.grad((z**2 + torch.sin(z)).sum(), [x, *s.dynamics.parameters()])
    assert block.certificate is not None
    return torch.cat([p.flatten() for p in parts]), block.certificate


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("chunk", [1, 2, 5, 9])
def test_chunks_give_the_gradient_of_the_batch(estimator: ap.AbstractEstimator, chunk: int) -> None:
    whole, one = gradient(estimator, None)
    found, certificate = gradient(estimator, chunk)
    assert error(found, whole) < 1e-8
    assert certificate.free_residual.shape == one.free_residual.shape
    assert certificate.adjoint_result is one.adjoint_result
    assert 0 < certificate.adjoint_evaluations <= one.adjoint_evaluations + 1
    for name in ("adjoint_residual", "adjoint_remainder", "nudged_residuals", "beta"):
        mine, theirs = getattr(certificate, name), getattr(one, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or mine.shape == theirs.shape


def test_chunks_need_less_memory() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8, 16)
    dynamics = ap.DampedAttention(16, heads=2)
    peaks = []
    for chunk in (None, 2):
        block = ap.Equilibrium(dynamics, chunk=chunk)
        peaks.append(peak_live_bytes(lambda b=block: b(x).square().sum().backward()))
    assert peaks[1] < 0.5 * peaks[0]


def test_what_belongs_to_the_whole_batch_is_refused() -> None:
    s = system("damped", seed=1)
    block = ap.Equilibrium(s.dynamics, estimator=ap.AEP(nudge="cost"), chunk=1)
    with pytest.raises(ap.RuleError, match="chunk is 1, but a cost"):
        s.cost(block(s.x, cost=s.cost)).backward()

    def masked(z: Any, x: Any, mask: Any) -> Any:
        return x - z + 0.1 * mask * torch.tanh(z)

    block = ap.Equilibrium(ap.from_function(masked), chunk=1)
    with pytest.raises(ap.RuleError, match="further arguments"):
        block(s.x.requires_grad_(), torch.ones(4)).sum().backward()

    random = system("damped", seed=1).dynamics
    random.draws = True
    with pytest.raises(ap.RuleError, match="random draws"):
        ap.Equilibrium(random, chunk=1)(s.x)
    assert torch.isfinite(ap.Equilibrium(random.eval(), chunk=1)(s.x)).all()


@pytest.mark.parametrize("chunk", [0, -1, 1.5, "2"])
def test_a_chunk_is_a_number_of_samples(chunk: Any) -> None:
    with pytest.raises(ap.ConfigError, match="chunk is .* expected a whole number of samples"):
        ap.Equilibrium(ap.DampedAttention(4, 1), chunk=chunk)

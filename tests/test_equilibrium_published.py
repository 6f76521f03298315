"""The estimators as published: what is wrong with them, and what mends it."""

from __future__ import annotations

import pytest
import torch

import altprop as ap
from helpers import (
    Gradients,
    Task,
    cosine,
    damped,
    flat,
    gradients,
    reference_problem,
    relative_errors,
)


def small() -> Task:
    """Return a small reference problem whose free state is a stable fixed point."""
    this = reference_problem(1, B=2, T=16, C=32)
    this.solver = ap.Anderson(tol=1e-6, max_steps=200)
    return this


def weights(gradients: Gradients) -> torch.Tensor:
    return flat({name: g for name, g in gradients.items() if name != "x"})


@pytest.mark.parametrize("nudge", ["cost", "linear"])
def test_clipping_makes_published_aep_worse_the_longer_its_phases(nudge: str) -> None:
    this = small()
    wanted = weights(this.gradients(ap.Implicit(tol=1e-6)))

    def score(steps: int, clip: bool) -> float:
        # a linear nudge is in units of the mean loss's cotangent, as the cost nudge is
        estimator = ap.PublishedAEP(steps=steps, clip=clip, nudge=nudge)  # type: ignore[arg-type]
        return cosine(weights(this.gradients(estimator)), wanted)

    clipped = [score(steps, clip=True) for steps in (20, 40, 80, 160)]
    assert clipped[0] > clipped[1] > clipped[2] > clipped[3]
    assert clipped[3] < 0.95
    free = [score(steps, clip=False) for steps in (20, 40, 80, 160)]
    assert free[0] < free[1] < 0.99999 < free[2] and free[3] > 0.99999


def test_published_ep_is_further_from_the_gradient_than_published_aep() -> None:
    this = small()
    wanted = weights(this.gradients(ap.Implicit(tol=1e-6)))
    naive = cosine(weights(this.gradients(ap.PublishedEP())), wanted)
    asymmetric = cosine(weights(this.gradients(ap.PublishedAEP())), wanted)
    assert naive < 0.8 and asymmetric > 0.97


@pytest.mark.parametrize("kind", [ap.PublishedEP, ap.PublishedAEP])
def test_cost_and_linear_nudge_agree_to_first_order(kind: type) -> None:
    this = damped(scale=0.5)

    def gap(beta: float) -> float:
        by_cost = this.gradients(kind(steps=30, beta=beta, nudge="cost"))
        by_line = this.gradients(kind(steps=30, beta=beta, nudge="linear"))
        return max(relative_errors(by_cost, by_line).values())

    gaps = [gap(0.02), gap(0.01), gap(0.005)]
    assert 1e-7 < gaps[2] < 1e-3  # they are not the same computation
    # centred phases: what is of second order in a phase cancels, so the gap follows β²
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)
    assert gaps[1] / gaps[2] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("estimator", [ap.PublishedEP(), ap.PublishedAEP()])
def test_a_cost_nudge_needs_the_cost_that_is_differentiated(
    estimator: ap.AbstractEstimator,
) -> None:
    this = damped()
    block = this.block(estimator)
    with pytest.raises(ap.RuleError, match="block\\(x, cost=lambda z"):
        this.cost(block(this.x)).backward()
    with pytest.raises(ap.RuleError, match="not the loss that was differentiated"):
        this.cost(block(this.x, cost=lambda z: z.square().sum())).backward()
    assert all(p.grad is None for p in block.parameters())


def test_a_multiple_of_the_cost_gives_that_multiple_of_the_gradient() -> None:
    this = damped()
    block = this.block(ap.PublishedAEP())
    once = gradients(block, this.x, this.cost)
    block.zero_grad()
    (-3 * this.cost(block(this.x, cost=this.cost))).backward()
    for name, p in block.named_parameters():
        assert torch.allclose(p.grad, -3 * once[name], rtol=1e-9)


@pytest.mark.parametrize("kind", [ap.PublishedEP, ap.PublishedAEP])
@pytest.mark.parametrize(
    "bad",
    [{"step": 0.0}, {"beta": -0.1}, {"beta": float("nan")}, {"steps": 0}, {"steps": 2.5}],
    ids=repr,
)
def test_published_forms_refuse_numbers_that_make_no_phase(kind: type, bad: dict) -> None:
    with pytest.raises(ap.ConfigError, match=f"{kind.__name__}: {next(iter(bad))} is "):
        kind(**bad)
    with pytest.raises(ap.ConfigError, match="nudge is 'both', expected 'cost' or 'linear'"):
        kind(nudge="both")

"""Nudges by the cost or by the cotangent, how large they are, and which options are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import altprop as ap
from systems import KINDS, TIGHT, Case, error, gradient, randn, size, system
from systems import B as SAMPLES
from systems import N as NUMBERS

BY_COST = [
    ap.EP(nudge="cost"),
    ap.AEP(nudge="cost"),
    ap.DyadicEP(nudge="cost"),
    ap.PublishedEP(),
    ap.PublishedAEP(),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "estimator", [ap.AEP(tol=1e-10), ap.PublishedEP(steps=30), ap.PublishedAEP(steps=30)], ids=repr
)
def test_cost_and_linear_nudges_agree_to_first_order_and_differ_at_a_finite_nudge(
    kind: str, estimator: ap.AbstractEstimator
) -> None:
    s = system(kind, seed=0)

    def gap(beta: float) -> float:
        linear, cost = (replace(estimator, beta=beta, nudge=n) for n in ("linear", "cost"))
        return error(gradient(s, cost)[0], gradient(s, linear)[0])

    # centred phases: what is of second order in a phase cancels, so the gap follows β²
    gaps = [gap(0.02), gap(0.01)]
    assert gaps[1] > 1e-7 and gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("estimator", BY_COST, ids=repr)
def test_a_loss_that_is_a_multiple_of_the_cost_gives_that_multiple_of_the_gradient(
    estimator: ap.AbstractEstimator,
) -> None:
    s = system("damped", seed=1)
    block, out = s.block(estimator), []
    for factor in (1.0, 1024.0):  # a power of two, as a loss scale is
        x = s.x.clone().requires_grad_()
        out.append(torch.autograd.grad(factor * s.cost(block(x, cost=s.cost)), x)[0])
    torch.testing.assert_close(out[1], 1024 * out[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("estimator", BY_COST, ids=repr)
def test_a_cost_nudge_needs_the_cost_that_is_differentiated(
    estimator: ap.AbstractEstimator,
) -> None:
    block = ap.Equilibrium(ap.from_function(Case().force), ap.Anderson(tol=1e-9), estimator)
    x, other = randn(SAMPLES, NUMBERS, seed=2), randn(SAMPLES, NUMBERS, seed=5)
    with pytest.raises(ap.RuleError, match="block\\(x, cost="):
        block(x.requires_grad_()).sum().backward()
    for share in (0.0, 0.01):  # it may differ from the loss by rounding
        z = block(x, cost=lambda z, share=share: (z**2 / 2).sum() + share * (other * z).sum())
        (z**2 / 2).sum().backward()
        assert bool(x.grad.isfinite().all())
    with pytest.raises(ap.RuleError, match="not the loss that was differentiated"):
        z = block(x, cost=lambda z: (z**2 / 2).sum() + 0.2 * (other * z).sum())
        (z**2 / 2).sum().backward()


@pytest.mark.parametrize("estimator", BY_COST, ids=repr)
def test_a_cost_that_is_not_one_samples_loss_is_refused_however_many_others_there_are(
    estimator: ap.AbstractEstimator,
) -> None:
    block = ap.Equilibrium(ap.from_function(Case().force), estimator=estimator)
    x, w = randn(1000, NUMBERS, seed=2).requires_grad_(), randn(1000, NUMBERS, seed=3)
    other = w.clone()
    other[7] = randn(NUMBERS, seed=4)
    z = block(x, cost=lambda z: (w * z).sum())
    with pytest.raises(ap.RuleError, match="1 of 1000 samples.*more than 5%, in sample 7 by"):
        (other * z).sum().backward()
    # a sample of another weight, or of none, is its multiple
    weights = torch.linspace(0, 2, 1000, dtype=torch.float64)[:, None]
    z = block(x, cost=lambda z: (w * z).sum())
    (weights * w * z).sum().backward()


@pytest.mark.parametrize("estimator", BY_COST, ids=repr)
def test_a_cost_is_judged_where_the_loss_was_and_not_where_the_state_had_come_from(
    estimator: ap.AbstractEstimator,
) -> None:
    # a fitted sample's gradient is as small as what is left of the free phase
    case, x = Case(), randn(SAMPLES, NUMBERS, seed=2).requires_grad_()
    loose = ap.Anderson(tol=1e-3)
    block = ap.Equilibrium(ap.from_function(case.force), loose, estimator, on_failure="accept")
    with torch.no_grad():
        root = case.root(x, block(x))
    cost = lambda z: ((z - root) ** 2).sum()  # noqa: E731
    cost(block(x, cost=cost)).backward()
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize(
    "estimator",
    [ap.EP(tol=1e-9), ap.AEP(beta=1e-4, tol=1e-9), ap.DyadicEP(tol=1e-9)],
    ids=repr,
)
def test_what_a_cost_misses_of_the_loss_costs_a_cost_nudge_no_exactness(
    estimator: ap.AbstractEstimator,
) -> None:
    more = randn(SAMPLES, NUMBERS, seed=5)

    def adjoint(nudge: str) -> torch.Tensor:
        x = randn(SAMPLES, NUMBERS, seed=2).requires_grad_()
        block = ap.Equilibrium(
            ap.from_function(Case().force), TIGHT, replace(estimator, nudge=nudge)
        )
        z = block(x, cost=lambda z: (z**2 / 2).sum())
        ((z**2 / 2).sum() + 0.01 * (more * z).sum()).backward()
        return x.grad

    assert error(adjoint("cost"), adjoint("linear")) < 1e-5  # beside the bias of a nudge


@pytest.mark.parametrize(
    "estimator",
    [
        ap.EP(nudge="cost", tol=1e-9),
        ap.AEP(nudge="cost", tol=1e-9),
        ap.DyadicEP(nudge="cost", tol=1e-9),
        ap.PublishedEP(),
        ap.PublishedAEP(clip=False),
        ap.EP(tol=1e-9),
        ap.DyadicEP(tol=1e-9),
        ap.Implicit(tol=1e-9),
    ],
    ids=repr,
)
def test_a_weight_of_a_samples_loss_weighs_its_adjoint_and_no_others(
    estimator: ap.AbstractEstimator,
) -> None:
    weights = torch.tensor([[-0.5], [4.0]], dtype=torch.float64)
    plain, weighted = Case().run(estimator), Case().run(estimator, weights=weights)
    assert float((size(plain.a) / size(plain.g)).min()) > 0.2
    torch.testing.assert_close(weighted.a, weights * plain.a, rtol=1e-4, atol=1e-9)


def test_automatic_nudges_reach_their_response() -> None:
    s = system("gated", seed=3)
    wide = ap.AEP(response=1e-3)
    for estimator, low, high in (
        (ap.EP(), 2.5e-4, 4e-3),
        (wide, 2.5e-4, 4e-3),
        (replace(wide, linearise="tracking"), 2.5e-4, 4e-3),
        (replace(wide, nudge="cost"), 2.5e-4, 4e-3),
        (ap.AEP(), 0.99e-6, 1.01e-6),
        (ap.HolomorphicEP(response=0.05), 0.04, 0.06),
    ):
        response = gradient(s, estimator)[1].response
        assert low < float(response.min()) <= float(response.max()) < high


def test_what_the_free_phase_left_is_no_signal_of_one_sided_phases() -> None:
    s = system("gated", seed=0)
    free = ap.Anderson(tol=1e-3)
    one, _ = gradient(s, ap.AEP(beta=1e-4, tol=1e-7, sides=1, solver=ap.Anderson()), free)
    two, _ = gradient(s, ap.Implicit(tol=1e-8, solver=ap.Anderson()), free)
    assert error(one, two) < 1e-3


NOT_POSITIVE = (0, -1.0, math.nan, math.inf, "0.1")
WRONG: list[tuple[type, dict[str, Any]]] = [
    *(
        (kind, {name: value})
        for kind in (ap.AEP, ap.EP)
        for name in ("beta", "response", "tol")
        for value in NOT_POSITIVE
    ),
    *(
        (kind, {"max_steps": value})
        for kind in (ap.AEP, ap.EP, ap.Implicit)
        for value in (0, -2, 1.5, "10")
    ),
    *(
        (kind, {name: None})
        for kind, name in ((ap.AEP, "tol"), (ap.EP, "response"), (ap.HolomorphicEP, "tol"))
    ),
    *(
        (kind, wrong)
        for kind in (ap.PublishedEP, ap.PublishedAEP)
        for wrong in (
            {"step": 0.0},
            {"beta": -0.1},
            {"beta": math.nan},
            {"steps": 0},
            {"steps": 2.5},
            {"nudge": "both"},
        )
    ),
    (ap.EP, {"sides": 3}),
    (ap.AEP, {"sides": "4"}),
    (ap.AEP, {"nudge": "loss"}),
    (ap.AEP, {"linearise": "mean"}),
    (ap.AEP, {"linearise": "tracking", "sides": 1}),
    (ap.AEP, {"start": "warm"}),
    (ap.Implicit, {"solver": ap.GMRES}),
    (ap.Implicit, {"tol": 0}),
    (ap.OneStep, {"k": 0}),
    (ap.DyadicEP, {"tol": 0}),
    (ap.HolomorphicEP, {"points": 3}),
    (ap.HolomorphicEP, {"radius": -1}),
]


@pytest.mark.parametrize(("kind", "wrong"), WRONG)
def test_an_option_that_makes_no_phase_is_refused_by_name(
    kind: type, wrong: dict[str, Any]
) -> None:
    with pytest.raises(ap.ConfigError, match=f"{next(iter(wrong))}.*(expected|write)"):
        kind(**wrong)


DEFAULTS = [
    "OneStep(k=1, certify=False)",
    "Implicit(tol=0.0025, max_steps=100, solver=None)",
    "DyadicEP(tol=0.001, max_steps=100, nudge='linear', solver=None)",
    "PublishedEP(step=0.1, steps=20, beta=0.02, nudge='cost')",
    "PublishedAEP(step=0.1, steps=20, beta=0.02, nudge='cost', clip=True)",
]


@pytest.mark.parametrize("text", DEFAULTS)
def test_defaults_of_estimators_are_those_of_the_pages(text: str) -> None:
    assert repr(getattr(ap, text.partition("(")[0])()) == text

"""Every public solver and estimator, found by the exports themselves, keeps its contract."""

from __future__ import annotations

import pytest
from torch import Tensor

import altprop as ap
from altprop.testing import check_estimator, check_solver


def concrete(base: type) -> list[type]:
    """Return every public class that derives from `base` and can be made."""
    values = [getattr(ap, name) for name in ap.__all__]
    kinds = [v for v in values if isinstance(v, type) and issubclass(v, base)]
    return [kind for kind in kinds if not getattr(kind, "__abstractmethods__", None)]


# exact up to their default tolerances; the others have a bias of their own
EXACT = {ap.AEP, ap.BPTT, ap.DyadicEP, ap.HolomorphicEP, ap.Implicit}


@pytest.mark.parametrize("kind", concrete(ap.AbstractSolver))
def test_every_public_solver_keeps_its_contract(kind: type) -> None:
    check_solver(kind())


@pytest.mark.parametrize("kind", concrete(ap.AbstractEstimator))
def test_every_public_estimator_keeps_its_contract(kind: type) -> None:
    relaxation = {"solver": ap.Euler(step=0.5, max_steps=50)} if kind is ap.BPTT else {}
    check_estimator(kind(), exact=kind in EXACT, **relaxation)


@pytest.mark.parametrize(
    ("estimator", "exact"),
    [
        (ap.AEP(linearise="tracking"), True),
        (ap.AEP(nudge="cost"), True),
        (ap.AEP(solver=ap.GMRES()), True),
        (ap.AEP(sides=1), False),
        (ap.AEP(sides=4), True),
        (ap.EP(sides=1, nudge="cost"), False),
        (ap.DyadicEP(nudge="cost", solver=ap.NewtonKrylov()), True),
        (ap.HolomorphicEP(points=4, solver=ap.GMRES()), True),
        (ap.Implicit(solver=ap.GMRES()), True),
        (ap.OneStep(k=3, certify=True), False),
    ],
    ids=repr,
)
def test_every_option_of_an_estimator_keeps_the_contract(
    estimator: ap.AbstractEstimator, exact: bool
) -> None:
    check_estimator(estimator, exact=exact)


def test_the_contract_of_estimators_catches_a_second_derivative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def differentiable(kind: object, value: Tensor, *sources: Tensor) -> Tensor:
        return value + sum(0 * source.sum() for source in sources)  # instead of a refusal

    monkeypatch.setattr("altprop.assign.applied", differentiable)
    monkeypatch.setattr("altprop.once.applied", differentiable)
    with pytest.raises(AssertionError, match="double backward gives a second derivative"):
        check_estimator(ap.Implicit(), exact=True)

"""Every level of a stack is solved to the tolerance, by any solver, or the certificate tells."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from altprop.equilibrium.levels import solve_by_levels, worst_level
from altprop.equilibrium.solvers.solver import Force, Solution
from systems import error

EQUAL, UNEQUAL, DEEP = (16,) * 7, (16, 24, 8, 32, 12, 20, 6), (16,) * 13
SOLVERS: list[ap.AbstractSolver] = [
    ap.Euler(step=1.0),
    ap.Euler(step=0.5),
    ap.Anderson(),
    ap.Anderson(mixing=0.3),
    ap.GMRES(),
    ap.NewtonKrylov(),
    ap.Adaptive(),
    ap.Fallback(),
    ap.Scattered(),
]


# a nudge that is given must be small where a kink may lie between the phases
ESTIMATORS: list[ap.AbstractEstimator] = [
    ap.AEP(beta=1e-6),
    ap.AEP(response=1e-6),
    ap.AEP(response=1e-6, sides=1),
    ap.AEP(response=1e-6, sides=4),
    ap.AEP(sides=4),
    ap.AEP(linearise="tracking", beta=1e-6),
    ap.AEP(start="zero"),
    ap.DyadicEP(),
]


def case(
    widths: tuple[int, ...], act: Callable[[], nn.Module], dtype: torch.dtype = torch.float64
) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return a stack, an input and a target."""
    torch.manual_seed(0)
    pairs = zip(widths, widths[1:], strict=False)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(m, n), act()) for m, n in pairs]).to(dtype)
    return model, torch.randn(8, widths[0], dtype=dtype), torch.randn(8, widths[-1], dtype=dtype)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    model.zero_grad()
    (model(x) - y).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def off(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    estimator: ap.AbstractEstimator,
    solver: ap.AbstractSolver | None = None,
) -> tuple[float, ap.Certificate]:
    """Return the worst parameter's relative distance to backprop's gradient."""
    wanted = gradients(copy.deepcopy(model), x, y)
    ap.convert(model, {"": estimator}, solver=solver, on_failure="accept")
    found = gradients(model, x, y)
    ((_, stack),) = ap.equilibria(model)
    return max(map(error, found, wanted)), stack.certificate


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize(
    ("widths", "estimator", "solver"),
    [
        *(
            (widths, estimator, solver)
            for widths in (UNEQUAL, DEEP)
            for estimator in (ap.Implicit(), ap.AEP())
            for solver in SOLVERS
        ),
        *(
            (DEEP, estimator, solver)
            for estimator in ESTIMATORS
            for solver in (ap.Euler(step=1.0), ap.Anderson(), ap.GMRES())
        ),
        (DEEP, ap.Implicit(solver=ap.Anderson()), None),
        (DEEP, ap.AEP(solver=ap.Anderson()), None),
    ],
    ids=repr,
)
def test_every_layer_is_within_the_tolerance_by_any_solver_and_estimator(
    widths: tuple[int, ...],
    estimator: ap.AbstractEstimator,
    solver: ap.AbstractSolver | None,
    act: Callable[[], nn.Module],
) -> None:
    wrong, seen = off(*case(widths, act), estimator, solver)
    tol = estimator.tolerance()
    assert seen.adjoint_result and float(seen.adjoint_residual.max()) <= tol
    assert wrong <= 3 * tol


@pytest.mark.parametrize(
    "estimator",
    [
        ap.Implicit(max_steps=2),
        ap.AEP(max_steps=2, start="zero"),
        ap.OneStep(k=3, certify=True),
        ap.PublishedAEP(nudge="linear"),
    ],
    ids=repr,
)
def test_what_has_not_reached_the_bottom_is_told(estimator: ap.AbstractEstimator) -> None:
    wrong, seen = off(*case((16,) * 13, nn.ReLU), estimator, ap.Anderson())
    assert wrong > 0.5
    assert seen.adjoint_residual is not None and float(seen.adjoint_residual.min()) > 0.5


@pytest.mark.parametrize("solver", [None, ap.Anderson()], ids=repr)
@pytest.mark.parametrize("options", [{"start": "zero"}, {"sides": 1, "response": 1e-5}], ids=str)
def test_what_float32_hides_of_a_level_is_told_where_no_linear_problem_was_solved(
    options: dict[str, object], solver: ap.AbstractSolver | None
) -> None:
    for widths in EQUAL, (16,) * 13:
        estimator = ap.AEP(**options)
        wrong, seen = off(*case(widths, nn.ReLU, torch.float32), estimator, solver)
        assert wrong <= 3 * max(float(seen.adjoint_residual.max()), estimator.tol)
        if "sides" in options:  # the linear problem was, and nothing is moved below the round-off
            assert seen.adjoint_result


def test_a_sweep_costs_what_it_did() -> None:
    one_side = ap.AEP(response=1e-6, sides=1)
    for estimator, evaluations in ((ap.Implicit(), 3), (ap.AEP(), 6), (one_side, 6)):
        _, seen = off(*case((16,) * 13, nn.ReLU), estimator, None)
        assert seen.adjoint_evaluations == evaluations


def test_a_sweep_goes_on_to_levels_that_are_small_beside_the_top() -> None:
    model, x, y = case(EQUAL, nn.Tanh)
    with torch.no_grad():  # one evaluation shows less than the tolerance of what is below
        model[-1][0].weight.mul_(1e-4)
    wrong, _ = off(model, x, y, ap.Implicit(), None)
    assert wrong <= 1e-10


def test_samples_that_need_another_attempt_do_not_move_the_others() -> None:
    model, x, y = case((16,) * 13, nn.Tanh)
    x[:4] *= torch.tensor([[1e-2], [1.0], [3.0], [10.0]], dtype=x.dtype)
    ap.convert(model, {"": ap.Implicit()}, solver=ap.Anderson())
    whole = gradients(model, x, y)
    alone = [gradients(model, x[i : i + 1], y[i : i + 1]) for i in range(8)]
    for together, *parts in zip(whole, *alone, strict=True):
        mean = torch.stack(parts).mean(0)
        assert float((together - mean).norm()) <= 1e-7 * float(mean.norm())


def test_an_attempt_sees_a_system_of_the_same_form_and_a_solved_sample_stays() -> None:
    """Three levels of one number: sample 0 is solved at once, sample 1 halts below the top."""
    gain = torch.tensor([[0.9, 0.9], [1e-3, 0.3]], dtype=torch.float64)
    top = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)

    def force(a: Tensor) -> Tensor:
        return torch.cat([gain * a[:, 1:], torch.zeros_like(a[:, :1])], 1) - a + top

    def inverse(r: Tensor) -> Tensor:
        middle = r[:, 1] + gain[:, 1] * r[:, 2]
        return torch.stack([r[:, 0] + gain[:, 0] * middle, middle, r[:, 2]], 1)

    one, found = torch.ones(2, dtype=torch.float64), []

    def attempt(force: Force, start: Tensor, inverse: Force | None) -> Solution:
        for a in (start, torch.ones_like(start)):  # the inverse is that of the force
            after = force(a + inverse(force(a)))
            torch.testing.assert_close(after, torch.zeros_like(after), rtol=0, atol=1e-12)
        found.append(ap.Euler(step=0.9, tol=2e-2).solve(force, start, step=1.0, scale=one))
        return found[-1]

    start = top.expand(2, 3).clone()
    solution = solve_by_levels(attempt, force, start, inverse, 2e-2, (1, 1, 1))
    assert len(found) > 1 and solution.evaluations == sum(part.evaluations for part in found)
    assert torch.equal(solution.value[0], found[0].value[0])
    torch.testing.assert_close(solution.force, force(solution.value), rtol=0, atol=1e-15)
    relative = (force(solution.value) / solution.value).abs().amax(1)
    torch.testing.assert_close(solution.residual, relative)
    assert solution.result and float(relative.max()) <= 2e-2


def test_the_worst_level_is_the_one_that_is_furthest_off_in_its_own_size() -> None:
    a = torch.tensor([[3.0, 4.0, 1e-6], [3.0, 4.0, 1e-6], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    r = torch.tensor([[0.0, 0.5, 2e-8], [0.5, 0.0, 2e-7], [0.0, 0.0, 0.0], [0.0, 0.0, 1e-3]])
    assert torch.allclose(worst_level(r, a, (2, 1))[:3], torch.tensor([0.1, 0.2, 0.0]))
    assert 1e20 < float(worst_level(r, a, (2, 1))[3]) < torch.inf  # not reached, and not lost
    assert torch.equal(worst_level(r, a, ()), torch.linalg.vector_norm(r, dim=1))

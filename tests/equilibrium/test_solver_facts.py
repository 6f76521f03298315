"""What each solver promises, against iterations written out and dense algebra in float64."""

from __future__ import annotations

import math

import pytest
import torch
from forces import Force, contraction, randn, size, watched
from torch import Tensor

import altprop as ap
from altprop.auditing.memory import peak_live_bytes
from altprop.equilibrium.solvers.defect import defect_correction


def linear(B: int = 2, n: int = 12, shift: float = -1.2) -> tuple[Force, Tensor, Tensor]:
    """Return a force `A z + b` per sample, `A` and `b`."""
    a = randn(B, n, n, seed=3) / math.sqrt(n) + shift * torch.eye(n, dtype=torch.float64)
    b = randn(B, n, seed=4)
    return lambda z: torch.einsum("bij,bj->bi", a, z) + b, a, b


# ------------------------------------------------------------------------------------- Anderson


def anderson(
    force: Force, z: Tensor, memory: int, step: float, ridge: float, count: int
) -> list[Tensor]:
    """Walker and Ni's iteration, one sample at a time, with the ridge as rows of the problem."""
    states = [z]
    dg: list[list[Tensor]] = [[] for _ in z]
    df: list[list[Tensor]] = [[] for _ in z]
    last: tuple[Tensor, Tensor] | None = None
    for _ in range(count - 1):
        f = force(states[-1])
        g = states[-1] + step * f
        new = []
        for i in range(len(z)):
            if last is None:
                new.append(g[i])
                continue
            dg[i] = [*dg[i], g[i] - last[0][i]][-memory:]
            df[i] = [*df[i], f[i] - last[1][i]][-memory:]
            F, G = torch.stack(df[i], 1), torch.stack(dg[i], 1)
            rows = torch.cat([F, math.sqrt(ridge) * torch.diag(F.norm(dim=0))])
            right = torch.cat([f[i], torch.zeros(F.shape[1], dtype=f.dtype)])
            new.append(g[i] - G @ torch.linalg.lstsq(rows, right[:, None]).solution[:, 0])
        last = g, f
        states.append(torch.stack(new))
    return states


@pytest.mark.parametrize("ridge", [1e-8, 1e-2, 0.5])
@pytest.mark.parametrize("memory", [1, 2, 5])
@pytest.mark.parametrize(("step", "mixing"), [(1.0, 1.0), (0.8, 0.5)])
def test_anderson_makes_the_steps_of_the_paper_with_a_ridge_of_each_columns_own_size(
    step: float, mixing: float, memory: int, ridge: float
) -> None:
    plain, start = contraction(), randn(2, 8, seed=5)
    force, seen = watched(plain)
    solver = ap.Anderson(memory=memory, ridge=ridge, mixing=mixing, tol=0, max_steps=9)
    found = solver.solve(force, start, step=step)
    wanted = anderson(plain, start, memory, step * mixing, ridge, 9)
    assert len(seen) == found.evaluations == 9
    for got, want in zip(seen, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    residuals = torch.stack([size(plain(z)) / size(z) for z in wanted])
    torch.testing.assert_close(found.residual, residuals.amin(0), rtol=1e-5, atol=1e-12)
    for i, n in enumerate(residuals.argmin(0).tolist()):
        torch.testing.assert_close(found.value[i], wanted[n][i], rtol=1e-7, atol=1e-9)


SOLVERS: list[ap.AbstractSolver] = [
    ap.Anderson(tol=1e-8),
    ap.Anderson(tol=1e-8, ridge=0.1, mixing=0.5, max_steps=300),
    ap.Euler(step=0.5, max_steps=400, tol=1e-8),
    ap.Adaptive(tol=1e-6, max_steps=3000),
    ap.NewtonKrylov(tol=1e-8),
    ap.Fallback(tol=1e-8),
    ap.Fallback(solvers=(ap.Anderson(max_steps=3), ap.NewtonKrylov()), tol=1e-8),
    ap.Scattered(tol=1e-8),
    ap.GMRES(tol=1e-8),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_size_of_a_samples_numbers_changes_nothing_but_their_scale(
    solver: ap.AbstractSolver,
) -> None:
    _, a, b = linear()
    start = randn(2, 12, seed=6)
    factors = torch.tensor([[1.0], [2.0**20]], dtype=torch.float64)  # exact in floating point

    def run(scale: Tensor) -> ap.Solution:
        # the same arithmetic in every sample, however it is batched
        force = lambda z: (a * z[:, None]).sum(2) + scale * b  # noqa: E731
        return solver.solve(force, scale * start, step=0.5)

    plain, scaled = run(torch.ones_like(factors)), run(factors)
    assert plain.result is ap.Result.CONVERGED and scaled.evaluations == plain.evaluations
    torch.testing.assert_close(scaled.value / factors, plain.value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scaled.residual, plain.residual, rtol=1e-6, atol=1e-14)


# ---------------------------------------------------------------------------------- every solver


class Corrected(ap.AbstractSolver):
    """`defect_correction` in a solver's clothes, with an inverse that is only nearly one."""

    tol, max_steps = 1e-8, 100

    def __init__(self, rates: Tensor) -> None:
        self.rates = rates

    def solve(
        self, force: Force, start: Tensor, *, step: float, scale: Tensor | None = None
    ) -> ap.Solution:
        inverse = lambda f: 0.7 * f / self.rates  # noqa: E731
        how = {"tol": self.tol, "max_steps": self.max_steps, "scale": scale}
        return defect_correction(force, inverse, start, **how)


@pytest.mark.parametrize(
    "solver", [*SOLVERS, None], ids=lambda s: "defect_correction" if s is None else repr(s)
)
def test_an_arrived_sample_is_left_as_it_is_to_the_bit_while_its_mates_move(
    solver: ap.AbstractSolver | None,
) -> None:
    rates = torch.linspace(0.6, 1.4, 6, dtype=torch.float64)
    root = randn(3, 6, seed=7)
    nonlinear = not (solver is not None and solver.linear)

    def force(z: Tensor) -> Tensor:
        d = root - z
        return rates * d + (0.3 * d**3 / (1 + d**2) if nonlinear else 0)

    solver = Corrected(rates) if solver is None else solver
    near = root.clone()
    near[0, :2] += 0.01  # two directions, so that a Krylov space is soon enough too
    far = near.clone()
    far[1] = root[1] + 5 * randn(6, seed=9)
    far[2] = root[2] - 20 * randn(6, seed=10)
    still = near.clone()
    still[1:] = root[1:]  # these have nothing to do
    kept, moving = (solver.solve(force, start, step=0.5) for start in (still, far))
    assert kept.result is moving.result is ap.Result.CONVERGED
    assert moving.evaluations > kept.evaluations
    assert torch.equal(kept.value[1:], root[1:])
    for name in ("value", "force", "residual"):
        assert torch.equal(getattr(moving, name)[0], getattr(kept, name)[0]), name


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_start_at_the_root_costs_one_evaluation_and_stays(solver: ap.AbstractSolver) -> None:
    force, a, b = linear()
    root = torch.linalg.solve(a, -b)
    found = solver.solve(force, root, step=0.5)
    assert found.evaluations == 1 and torch.equal(found.value, root)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_residuals_are_relative_to_the_scale_that_is_given_or_to_the_state(
    solver: ap.AbstractSolver,
) -> None:
    force, _, _ = linear()
    start = randn(2, 12, seed=6)
    scale = torch.tensor([300.0, 0.02], dtype=torch.float64)
    for given in (None, scale):
        found = solver.solve(force, start, step=0.5, scale=given)
        assert found.result is ap.Result.CONVERGED
        wanted = size(force(found.value)) / (size(found.value) if given is None else given)
        # difference quotients and float64 leave this much
        torch.testing.assert_close(found.residual, wanted, rtol=1e-3, atol=1e-12)
        assert float(found.residual.max()) <= solver.tol


# ------------------------------------------------------------------------------------ relaxation


def test_euler_makes_its_own_steps_and_no_others() -> None:
    plain, start = contraction(), randn(2, 8, seed=5)
    force, seen = watched(plain)
    found = ap.Euler(step=0.3, max_steps=7).solve(force, start, step=99.0)
    z = start
    for _ in range(7):
        z = z + 0.3 * plain(z)
    torch.testing.assert_close(found.value, z, rtol=1e-14, atol=0)
    assert found.evaluations == len(seen) == 8 and found.result is ap.Result.FIXED_TIME
    torch.testing.assert_close(ap.Euler(step=0.3, max_steps=7).unroll(plain, start, step=1.0), z)


def test_a_fixed_point_is_iterated_with_the_step_of_the_dynamics() -> None:
    plain, start = contraction(), randn(2, 8, seed=5)
    by_itself = ap.FixedPoint(tol=1e-6).solve(plain, start, step=0.7)
    as_euler = ap.Euler(step=0.7, tol=1e-6, max_steps=100).solve(plain, start, step=99.0)
    assert by_itself.result is ap.Result.CONVERGED
    assert torch.equal(by_itself.value, as_euler.value)
    assert by_itself.evaluations == as_euler.evaluations
    solver = ap.FixedPoint(tol=0, max_steps=7)
    unrolled = solver.unroll(plain, start, step=0.7)
    torch.testing.assert_close(unrolled, solver.solve(plain, start, step=0.7).value)
    assert solver.stride(0.7) == 0.7


def sharp_blocks() -> list[tuple[Force, Tensor]]:
    """Return gated blocks of large weights, 64 samples each; most of them do not contract."""
    systems: list[tuple[Force, Tensor]] = []
    for seed in (3, 5, 12):
        torch.manual_seed(seed)
        block = ap.GatedBlock(8, heads=2, expansion=2, init_std=0.5)
        torch.nn.init.uniform_(block.alpha, 0, 0.5)
        x = torch.randn(64, 8, 8)
        systems.append((block.under(x).force, x))
    return systems


def solved_by(solver: ap.AbstractSolver) -> Tensor:
    """Tell of each sample of the sharp blocks whether a solver finds its equilibrium."""
    found = [solver.solve(force, x, step=1.0) for force, x in sharp_blocks()]
    return torch.cat([each.residual <= solver.tol for each in found])


@torch.no_grad()
def test_where_extrapolation_stagnates_anderson_goes_on_by_plain_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = solved_by(ap.FixedPoint(tol=7e-4, max_steps=30))
    safe = solved_by(ap.Anderson(max_steps=200))
    monkeypatch.setattr("altprop.equilibrium.solvers.anderson._PATIENCE", 10**9)
    stuck = plain & ~solved_by(ap.Anderson(max_steps=400))
    assert int(stuck.sum()) >= 4  # they rest at residuals of 4e-3 to 2e-2, whatever their time
    assert bool(safe[stuck].all())


def test_an_adaptive_step_is_of_third_order() -> None:
    a = torch.tensor([[-0.3, 2.0], [-1.0, -0.5]], dtype=torch.float64)
    z = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    errors = []
    for h in (0.2, 0.1, 0.05):
        solver = ap.Adaptive(tol=0, rtol=10.0, atol=10.0, max_steps=4)
        # a force that is small beside what is accepted: the first step is taken as it is
        *_, last = solver.trajectory(lambda s: s @ a.T, z, step=h)
        assert float(last.time) == h
        errors.append(float((last.value - z @ torch.linalg.matrix_exp(h * a).T).norm()))
    for large, small in zip(errors, errors[1:], strict=False):
        assert math.log2(large / small) == pytest.approx(4, abs=0.15)  # of one step: h⁴


def test_an_adaptive_step_is_taken_only_where_its_error_is_accepted() -> None:
    rates = torch.tensor([[-1.0], [-30.0]], dtype=torch.float64)
    solver = ap.Adaptive(tol=0, rtol=1e-4, max_steps=400)
    before = None
    for moment in solver.trajectory(lambda z: rates * z, torch.ones(2, 1).double(), step=0.2):
        exact = torch.exp(rates[:, 0] * moment.time)
        # the error of all steps together, relative to where it began
        assert float((moment.value[:, 0] - exact).abs().max()) < 1e-3
        if before is not None:
            stood = moment.time == before.time  # a rejected step repeats its last point
            assert torch.equal(moment.value[stood], before.value[stood])
            assert bool((moment.time >= before.time).all())
        torch.testing.assert_close(moment.force, rates * moment.value)
        before = moment
    assert before is not None and float(before.time[0]) > 5 * float(before.time[1])


# ---------------------------------------------------------------------------------------- Krylov


def minimiser(a: Tensor, right: Tensor, columns: int) -> Tensor:
    """Return `x` of the Krylov space of so many columns with the least `‖right − A x‖`."""
    out = []
    for A, r in zip(a, right, strict=True):
        space = [r / r.norm()]
        for _ in range(columns - 1):
            v = A @ space[-1]
            for _ in range(2):
                for u in space:
                    v = v - (u @ v) * u
            space.append(v / v.norm())
        Q = torch.stack(space, 1)
        out.append(Q @ torch.linalg.lstsq(A @ Q, r[:, None]).solution[:, 0])
    return torch.stack(out)


@pytest.mark.parametrize("restart", [1, 3, 5])
def test_gmres_takes_the_best_of_a_krylov_space_of_its_restart_and_begins_anew(
    restart: int,
) -> None:
    force, a, _ = linear()
    z = start = randn(2, 12, seed=6)
    for cycles in (1, 2, 3):
        z = z + minimiser(a, -force(z), restart)
        limit = 2 + cycles * (restart + 1)
        found = ap.GMRES(restart=restart, tol=1e-12, max_steps=limit).solve(force, start, step=9.0)
        assert found.evaluations == limit - 1
        torch.testing.assert_close(found.value, z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("restart", [1, 3, 5])
def test_a_newton_step_is_the_best_of_a_krylov_space_of_its_restart(restart: int) -> None:
    force, a, _ = linear()
    start = randn(2, 12, seed=6)
    solver = ap.NewtonKrylov(restart=restart, forcing=1e-9, tol=1e-12, max_steps=restart + 3)
    wrapped, seen = watched(force)
    found = solver.solve(wrapped, start, step=9.0)
    assert found.evaluations == restart + 2
    wanted = start + minimiser(a, -force(start), restart)
    torch.testing.assert_close(found.value, wanted, rtol=1e-5, atol=1e-5)
    near = [float((z - start).norm()) < 1e-5 for z in seen]  # the state, and its differences
    assert near == [True] * (restart + 1) + [False]


@pytest.mark.parametrize("kind", [ap.GMRES, ap.NewtonKrylov])
def test_a_krylov_solver_keeps_no_more_vectors_than_its_restart(kind: type) -> None:
    n = 4000
    rates = torch.linspace(0.1, 3, n, dtype=torch.float64)
    start = torch.zeros(1, n, dtype=torch.float64)

    def vectors(restart: int, max_steps: int) -> float:
        solver = kind(restart=restart, tol=1e-12, max_steps=max_steps)
        force = lambda z: 1 - rates * z  # noqa: E731
        return peak_live_bytes(lambda: solver.solve(force, start, step=0.5)) / (8 * n)

    few, many = vectors(3, 30), vectors(13, 30)
    assert vectors(3, 16) == pytest.approx(few, abs=0.1)  # however long it runs
    assert 9.5 < many - few < 11.5  # ten vectors more, and nothing else
    assert few < 4 + 13  # a basis of four, and what a step holds beside it


def test_a_krylov_cycle_stops_at_the_goal_of_its_worst_sample() -> None:
    # two eigenvalues need two products, four need four
    rates = torch.tensor([[1.0, 1, 2, 2, 2, 1], [1, 2, 3, 4, 4, 1]], dtype=torch.float64)
    for rows, products in ((slice(0, 1), 2), (slice(1, 2), 4), (slice(0, 2), 4)):
        part = rates[rows]
        found = ap.GMRES(tol=1e-10).solve(
            lambda z, part=part: 1 - part * z, torch.zeros_like(part), step=1.0
        )
        assert found.evaluations == products + 2


def test_newton_lowers_the_force_at_every_step_and_squares_its_error_at_the_end() -> None:
    plain = contraction()
    force, seen = watched(lambda z: plain(z) - 0.5 * z**3)
    solver = ap.NewtonKrylov(tol=1e-13, forcing=1e-6)
    found = solver.solve(force, 3 * randn(2, 8, seed=11), step=0.5)
    assert found.result is ap.Result.CONVERGED
    # the products' states lie near a step's: what lies far from the one before is a step
    steps = [seen[0]]
    for z in seen[1:]:
        if float((z - steps[-1]).norm() / steps[-1].norm()) > 1e-6:
            steps.append(z)
    norms = [float(size(force(z)).max()) for z in steps]
    assert norms == sorted(norms, reverse=True) and len(norms) >= 4
    logs = [math.log(n) for n in norms if n > 1e-7]
    assert logs[-1] - logs[-2] < 1.5 * (logs[-2] - logs[-3])  # faster than any straight line


def test_newton_halves_a_step_that_does_not_lower_the_force() -> None:
    force, seen = watched(lambda z: -torch.atan(z))
    start = torch.tensor([[3.0]], dtype=torch.float64)  # a whole step leads to −9.5
    found = ap.NewtonKrylov(tol=1e-10).solve(force, start, step=1.0)
    assert found.result is ap.Result.CONVERGED and abs(float(found.value)) < 1e-9
    step = -math.atan(3.0) * (1 + 9.0)
    tried = [float(z) for z in seen if abs(float(z) - 3) > 1e-3][:2]
    assert tried == pytest.approx([3 + step, 3 + step / 2], rel=1e-5)
    # and gives up on one that never does, within its halvings
    flat, calls = watched(lambda z: torch.ones_like(z) + 0 * z)
    lost = ap.NewtonKrylov(halvings=3).solve(flat, start, step=1.0)
    assert lost.result is ap.Result.MAX_STEPS and torch.equal(lost.value, start)
    assert len(calls) <= 2 + 3

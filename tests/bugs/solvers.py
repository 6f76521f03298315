"""Bugs of the solvers."""

from __future__ import annotations

from bugs.bug import Bug

_SOLVERS = "equilibrium/solvers/"
_ANY = _SOLVERS + "test_solvers.py"
_LANDING = _SOLVERS + "test_landing.py"
_ANDERSON = _SOLVERS + "test_anderson.py"
_RELAXATION = _SOLVERS + "test_relaxation.py"
_KRYLOV = _SOLVERS + "test_krylov.py"
_CHAINS = _SOLVERS + "test_chains.py"

BUGS = [
    Bug(
        _SOLVERS + "solver.py",
        "return self in (Result.CONVERGED, Result.FIXED_TIME)",
        "return self is not Result.NON_FINITE",
        _ANY,
    ),
    Bug(
        _SOLVERS + "solver.py",
        "if bool((residual <= tol).all()) else Result.MAX_STEPS",
        "if float(residual.mean()) <= tol else Result.MAX_STEPS",
        _ANY,
    ),
    Bug(
        _SOLVERS + "solver.py",
        "size = sample_norm(state) if scale is None else scale",
        "size = sample_norm(state)",
        _ANY,
    ),
    Bug(
        _SOLVERS + "landing.py",
        "value = torch.where(per_sample(short, start), again.value, nearest)",
        "value = again.value",
        _LANDING,
    ),
    Bug(
        _SOLVERS + "landing.py",
        "nearest = torch.where(per_sample(back, start), found.value, landing.state)",
        "nearest = landing.state",
        _LANDING,
    ),
    Bug(
        _SOLVERS + "landing.py",
        "reached = torch.where(near, torch.minimum(solution.residual, residual), residual)",
        "reached = torch.minimum(solution.residual, residual)",
        _LANDING,
    ),
    Bug(
        _SOLVERS + "landing.py",
        "stride = stride.masked_fill(grows, 0.0)",
        "pass",
        _LANDING,
    ),
    Bug(
        _SOLVERS + "fallback.py",
        "found = with_stride(found, member, step)",
        "found = with_stride(found, self, step)",
        _LANDING,
    ),
    Bug(
        _SOLVERS + "solver.py",
        "in_rows(z), dim=1)",
        "in_rows(z), dim=1, ord=float('inf'))",
        _ANY,
    ),
    Bug(
        _SOLVERS + "relaxation.py",
        "z = z + step * force(z)",
        "z = z + force(z)",
        _RELAXATION,
    ),
    Bug(
        _SOLVERS + "fixed_point.py",
        "relax(force, start, step, self.tol,",
        "relax(force, start, 1.0, self.tol,",
        _RELAXATION,
    ),
    Bug(
        _SOLVERS + "anderson.py",
        "turned = self._stale > _PATIENCE",
        "turned = self._stale > 10**9",
        _ANDERSON,
    ),
    Bug(_SOLVERS + "anderson.py", "        self._gram[:, :rows, slot] = column\n", "", _ANDERSON),
    Bug(_SOLVERS + "anderson.py", "return step * self.mixing", "return step", _LANDING),
    Bug(
        _SOLVERS + "anderson.py",
        "slot, rows = self._count % self._memory,",
        "slot, rows = min(self._count, self._memory - 1),",
        _ANDERSON,
    ),
    Bug(
        _SOLVERS + "solver.py",
        "best_f = torch.where(shaped, f, at.best_force)",
        "best_f = f",
        _ANDERSON,
    ),
    Bug(
        _SOLVERS + "solver.py",
        "if count < len(z):",
        "if False:",
        _ANY,
    ),
    Bug(
        _SOLVERS + "defect.py",
        "at.value + inverse(",
        "at.value - inverse(",
        _SOLVERS + "test_defect.py",
    ),
    Bug(
        _SOLVERS + "gmres.py",
        "off <= 0.1 * sample_norm(old) + rounding",
        "off <= 10 * sample_norm(old) + rounding",
        _KRYLOV,
    ),
    Bug(_SOLVERS + "krylov.py", "force(z + h * v) - f) / h", "force(z + h * v) - f)", _KRYLOV),
    Bug(
        _SOLVERS + "krylov.py",
        "small[:, : k + 1, k] += along",
        "small[:, : k + 1, k] = along",
        _KRYLOV,
    ),
    Bug(
        _SOLVERS + "newton.py",
        "lower = searching & (sample_norm(new) <= (1 - 1e-4 * length) * size)",
        "lower = searching",
        _KRYLOV,
    ),
    Bug(_SOLVERS + "scattered.py", "manual_seed(self.seed)", "manual_seed(0)", _CHAINS),
    Bug(
        _SOLVERS + "scattered.py",
        "at = torch.where(per_sample(done, start), best.value, scattered)",
        "at = scattered",
        _CHAINS,
    ),
    Bug(_SOLVERS + "adaptive.py", "- 1 / 8 * fourth", "+ 1 / 8 * fourth", _RELAXATION),
]

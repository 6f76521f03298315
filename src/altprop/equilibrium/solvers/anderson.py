"""Anderson acceleration of `z ↦ z + εF(z)`: extrapolate from the last few forces, per sample.

Reference: Walker and Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal.
49 (2011), the unconstrained form with differences; the batch form follows from solving one small
least-squares problem per sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Force,
    Result,
    Solution,
    check_counts,
    check_fields,
    check_solver_fields,
    conclude,
    per_sample,
    relative_residual,
)

# A step is taken to shrink the residual as the slowest of the last few did, and this much less: to
# foresee too much costs the whole batch three evaluations, and to foresee too little costs one.
_SEEN, _CAUTION = 3, 1.3
_PATIENCE, _PROGRESS = 20, 0.9  # evaluations without so small a residual, relative to the best one
_USUAL = 3  # differences that most solves need: memory for more is taken when they are there


@dataclass(frozen=True)
class Anderson(AbstractSolver):
    """Solve by Anderson acceleration, with weights, stopping and best state per sample.

    It also converges to fixed points that a physical relaxation would never reach, so do not take
    convergence for physical stability. Its weights see the whole window, later tokens included:
    the tolerance bounds how far the future can leak into a causal state.

    Extrapolation can rest at states that are no fixed points. So a sample that has found nothing
    better for twenty evaluations goes on from its best state by plain steps, and if these find
    nothing better either, by extrapolation again (not under `tol=0`).

    **Arguments:** `memory`, how many earlier differences to extrapolate from; `tol`, the relative
    force residual to reach; `max_steps`, the limit of force evaluations; `ridge`, the
    regularisation of the least squares relative to the diagonal of its Gram matrix;
    `mixing`, the fraction of `ε` that a step takes.
    """

    piecewise: ClassVar[bool] = True

    memory: int = 5
    tol: float = 7e-4
    max_steps: int = 100
    ridge: float = 1e-8
    mixing: float = 1.0

    def __post_init__(self) -> None:
        check_solver_fields(self)
        check_counts("Anderson", memory=self.memory)
        check_fields("Anderson", ridge=self.ridge, mixing=self.mixing)

    def solve(
        self,
        force: Force,
        start: Tensor,
        *,
        step: float,
        scale: Tensor | None = None,
    ) -> Solution:
        return self._iterate(force, start, step, scale, course=None)[0]

    def stride(self, step: float) -> float:
        return step * self.mixing

    def approach(self, force: Force, start: Tensor, *, step: float) -> tuple[Solution, Tensor]:
        return self._iterate(force, start, step, None, course=_Course())

    @torch.no_grad()
    def _iterate(
        self,
        force: Force,
        start: Tensor,
        step: float,
        scale: Tensor | None,
        course: _Course | None,
    ) -> tuple[Solution, Tensor]:
        """Return the solution and, where a course is kept, the states to go on to."""
        z, f = start, force(start)
        residual = relative_residual(f, z, scale)
        best_z, best_f, best = z, f, residual
        moving, ahead = torch.ones_like(best, dtype=torch.bool), start
        safeguard = _Safeguard(best) if self.tol else None
        memory = _Differences(
            min(self.memory, max(1, self.max_steps - 2)), self.ridge, step * self.mixing
        )
        steps = 1
        while steps < self.max_steps:
            # a sample that has blown up keeps its best state; the others go on
            going = moving & (best > self.tol) & (residual < torch.inf)
            if course is not None:
                # a state beside the best one is no state to go on from
                going &= ~(course.arrives(residual, self.tol) & (residual <= best))
            count = int(going.sum())
            if count == 0:
                break
            if safeguard is not None and bool((turned := safeguard.turns(best)).any()):
                # it goes on from its best state, in the other way
                z, f = _where(turned, best_z, z), _where(turned, best_f, f)
                residual = torch.where(turned, best, residual)
            proposed = memory.extrapolate(z, f)
            if safeguard is not None and bool(safeguard.plain.any()):
                proposed = _where(safeguard.plain, torch.add(z, f, alpha=step), proposed)
            if course is not None and count < len(z):
                ahead = _where(moving, proposed, ahead)
            moving = going
            # A finished sample stays where it is; its difference then is zero and weighs nothing.
            z = proposed if count == len(z) else _where(moving, proposed, z)
            f = force(z)
            steps += 1
            residual = relative_residual(f, z, scale)
            better = residual < best
            if bool(better.all()):
                best_z, best_f, best = z, f, residual
            else:
                shaped = per_sample(better, z)
                best_z = torch.where(shaped, z, best_z)
                best_f = torch.where(shaped, f, best_f)
                best = torch.where(better, residual, best)
        lost = ~torch.isfinite(residual) & ~(best <= self.tol)
        if course is not None:
            ahead = _where(moving, memory.extrapolate(z, f), ahead)
            beside = lost | moving & (best < residual)
            if bool(beside.any()):
                ahead = _where(beside, best_z + self.stride(step) * best_f, ahead)
        result = Result.NON_FINITE if bool(lost.any()) else conclude(best, self.tol)
        return Solution(best_z, best_f, best, steps, result), ahead


def _where(chosen: Tensor, those: Tensor, others: Tensor) -> Tensor:
    """Return the chosen samples of one state and the others of another, without copying it all."""
    if bool(chosen.all()):
        return those
    return torch.where(per_sample(chosen, those), those, others)


def _extended(held: Tensor, rows: int) -> Tensor:
    """Return a copy of `held`, `(B, m, n)`, with room for `rows` of them."""
    B, m, n = held.shape
    out = held.new_empty(B, rows, n)
    out[:, :m] = held
    return out


class _Safeguard:
    """Which samples take plain steps, since extrapolation has found them nothing better for long.

    An extrapolation may pass through larger residuals on its way, so it is given time.
    """

    def __init__(self, best: Tensor) -> None:
        self.plain = torch.zeros_like(best, dtype=torch.bool)
        self._mark, self._stale = best, torch.zeros_like(best)

    def turns(self, best: Tensor) -> Tensor:
        """Tell of each sample, `(B,)`, whether it changes its way now.

        **Arguments:** `best`, the least residual so far, `(B,)`.
        """
        won = best <= _PROGRESS * self._mark
        self._mark = torch.where(won, best, self._mark)
        self._stale = torch.where(won, 0, self._stale + 1)
        turned = self._stale > _PATIENCE
        self._stale = torch.where(turned, 0, self._stale)
        self.plain = self.plain ^ turned
        return turned


class _Course:
    """How fast the residual of each sample shrinks, and so where its next one will be."""

    def __init__(self) -> None:
        self._residual: Tensor | None = None
        self._rates: list[Tensor] = []

    def arrives(self, residual: Tensor, tol: float) -> Tensor:
        """Tell of each sample, `(B,)`, whether its next residual will be within `tol`.

        **Arguments:** `residual`, of the newest state, `(B,)`.
        """
        if self._residual is not None:
            self._rates = [*self._rates[-_SEEN + 1 :], residual / self._residual]
        self._residual = residual
        if len(self._rates) < 2:
            return torch.zeros_like(residual, dtype=torch.bool)
        return _CAUTION * residual * torch.stack(self._rates).amax(0) <= tol


class _Differences:
    """The last differences of states and forces, and the extrapolation that they give.

    With `ΔZ`, `ΔF` of shape `(B, m, n)` the correction is `−(ΔZ + εΔF) γ`, where `γ` minimises
    `‖f − ΔF γ‖` per sample. The ridge is relative to each column: forces shrink by orders of
    magnitude during a solve, and it must not drown the recent ones.

    A new difference takes the place of the oldest, and changes one row and column of the Gram
    matrix, so a step reads the memory twice and writes two rows of it.
    """

    def __init__(self, memory: int, ridge: float, eps: float) -> None:
        self._memory, self._ridge, self._eps = memory, ridge, eps
        self._count = 0
        self._last: tuple[Tensor, Tensor] | None = None  # g and f

    def extrapolate(self, z: Tensor, f: Tensor) -> Tensor:
        """Return the next state from the state `z` and its force `f`, both `(B, ...)`."""
        f = f.flatten(1)
        g = torch.add(z.flatten(1), f, alpha=self._eps)
        last, self._last = self._last, (g, f)
        if last is None:
            self._allocate(g)
            return g.view(z.shape)
        slot, rows = self._count % self._memory, min(self._count + 1, self._memory)
        self._count += 1
        self._grow(rows)
        dg, df = self._dg[:, :rows], self._df[:, :rows]
        torch.sub(g, last[0], out=dg[:, slot])
        torch.sub(f, last[1], out=df[:, slot])
        known = df.mT
        column = (df[:, slot : slot + 1] @ known).squeeze(1)  # (B, rows)
        self._gram[:, slot, :rows] = column
        self._gram[:, :rows, slot] = column
        weights = self._weights(rows, (f.unsqueeze(1) @ known).mT.double()).to(g.dtype)
        return torch.baddbmm(g.unsqueeze(1), weights.mT, dg, alpha=-1).view(z.shape)

    def _allocate(self, z: Tensor) -> None:
        B, n = z.shape
        rows = min(_USUAL, self._memory)
        self._df, self._dg = z.new_empty(B, rows, n), z.new_empty(B, rows, n)
        self._gram = z.new_zeros(B, self._memory, self._memory, dtype=torch.float64)

    def _grow(self, rows: int) -> None:
        """Make room for so many differences."""
        if rows > self._df.shape[1]:
            self._df = _extended(self._df, rows)
            self._dg = _extended(self._dg, rows)

    def _weights(self, rows: int, right: Tensor) -> Tensor:
        """Return `γ`, `(B, rows, 1)`, from `ΔFᵀf` of that shape."""
        gram = self._gram[:, :rows, :rows].clone()
        diagonal = gram.diagonal(dim1=1, dim2=2)
        # Relative to each column's own size. The column of a sample that no longer moves is zero:
        # any number keeps it solvable.
        diagonal.mul_(1 + self._ridge).add_(diagonal == 0)
        return torch.linalg.solve(gram, right)

"""Anderson acceleration of `z ↦ z + εF(z)`: extrapolate from the last few forces, per sample.

Reference: Walker and Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal.
49 (2011), the unconstrained form with differences; the batch form follows from solving one small
least-squares problem per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Force,
    Point,
    Solution,
    check_counts,
    check_fields,
    check_solver_fields,
    in_rows,
    iterate,
    per_sample,
)

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
        memory = _Differences(
            min(self.memory, max(1, self.max_steps - 2)), self.ridge, step * self.mixing
        )
        safeguard = _Safeguard(step)

        def propose(at: Point) -> Tensor:
            z, f = safeguard.place(at) if self.tol else (at.value, at.force)
            return safeguard.choose(memory.extrapolate(z, f), z, f)

        return iterate(force, start, propose, tol=self.tol, max_steps=self.max_steps, scale=scale)

    def stride(self, step: float) -> float:
        return step * self.mixing


def _extended(held: Tensor, rows: int) -> Tensor:
    """Return a copy of `held`, `(B, m, n)`, with room for `rows` of them."""
    B, m, n = held.shape
    out = held.new_empty(B, rows, n)
    out[:, :m] = held
    return out


class _Safeguard:
    """Which samples take plain steps, since extrapolation has found them nothing better for long.

    An extrapolation may pass through larger residuals on its way, so it is given time.

    **Arguments:** `step`, the `ε` of a plain step.
    """

    def __init__(self, step: float) -> None:
        self._step = step
        self._plain: Tensor | None = None  # of each sample, (B,)

    def place(self, at: Point) -> tuple[Tensor, Tensor]:
        """Return the state and force to go on from: the best one where a sample changes its way."""
        least = at.least
        if self._plain is None:
            self._plain = torch.zeros_like(least, dtype=torch.bool)
            self._mark, self._stale = least, torch.zeros_like(least)
        won = least <= _PROGRESS * self._mark
        self._mark = torch.where(won, least, self._mark)
        self._stale = torch.where(won, 0, self._stale + 1)
        turned = self._stale > _PATIENCE
        if not bool(turned.any()):
            return at.value, at.force
        self._stale = torch.where(turned, 0, self._stale)
        self._plain = self._plain ^ turned
        shaped = per_sample(turned, at.value)
        z = torch.where(shaped, at.best, at.value)
        return z, torch.where(shaped, at.best_force, at.force)

    def choose(self, proposed: Tensor, z: Tensor, f: Tensor) -> Tensor:
        """Return what was proposed, or a plain step from `z` for the samples that take one."""
        if self._plain is None or not bool(self._plain.any()):
            return proposed
        plain = torch.add(z, f, alpha=self._step)
        return torch.where(per_sample(self._plain, z), plain, proposed)


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
        f = in_rows(f)
        g = torch.add(in_rows(z), f, alpha=self._eps)
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

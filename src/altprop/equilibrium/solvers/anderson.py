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
    Result,
    Solution,
    check_solver_fields,
    conclude,
    is_count,
    is_positive,
    per_sample,
    relative_residual,
)
from altprop.errors import ConfigError


@dataclass(frozen=True)
class Anderson(AbstractSolver):
    """Solve by Anderson acceleration, with weights, stopping and best state per sample.

    It also converges to fixed points that a physical relaxation would never reach, so do not take
    convergence for physical stability. Its weights see the whole window, later tokens included:
    the tolerance bounds how far the future can leak into a causal state.

    **Arguments:** `memory`, how many earlier differences to extrapolate from; `tol`, the relative
    force residual to reach; `max_steps`, the limit of force evaluations; `ridge`, the
    regularisation of the least squares relative to the mean diagonal of its Gram matrix;
    `mixing`, the fraction of `ε` that a step takes.
    """

    memory: int = 5
    tol: float = 7e-4
    max_steps: int = 60
    ridge: float = 1e-8
    mixing: float = 1.0

    def __post_init__(self) -> None:
        check_solver_fields(self)
        if not is_count(self.memory):
            raise ConfigError(
                f"Anderson: memory is {self.memory!r}, expected a whole number, at least 1"
            )
        if not is_positive(self.ridge):
            raise ConfigError(f"Anderson: ridge is {self.ridge!r}, expected a number > 0")
        if not is_positive(self.mixing):
            raise ConfigError(f"Anderson: mixing is {self.mixing!r}, expected a number > 0")

    @torch.no_grad()
    def solve(
        self,
        force: Force,
        start: Tensor,
        *,
        step: float,
        scale: Tensor | None = None,
    ) -> Solution:
        eps = step * self.mixing
        z, f = start, force(start)
        residual = relative_residual(f, z, scale)
        best_z, best_f, best = z, f, residual
        memory = _Differences(self.memory, self.ridge)
        steps = 1
        while steps < self.max_steps:
            # a sample that has blown up keeps its best state; the others go on
            moving = ~(best <= self.tol) & torch.isfinite(residual)
            if not bool(moving.any()):
                break
            proposed = z + eps * f + memory.correction(z, f, eps)
            memory.remember(z, f)
            # A finished sample stays where it is; its difference then is zero and weighs nothing.
            z = torch.where(per_sample(moving, z), proposed, z)
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
        result = Result.NON_FINITE if bool(lost.any()) else conclude(best, self.tol)
        return Solution(best_z, best_f, best, steps, result)


class _Differences:
    """The last differences of states and forces, and the extrapolation that they give.

    With `ΔZ`, `ΔF` of shape `(m, B, n)` the correction is `−(ΔZ + εΔF) γ`, where `γ` minimises
    `‖f − ΔF γ‖` per sample. Columns are scaled to unit norm first: forces shrink by orders of
    magnitude during a solve, and the ridge must not drown the recent ones.
    """

    def __init__(self, memory: int, ridge: float) -> None:
        self._memory, self._ridge = memory, ridge
        self._dz: list[Tensor] = []
        self._df: list[Tensor] = []
        self._last: tuple[Tensor, Tensor] | None = None

    def remember(self, z: Tensor, f: Tensor) -> None:
        self._last = (z, f)

    def correction(self, z: Tensor, f: Tensor, eps: float) -> Tensor:
        if self._last is None:
            return torch.zeros_like(z)
        self._dz = [*self._dz, z - self._last[0]][-self._memory :]
        self._df = [*self._df, f - self._last[1]][-self._memory :]
        flat = torch.stack([d.flatten(1) for d in self._df], dim=1)  # (B, m, n)
        gram = (flat @ flat.transpose(1, 2)).double()
        right = (flat @ f.flatten(1).unsqueeze(2)).double()  # (B, m, 1)
        size = gram.diagonal(dim1=1, dim2=2).sqrt()
        unit = torch.where(size > 0, 1 / size, torch.zeros_like(size))
        gram = gram * unit.unsqueeze(1) * unit.unsqueeze(2)
        # a column of a sample that no longer moves is zero: give it a one to stay solvable
        fill = self._ridge + (size == 0).double()
        gram.diagonal(dim1=1, dim2=2).add_(fill)
        gamma = torch.linalg.solve(gram, right * unit.unsqueeze(2)).squeeze(2) * unit
        out = torch.zeros_like(z)
        for dz, df, weight in zip(self._dz, self._df, gamma.to(z.dtype).unbind(1), strict=True):
            out -= per_sample(weight, z) * (dz + eps * df)
        return out

"""The correction `(J − Jᵀ)u` that makes a contrast of phases exact, and its size."""

from __future__ import annotations

import torch
from torch import Tensor

from altprop.equilibrium.dynamics.products import AbstractLinearisation
from altprop.equilibrium.solvers.solver import sample_norm


def antisymmetry(forward: Tensor, transposed: Tensor) -> Tensor:
    """Return `‖Jv − Jᵀv‖ / ‖Jv‖` per sample, `(B,)`; 0 where `Jv` vanishes with `Jᵀv`."""
    tiny = torch.finfo(forward.dtype).tiny
    return sample_norm(forward - transposed) / sample_norm(forward).clamp_min(tiny)


class Antisymmetric:
    """The correction `u ↦ (J − Jᵀ)u`, which counts its products and measures itself."""

    def __init__(self, linear: AbstractLinearisation) -> None:
        self.linear = linear
        self.evaluations = 0
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, u: Tensor) -> Tensor:
        self.evaluations += 1
        return self.beside(u, self.linear.vjp(u))

    def beside(self, u: Tensor, transposed: Tensor) -> Tensor:
        """Return the correction at `u` where `Jᵀu` is known, as it is at the linear solution."""
        self.evaluations += 1
        forward = self.linear.jvp(u)
        self._last = (forward, transposed)
        return forward - transposed

    def measure(self) -> Tensor | None:
        """Return `‖Ju − Jᵀu‖/‖Ju‖` at the last `u` whose products were computed, `(B,)`."""
        return None if self._last is None else antisymmetry(*self._last)

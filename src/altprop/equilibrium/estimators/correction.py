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
    """The correction `u ↦ (J − Jᵀ)u`, which never computes what is already known of it.

    The phases start where a product is known: at the linear solution `Jᵀu`, and at the mirror
    image of the first phase's end the whole correction up to its sign.
    """

    def __init__(self, linear: AbstractLinearisation) -> None:
        self.linear = linear
        self.evaluations = 0
        self._last: tuple[Tensor, Tensor] | None = None
        self._transposed: _Known | None = None
        self._whole: _Known | None = None

    def know_vjp(self, u: Tensor, vjp: Tensor) -> None:
        self._transposed = _Known(u, vjp)

    def __call__(self, u: Tensor) -> Tensor:
        if self._whole is not None and self._whole.at(u):
            return self._whole.product
        forward = self.linear.jvp(u)
        if self._transposed is not None and self._transposed.at(u):
            transposed = self._transposed.product
            self.evaluations += 1
        else:
            transposed = self.linear.vjp(u)
            self.evaluations += 2
        self._last = (forward, transposed)
        out = forward - transposed
        self._whole = _Known(u, out)
        return out

    def measure(self) -> Tensor | None:
        """Return `‖Ju − Jᵀu‖/‖Ju‖` at the last `u` whose products were computed, `(B,)`."""
        return None if self._last is None else antisymmetry(*self._last)


class _Known:
    """A product known at the tensor `u` itself, until someone writes into `u`."""

    def __init__(self, u: Tensor, product: Tensor) -> None:
        self._u, self._version, self.product = u, u._version, product

    def at(self, u: Tensor) -> bool:
        return u is self._u and u._version == self._version

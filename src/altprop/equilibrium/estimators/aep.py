"""Asymmetric equilibrium propagation: nudged phases corrected by `(J − Jᵀ)`.

Reference: Scurria et al., arXiv 2602.03670. Linearised, a phase of `F(z) − (J − Jᵀ)(z − z*) ∓ βg`
settles where `Jᵀ d = ±βg`, so the contrast is the exact adjoint for any Jacobian.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from altprop.equilibrium.estimators.estimator import (
    AbstractEstimator,
    Adjoint,
    Problem,
    Products,
    check_counts,
    check_fields,
    solve_adjoint,
)
from altprop.equilibrium.estimators.phases import contrast, phase, response_beta
from altprop.equilibrium.solvers.solver import sample_norm
from altprop.errors import ConfigError


@dataclass(frozen=True)
class AEP(AbstractEstimator):
    """Contrast the equilibria of `F(z) − (J − Jᵀ)(z − z*) ∓ βg = 0`: exact as `β → 0`.

    The phases are solved, not merely relaxed for a fixed time, and the correction is never
    clipped: at the nudged equilibrium it is as large as the force itself. With `start="adjoint"`
    the phases start from the solution of their linearisation, which changes where they start and
    not where they end; each makes at least one nonlinear update.

    **Arguments:** `beta`, the nudge for a cotangent of unit norm per sample (`None`: chosen so that
    the state moves by `response` relative to its norm; below 1e-5 float32's round-off dominates,
    above 1e-2 the bias of order `β²`); `response`; `tol`, the residual of a nudged phase relative
    to the nudge; `max_steps`, the limit of evaluations per phase; `start`, `"adjoint"` or `"zero"`.
    """

    beta: float | None = None
    response: float = 1e-3
    tol: float = 1e-3
    max_steps: int = 100
    start: Literal["adjoint", "zero"] = "adjoint"

    def __post_init__(self) -> None:
        check_fields("AEP", beta=self.beta, response=self.response, tol=self.tol)
        check_counts("AEP", max_steps=self.max_steps)
        if self.start not in ("adjoint", "zero"):
            raise ConfigError(f"AEP: start is {self.start!r}, expected 'adjoint' or 'zero'")

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        products = _Antisymmetric(problem.linearise())
        if self.start == "adjoint":
            linear = solve_adjoint(problem, products.linear, cotangent, self.tol, self.max_steps)
            guess, first = linear.value, -linear.value
            evaluations = linear.evaluations + 1
            products.know_vjp(first, cotangent - linear.force)  # Jᵀa + g is the solve's residual
        else:
            guess, first = problem.step * cotangent, torch.zeros_like(cotangent)
            evaluations = 1
        if self.beta is None:
            beta = response_beta(problem, guess, self.response)
        else:
            beta = torch.full_like(sample_norm(cotangent), self.beta)
        run = partial(
            phase,
            problem,
            beta=beta,
            tol=self.tol,
            max_steps=self.max_steps,
            inverse=products.linear.inverse(transposed=True),
        )
        plus = run(cotangent, start=first, correction=products)
        mirrored = -plus.value
        products.mirror(plus.value, mirrored)
        minus = run(-cotangent, start=mirrored, correction=products)
        evaluations += plus.evaluations + minus.evaluations + products.evaluations
        return replace(contrast(plus, minus, beta, problem), evaluations=evaluations)


class _Antisymmetric:
    """The correction `u ↦ (J − Jᵀ)u`, which never computes what is already known of it.

    The phases start where a product is known: at the linear solution `Jᵀu`, and at the mirror
    image of the first phase's end the whole correction up to its sign.
    """

    def __init__(self, linear: Products) -> None:
        self.linear = linear
        self.evaluations = 0
        self._transposed: _Known | None = None
        self._whole: _Known | None = None

    def know_vjp(self, u: Tensor, vjp: Tensor) -> None:
        self._transposed = _Known(u, vjp)

    def mirror(self, u: Tensor, mirrored: Tensor) -> None:
        """Carry what is known at `u` over to `mirrored`, which is `−u`."""
        if self._whole is not None and self._whole.at(u):
            self._whole = _Known(mirrored, -self._whole.product)

    def __call__(self, u: Tensor) -> Tensor:
        if self._whole is not None and self._whole.at(u):
            return self._whole.product
        if self._transposed is not None and self._transposed.at(u):
            out = self.linear.jvp(u) - self._transposed.product
            self.evaluations += 1
        else:
            out = self.linear.jvp(u) - self.linear.vjp(u)
            self.evaluations += 2
        self._whole = _Known(u, out)
        return out


class _Known:
    """A product known at the tensor `u` itself, until someone writes into `u`."""

    def __init__(self, u: Tensor, product: Tensor) -> None:
        self._u, self._version, self.product = u, u._version, product

    def at(self, u: Tensor) -> bool:
        return u is self._u and u._version == self._version

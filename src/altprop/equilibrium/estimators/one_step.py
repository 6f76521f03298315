"""The one-step gradient and its kin: a truncated Neumann series in place of a solve.

References: Fung et al., "JFB: Jacobian-Free Backpropagation for Implicit Networks", AAAI 2022
(arXiv 2103.12803), which is `k = 1`; Geng et al., "On Training Implicit Models", NeurIPS 2021
(arXiv 2111.05177), the phantom gradient, whose Neumann form with damping `ε` is any `k`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from altprop.equilibrium.estimators.estimator import AbstractAdjointEstimator
from altprop.equilibrium.estimators.problem import Adjoint, Problem
from altprop.equilibrium.levels import worst_level
from altprop.equilibrium.solvers.solver import Result, check_counts
from altprop.errors import ConfigError


@dataclass(frozen=True)
class OneStep(AbstractAdjointEstimator):
    """Take `a = ε Σ_{i<k} (I + εJᵀ)ⁱ g`: biased, and the cheapest gradient that there is.

    It is backprop through the last `k` steps of `z ← z + εF(z)`, all at `z*`; the bias is
    `(I + εJᵀ)ᵏ`, so it vanishes geometrically with `k` where the relaxation converges. With `k=1` a
    backward pass costs one VJP of the recorded force and nothing else.

    **Arguments:** `k`, the number of terms, `k − 1` of which cost a VJP; `certify`, spend one more
    VJP to measure `‖Jᵀa + g‖ / ‖g‖`, in a stack of layers of the worst level relative to its own
    adjoint (the truncation, not a failure to converge, so a training loop that refuses gradients by
    their residual would refuse these; without it the residual is None and the remainder is the last
    term, one product older).
    """

    k: int = 1
    certify: bool = False

    def __post_init__(self) -> None:
        check_counts("OneStep", k=self.k)
        if not isinstance(self.certify, bool):
            raise ConfigError(f"OneStep: certify is {self.certify!r}, expected True or False")

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        term, total, evaluations = cotangent, cotangent, 0
        if self.k > 1 or self.certify:
            products = problem.linearise()
            evaluations = self.k + self.certify
            for _ in range(self.k - 1):
                term = term + problem.step * products.vjp(term)
                total = total + term
            if self.certify:  # the series telescopes: Jᵀa + g is the term after the last
                term = term + problem.step * products.vjp(term)
        value = problem.step * total
        return Adjoint(
            value=value,
            residual=worst_level(term, value, problem.widths) if self.certify else None,
            remainder=term,
            evaluations=evaluations,
            result=Result.FIXED_TIME,
        )

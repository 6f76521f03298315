"""The products with a force's Jacobian at one state, and how autograd gives them for any force."""

from __future__ import annotations

import importlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


class AbstractLinearisation(ABC):
    """The products with a force's Jacobian `J = ∂F/∂z` at one state, `(B, ...) → (B, ...)`."""

    @abstractmethod
    def vjp(self, a: Tensor) -> Tensor:
        """Return `Jᵀa`, detached."""

    @abstractmethod
    def jvp(self, v: Tensor) -> Tensor:
        """Return `Jv`, detached."""

    def inverse(self, *, transposed: bool) -> Callable[[Tensor], Tensor] | None:
        """Return `r ↦ −J⁻¹ r` (or `−J⁻ᵀ r`) if that costs no more than a product, else `None`.

        Where there is one, estimators correct with it instead of relaxing.
        """
        return None


class AutogradLinearisation(AbstractLinearisation):
    """The products of any force, by automatic differentiation.

    **Arguments:** `force`, from a state `(B, ...)` to the force of that shape; `state`, where.
    """

    def __init__(self, force: Callable[[Tensor], Tensor], state: Tensor) -> None:
        self._force, self._state = force, state.detach()
        with torch.enable_grad():
            self._leaf = self._state.clone().requires_grad_()
            self._out = force(self._leaf)

    def vjp(self, a: Tensor) -> Tensor:
        if not self._out.requires_grad:
            return torch.zeros_like(self._state)
        (out,) = torch.autograd.grad(
            self._out, self._leaf, a, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return out

    def jvp(self, v: Tensor) -> Tensor:
        load_forward_mode()
        # the fused attention kernels have no forward-mode derivative
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            pair: tuple[Tensor, ...] = torch.func.jvp(self._force, (self._state,), (v,))
        return pair[1]


@cache
def load_forward_mode() -> None:
    """Load torch's forward-mode formulas, whose import warns of torch's own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")

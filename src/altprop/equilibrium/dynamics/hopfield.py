"""A memory that descends an energy: its Jacobian is symmetric, so plain EP is exact on it.

References: Ramsauer et al., "Hopfield Networks is All You Need", ICLR 2021; the rectified quadratic
memory is that of Hoover et al., "Energy Transformer", NeurIPS 2023, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from altprop.equilibrium.dynamics.dynamics import AbstractDynamics
from altprop.equilibrium.dynamics.plain import is_changed
from altprop.equilibrium.dynamics.products import AbstractLinearisation
from altprop.errors import ConfigError


class HopfieldMemory(AbstractDynamics):
    """Descend `E(z) = ½‖z − x‖² − s Σ relu(z W_m)²`: `F = −∇E = x − z + 2s relu(z W_m) W_mᵀ`.

    `J` is symmetric, so `EP()` needs no correction and `AEP()` finds none to make. Each vector
    along the last axis is a state of its own.

    **Arguments:** `d_model`, the width `C`; `memories`, the columns of `W_m` (default `4 C`);
    `scale`, `s`. Memories start at `N(0, σ²)` with `σ = ½ / (√C + √M) / √(2s)`, which puts the
    spectral norm of what is fed back at about ¼; the energy has its minimum for sure while that
    norm is below 1. **Input and state:** `(B, ..., C)`.
    """

    def __init__(self, d_model: int, memories: int | None = None, scale: float = 1.0) -> None:
        super().__init__()
        count = 4 * d_model if memories is None else memories
        if d_model < 1 or count < 1 or not scale > 0:
            raise ConfigError(
                f"d_model is {d_model}, memories {count}, scale {scale}: all three must be positive"
            )
        self.scale = scale
        std = 0.5 / (d_model**0.5 + count**0.5) / (2 * scale) ** 0.5
        self.W_m = nn.Parameter(std * torch.randn(d_model, count))

    def energy(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the energy of each sample, `(B, ..., C) → (B,)`."""
        stored = (z @ self.W_m).relu().square().flatten(1).sum(1)
        return 0.5 * (z - x).square().flatten(1).sum(1) - self.scale * stored

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x - z + 2 * self.scale * (z @ self.W_m).relu() @ self.W_m.mT

    def linearise(self, z: Tensor, x: Tensor) -> AbstractLinearisation:
        return super().linearise(z, x) if is_changed(self) else _LinearisedMemory(self, z)

    def extra_repr(self) -> str:
        return f"d_model={self.W_m.shape[0]}, memories={self.W_m.shape[1]}, scale={self.scale}"


class _LinearisedMemory(AbstractLinearisation):
    """`J = 2s W_m diag(z W_m > 0) W_mᵀ − I`."""

    @torch.no_grad()
    def __init__(self, memory: HopfieldMemory, z: Tensor) -> None:
        self._weight, self._scale = memory.W_m.detach(), 2 * memory.scale
        self._active = z @ self._weight > 0

    @torch.no_grad()
    def vjp(self, a: Tensor) -> Tensor:
        return self._scale * ((a @ self._weight) * self._active) @ self._weight.mT - a

    def jvp(self, v: Tensor) -> Tensor:
        return self.vjp(v)

"""Where a dynamics' eigenvalues lie: what converges, how fast, and whether physics would get there.

A solver may find a fixed point that the physical relaxation `ż = F(z)` runs away from; only the
spectrum of `J = ∂F/∂z` tells. Nothing here forms `J` of a whole state. What is asked about is the
certificate of a call, with the system and the state of that very call (its further arguments, its
draws of dropout), or any state of a dynamics under an input alone.

Shapes: `B` samples, `T` tokens, `C` channels, `n` numbers per sample, `m ≤ n` Krylov vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from altprop.equilibrium.dynamics.dynamics import AbstractDynamics
from altprop.equilibrium.dynamics.products import load_forward_mode
from altprop.equilibrium.dynamics.system import System
from altprop.equilibrium.estimators.problem import Certificate
from altprop.equilibrium.solvers.solver import in_rows, per_sample, sample_norm
from altprop.errors import ConfigError


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues `μ` of a force's Jacobian, or the outermost of them.

    `values`: `(..., m)`, complex. `residuals`: `‖Jv − μv‖` of each with its unit vector `v`,
    `(..., m)`; zero where the eigenvalues are those of a whole matrix. The properties have the
    shape of the leading axes: `(B,)` of a whole state, `(B, T)` of tokens.
    """

    values: Tensor
    residuals: Tensor

    @property
    def abscissa(self) -> Tensor:
        """The largest real part: the rate at which the slowest (or growing) mode changes."""
        return self.values.real.amax(-1)

    @property
    def radius(self) -> Tensor:
        """The largest modulus."""
        return self.values.abs().amax(-1)

    @property
    def reachable(self) -> Tensor:
        """Whether `ż = F(z)` is drawn to this point: every `Re μ < 0`."""
        return self.abscissa < 0

    def gain(self, step: float) -> Tensor:
        """Return the spectral radius of `I + εJ`: below 1, plain steps of that size converge."""
        return (1 + step * self.values).abs().amax(-1)

    @property
    def step_limit(self) -> Tensor:
        """The `ε` below which Euler steps converge, `min −2 Re μ / |μ|²`; 0 where none does."""
        limits = -2 * self.values.real / self.values.abs().square()
        return limits.amin(-1).clamp_min(0)

    @property
    def residual(self) -> Tensor:
        """The residual of the rightmost or the largest eigenvalue, whichever is worse."""
        rightmost = self.values.real.argmax(-1, keepdim=True)
        largest = self.values.abs().argmax(-1, keepdim=True)
        return self.residuals.gather(-1, torch.cat([rightmost, largest], -1)).amax(-1)


def spectrum(
    of: Certificate | AbstractDynamics,
    z: Tensor | None = None,
    x: Tensor | None = None,
    *,
    dimension: int = 100,
    tol: float = 1e-6,
    seed: int = 0,
) -> Spectrum:
    """Return the outermost eigenvalues of each sample's whole Jacobian, by Arnoldi's iteration.

    It costs one JVP per Krylov vector, all samples at once, and stops early when the rightmost
    and the largest eigenvalue are found to `tol` relative to the largest. Inner eigenvalues are
    approximate, as `residuals` tells. With `dimension` at least `n` all are exact. Highly
    non-normal Jacobians (a layered stack's is defective) have ill-conditioned eigenvalues: there
    `numerical_abscissa` says more.

    **Arguments:** `of`, a call's certificate (`block.certificate`), or a dynamics with `z`, the
    state, `(B, ...)`, and `x`, the input; `dimension`, the most vectors to keep; `tol`; `seed`, of
    the first vector.

    Source: Arnoldi 1951; Saad, "Numerical Methods for Large Eigenvalue Problems", chapter 6.
    """
    system, z = _system(of, z, x)
    with system.recalled():
        return _arnoldi(system.linearise(z).jvp, z, dimension, tol, seed)


def numerical_abscissa(
    of: Certificate | AbstractDynamics,
    z: Tensor | None = None,
    x: Tensor | None = None,
    *,
    dimension: int = 100,
    tol: float = 1e-6,
    seed: int = 0,
) -> Tensor:
    """Return the largest eigenvalue of `(J + Jᵀ)/2` per sample, `(B,)`.

    It bounds how fast a disturbance may grow at first. Below 0, none ever grows; a positive value
    beside a negative abscissa is transient growth, of a Jacobian far from normal.

    **Arguments:** `of`, a call's certificate, or a dynamics with `z`, the state, `(B, ...)`, and
    `x`, the input; `dimension`, the most Krylov vectors to keep, each a JVP and a VJP; `tol`, at
    which it stops, relative to the largest; `seed`, of the first vector.
    """
    system, z = _system(of, z, x)
    with system.recalled():
        products = system.linearise(z)

        def symmetric(v: Tensor) -> Tensor:
            return (products.jvp(v) + products.vjp(v)) / 2

        return _arnoldi(symmetric, z, dimension, tol, seed).abscissa


@torch.no_grad()
def token_spectrum(
    of: Certificate | AbstractDynamics, z: Tensor | None = None, x: Tensor | None = None
) -> Spectrum:
    """Return all eigenvalues of each token's own `C × C` block of the Jacobian, `(B, T, C)`.

    Causality makes `J` block-triangular over tokens, so these are together the eigenvalues of the
    whole `J`, exactly, and say which tokens are hard. It costs `C` JVPs of one token beside a
    cache, for each token.

    **Arguments:** `of`, `z`, `x`, as of `spectrum`; states are `(B, T, C)`.

    **Raises:** `RuleError` for a dynamics without `extend`, as any that is not causal, and for a
    call with further arguments or random draws, which `extend` does not take.
    """
    values = torch.linalg.eigvals(token_blocks(of, z, x))
    return Spectrum(values, torch.zeros_like(values.real))


def _system(
    of: Certificate | AbstractDynamics, z: Tensor | None, x: Tensor | None
) -> tuple[System, Tensor]:
    """Return what is asked about, and the state, `(B, ...)`."""
    if isinstance(of, Certificate):
        if z is not None or x is not None:
            raise ConfigError("a certificate has a state and an input of its own: give it alone")
        if of.system is None:
            raise ConfigError("this certificate is of extend(...): call the block on a window")
        system, z = of.system, of.state
    elif z is None or x is None:
        raise ConfigError("a dynamics was given without z and x: write spectrum(dynamics, z, x)")
    else:
        driven, z = of.under(x.detach()), z.detach()
        with torch.no_grad():  # a stack learns its levels' shapes, and any force what it draws
            driven.start()
            driven.force(z)
        system = driven
    if not z.shape[1:].numel():
        raise ConfigError(f"the state is {tuple(z.shape)}: samples without numbers have no modes")
    return system, z


@torch.no_grad()
def token_blocks(
    of: Certificate | AbstractDynamics, z: Tensor | None = None, x: Tensor | None = None
) -> Tensor:
    """Return the diagonal blocks `∂F_t/∂z_t` of a causal dynamics, `(B, T, C, C)`."""
    system, z = _system(of, z, x)
    if z.dim() != 3:
        raise ConfigError(f"the state is {tuple(z.shape)}, expected (B, T, C)")
    load_forward_mode()
    x = system.x.detach()
    B, T, C = z.shape
    basis = torch.eye(C, dtype=z.dtype, device=z.device).view(C, 1, 1, C).expand(C, B, 1, C)
    cache, blocks = None, []
    with system.recalled():
        for t in range(T):
            own = z[:, t : t + 1]
            extension = system.extend(cache, x[:, t : t + 1])

            def column(v: Tensor, force: Callable[[Tensor], Tensor] = extension.force) -> Tensor:
                pair: tuple[Tensor, ...] = torch.func.jvp(force, (own,), (v,))  # noqa: B023
                return pair[1]

            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
                columns = torch.func.vmap(column)(basis)  # (C, B, 1, C)
            blocks.append(columns.squeeze(2).permute(1, 2, 0))
            cache = extension.remember(own)
    return torch.stack(blocks, 1)


@torch.no_grad()
def _arnoldi(
    apply: Callable[[Tensor], Tensor], like: Tensor, dimension: int, tol: float, seed: int
) -> Spectrum:
    """Return the Ritz values of a linear map on states shaped as `like`, `(B, ...)`."""
    if dimension < 1 or not tol > 0:
        raise ConfigError(f"dimension is {dimension} and tol {tol}: both must be positive")
    generator = torch.Generator("cpu").manual_seed(seed)
    B, n = in_rows(like).shape
    most = min(n, dimension)

    def fresh() -> Tensor:
        return torch.randn(B, n, generator=generator, dtype=torch.float64, device="cpu").to(like)

    v = fresh()
    basis = (v / per_sample(sample_norm(v), v)).unsqueeze(1)  # (B, m, n)
    H = torch.zeros(B, most + 1, most, dtype=torch.float64, device=like.device)
    for m in range(1, most + 1):
        w = in_rows(apply(basis[:, -1].reshape(like.shape)))
        size = sample_norm(w)
        w, along = _orthogonal(w, basis)
        rest = sample_norm(w)
        H[:, :m, m - 1] = along.double()
        # an invariant subspace holds its eigenvalues exactly: go on outside of it, uncoupled
        ended = rest <= 100 * torch.finfo(like.dtype).eps * size.clamp_min(1e-300)
        H[:, m, m - 1] = torch.where(ended, torch.zeros_like(rest), rest).double()
        if m == most or (m % 10 == 0 and _settled(_ritz(H, m), tol)):
            break
        if bool(ended.any()):
            other, _ = _orthogonal(fresh(), basis)
            w = torch.where(per_sample(ended, w), other, w)
        basis = torch.cat([basis, (w / per_sample(sample_norm(w), w)).unsqueeze(1)], 1)
    if m == n:
        H[:, m, m - 1] = 0  # the whole space; what is left is round-off
    found = _ritz(H, m)
    return Spectrum(found.values.to(like.dtype.to_complex()), found.residuals.to(like.dtype))


def _orthogonal(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return `w`, `(B, n)`, without what lies in `basis`, `(B, m, n)`, and how much did, `(B, m)`.

    Done twice, for round-off after once.
    """
    total = torch.zeros_like(basis[:, :, 0])
    for _ in range(2):
        along = torch.einsum("bmn,bn->bm", basis, w)
        w = w - torch.einsum("bmn,bm->bn", basis, along)
        total = total + along
    return w, total


def _ritz(H: Tensor, m: int) -> Spectrum:
    """Return the eigenvalues of the leading `(B, m, m)` with the residuals of their vectors."""
    values, vectors = torch.linalg.eig(H[:, :m, :m])
    residuals = H[:, m, m - 1].abs().unsqueeze(-1) * vectors[:, -1].abs()
    return Spectrum(values, residuals)


def _settled(found: Spectrum, tol: float) -> bool:
    return bool((found.residual <= tol * found.radius).all())

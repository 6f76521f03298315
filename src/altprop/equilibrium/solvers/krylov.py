"""One cycle of GMRES per sample: the linear step that `GMRES` and `NewtonKrylov` share.

Reference: Saad and Schultz, "GMRES", SIAM J. Sci. Stat. Comput. 7 (1986). Every sample has its own
Krylov space, and all of them grow by the same calls of the product; a sample that is done takes no
further part. The small least-squares problems are solved in float64.

Shapes: `B` samples of `n` numbers; a basis is `(B, m, n)`, a Hessenberg matrix `(B, m + 1, m)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from altprop.equilibrium.solvers.solver import in_rows, per_sample, sample_norm


@dataclass(frozen=True)
class Cycle:
    """What a cycle found: `x` with `A x ≈ right`, both `(B, ...)`.

    `left`: `right − A x`, as the recurrence has it. `size`: the largest `‖A v‖` of a unit `v` that
    was met, `(B,)`. `products`: how many were computed.
    """

    x: Tensor
    left: Tensor
    size: Tensor
    products: int


def gmres_cycle(
    product: Callable[[Tensor], Tensor], right: Tensor, goal: Tensor, columns: int
) -> Cycle:
    """Minimise `‖right − A x‖` over a Krylov space of up to `columns` dimensions, from `x = 0`.

    **Arguments:** `product`, `v ↦ A v`, sample by sample, on `(B, ...)`; `right`; `goal`, `(B,)`,
    the norm of `right − A x` at which a sample is done.
    """
    flat = in_rows(right)
    B, n = flat.shape
    columns = min(columns, n)
    norm = sample_norm(right)
    live = torch.isfinite(norm) & (norm > goal) & (norm > 0)
    basis = flat.new_zeros(B, columns + 1, n)
    small = torch.zeros(B, columns + 1, columns, dtype=torch.float64, device=flat.device)
    target = torch.zeros(B, columns + 1, 1, dtype=torch.float64, device=flat.device)
    target[:, 0, 0] = torch.where(live, norm, torch.zeros_like(norm))
    basis[:, 0] = torch.where(live.unsqueeze(1), flat / norm.unsqueeze(1), torch.zeros_like(flat))
    size = torch.zeros_like(norm)
    eps = torch.finfo(flat.dtype).eps
    k, y = 0, target[:, :0]
    while k < columns and bool(live.any()):
        w = in_rows(product(basis[:, k].reshape(right.shape)))
        length = torch.linalg.vector_norm(w, dim=1)
        size = torch.where(live & torch.isfinite(length), torch.maximum(size, length), size)
        # A product that is lost or vanishes ends its sample; its column is a unit vector below the
        # others', so that the least squares stay solvable and give it no weight.
        usable = live & torch.isfinite(length) & (length > eps * size)
        w = torch.where(usable.unsqueeze(1), w, torch.zeros_like(w))
        known = basis[:, : k + 1]
        for _ in range(2):  # Gram and Schmidt twice: once loses orthogonality to rounding
            along = known @ w.unsqueeze(2)
            small[:, : k + 1, k] += along.squeeze(2).double()
            w = w - (along.transpose(1, 2) @ known).squeeze(1)
        rest = torch.linalg.vector_norm(w, dim=1)
        small[:, k + 1, k] = torch.where(usable, rest, torch.ones_like(rest)).double()
        q, r = torch.linalg.qr(small[:, : k + 2, : k + 1])
        solved = torch.linalg.solve_triangular(
            r, q.transpose(1, 2) @ target[:, : k + 2], upper=True
        )
        # a triangle that is singular but for rounding (A v inside the old space) would give any
        # length: keep what the smaller space gave
        pivot = (r[:, k, k].abs() > 10 * eps * size).view(-1, 1, 1)
        sound = pivot & torch.isfinite(solved).all(1, keepdim=True)
        y = torch.where(sound, solved, torch.cat([y, torch.zeros_like(target[:, :1])], 1))
        k += 1
        miss = (target[:, : k + 1] - small[:, : k + 1, :k] @ y).squeeze(2).norm(dim=1)
        grows = rest > 10 * eps * length  # otherwise the space holds the solution already
        grown = (usable & grows).unsqueeze(1)  # also a sample that is done needs it, for `left`
        basis[:, k] = torch.where(grown, w / rest.unsqueeze(1), torch.zeros_like(w))
        live = usable & grows & sound.flatten() & (miss > goal)
    weights = y.to(flat.dtype)
    x = (basis[:, :k].transpose(1, 2) @ weights).squeeze(2)
    image = (small[:, : k + 1, :k] @ y).to(flat.dtype)
    left = flat - (basis[:, : k + 1].transpose(1, 2) @ image).squeeze(2)
    return Cycle(x.reshape(right.shape), left.reshape(right.shape), size, k)


def difference_product(
    force: Callable[[Tensor], Tensor], z: Tensor, f: Tensor, reach: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return `v ↦ (F(z + h v) − F(z))/h`, with `h = reach` per sample, `(B,)`, for unit `v`."""
    h = per_sample(reach, z)
    return lambda v: (force(z + h * v) - f) / h

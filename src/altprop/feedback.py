"""How a feedback matrix is drawn: named initialisations, one private generator per place.

Every draw comes from a CPU generator seeded by (seed, path), so that one seed gives one feedback
whatever else the program draws, on any device, in any order, and whatever defaults it has set for
devices and dtypes: numbers are drawn in float32 and then cast. Sources: Lillicrap et al. 2016
(gaussian), Crafton et al. 2019 (sparse).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from altprop.errors import ConfigError, unknown


def generator_for(seed: int, *place: object) -> torch.Generator:
    """Return a CPU generator that depends on `seed` and `place` alone."""
    text = ":".join(map(str, (seed, *place)))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator("cpu").manual_seed(number)


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw from `N(0, 1)` on the CPU in float32, whatever the program's defaults are."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _haar(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw a semi-orthogonal (rows, columns) matrix from the Haar measure."""
    q, r = torch.linalg.qr(randn(generator, max(rows, columns), min(rows, columns)))
    q[:, r.diagonal() < 0] *= -1  # makes the factorisation unique, hence Haar
    return q if rows >= columns else q.t().contiguous()


def _gaussian(rows: int, columns: int, std: float, k: int | None, g: torch.Generator) -> Tensor:
    return randn(g, rows, columns) * std


def _orthogonal(rows: int, columns: int, std: float, k: int | None, g: torch.Generator) -> Tensor:
    return _haar(rows, columns, g) * (math.sqrt(columns) * std)


def _ortho_he(rows: int, columns: int, std: float, k: int | None, g: torch.Generator) -> Tensor:
    return _haar(rows, columns, g) * math.sqrt(2 / rows)


def _sparse(rows: int, columns: int, std: float, k: int | None, g: torch.Generator) -> Tensor:
    count = min(columns, max(1, columns // 16) if k is None else k)
    scores = torch.empty(rows, columns, dtype=torch.float32, device="cpu").uniform_(generator=g)
    where = scores.topk(count, dim=1).indices
    signs = torch.randint(0, 2, (rows, count), generator=g, device="cpu").float() * 2 - 1
    values = signs * (std * math.sqrt(columns / max(count, 1)))
    return torch.zeros_like(scores).scatter_(1, where, values)


_INITS: dict[str, Callable[[int, int, float, int | None, torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
    "ortho_he": _ortho_he,
    "sparse": _sparse,
}


def check_init(init: str, std: float, k: int | None) -> None:
    """Raise `ConfigError` unless `draw` would accept these."""
    if init not in _INITS:
        raise unknown("feedback initialisation", init, _INITS)
    if not (math.isfinite(std) and std > 0):
        raise ConfigError(f"std must be a positive number, not {std}: write std=0.02")
    if k is not None and k < 1:
        raise ConfigError(f"k, the entries per row of a sparse feedback, must be >= 1, not {k}")


def check_period(calibrate_every: int) -> None:
    """Raise `ConfigError` unless exact steps every so often leave some to the rule."""
    if calibrate_every < 0 or calibrate_every == 1:
        raise ConfigError(
            f"calibrate_every={calibrate_every} would leave no step to the rule: "
            "write 0 (never) or a period of at least 2"
        )


def draw(
    init: str,
    rows: int,
    columns: int,
    generator: torch.Generator,
    *,
    std: float = 0.02,
    k: int | None = None,
) -> Tensor:
    """Draw a (rows, columns) feedback matrix in float32 on the CPU.

    **Arguments:** `init`, one of `gaussian` (`N(0, std²)`), `orthogonal` (Haar semi-orthogonal
    times `√columns · std`), `ortho_he` (times `√(2 / rows)`; `std` is inert), `sparse` (`k` entries
    a row, `max(1, columns // 16)` unless given, each `± std · √(columns / k)`).

    **Raises:** `ConfigError` for an unknown name or a value out of range.
    """
    check_init(init, std, k)
    return _INITS[init](rows, columns, std, k, generator)


def normalised(B: Tensor, std: float, dim: int) -> Tensor:
    """Return `B` with the norm along `dim` that a Gaussian draw of scale `std` has on average."""
    size = torch.linalg.vector_norm(B, dim=dim, keepdim=True).clamp_min(1e-8)
    return B * (std * B.shape[dim] ** 0.5 / size)


def cosine_gradient(B: Tensor, target: Tensor, dim: int | None = None) -> Tensor:
    """Return `∂/∂B Σ (1 − cos(B, target))`, over the whole matrix or over its vectors along `dim`.

    Where either norm is below 1e-8 nothing happens: the gradient there is zero.
    """
    norm = torch.linalg.vector_norm
    b, t = norm(B, dim=dim, keepdim=True), norm(target, dim=dim, keepdim=True)
    ok = (b >= 1e-8) & (t >= 1e-8)
    b, t = torch.where(ok, b, 1.0), torch.where(ok, t, 1.0)
    cos = (B * target).sum(dim=dim, keepdim=True) / (b * t)
    return torch.where(ok, cos * B / b.square() - target / (b * t), 0.0)

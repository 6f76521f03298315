"""How far two gradients agree, and how sure a mean of such figures is.

A figure that means nothing is `None` and says why: a zero gradient has no direction, and one near
the floating-point floor has a random one. Neither ever enters a mean.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from altprop.errors import ConfigError
from altprop.statistics import half_width

FIGURES = ("cosine", "norm_ratio", "relative_error", "sign_agreement")


class Flag(enum.Enum):
    """Why figures are missing; the value says it in words."""

    ZERO = "its gradient is zero"
    NON_FINITE = "its gradient is not finite"
    REFERENCE_ZERO = "the reference is zero"
    REFERENCE_FLOOR = "the reference is near the floating-point floor"
    REFERENCE_NON_FINITE = "the reference is not finite"


@dataclass(frozen=True)
class Agreement:
    """One gradient `ĝ` beside its reference `g`; `None` where a figure is undefined.

    `cosine`; `norm_ratio`, `‖ĝ‖/‖g‖`; `relative_error`, `‖ĝ − g‖/‖g‖`; `sign_agreement`, the
    fraction of the entries with `g ≠ 0` whose signs are equal; `descends`, `gᵀĝ > 0`; `flag`, why
    a figure is missing.
    """

    cosine: float | None = None
    norm_ratio: float | None = None
    relative_error: float | None = None
    sign_agreement: float | None = None
    descends: bool | None = None
    flag: Flag | None = None


def compare(gradient: Tensor, reference: Tensor, floor: float = 0.0) -> Agreement:
    """Compare a gradient with its reference, both of one shape, in float64.

    **Arguments:** `floor`, the norm up to which the reference counts as noise.

    **Raises:** `ConfigError` where the shapes differ.
    """
    if gradient.shape != reference.shape:
        raise ConfigError(
            f"cannot compare a gradient of shape {tuple(gradient.shape)} with a reference of shape "
            f"{tuple(reference.shape)}: both must be gradients of the same parameter"
        )
    g, r = _joined([gradient]), _joined([reference])
    size, own = float(r.norm()), float(g.norm())
    if not math.isfinite(size):
        return Agreement(flag=Flag.REFERENCE_NON_FINITE)
    if size == 0:
        return Agreement(flag=Flag.REFERENCE_ZERO)
    if size <= floor:
        return Agreement(flag=Flag.REFERENCE_FLOOR)
    if not math.isfinite(own):
        return Agreement(flag=Flag.NON_FINITE)
    product = float(g @ r)
    pointed = r != 0
    return Agreement(
        # Rounding may carry a product of parallel vectors past 1.
        cosine=max(-1.0, min(1.0, product / own / size)) if own > 0 else None,
        norm_ratio=own / size,
        relative_error=float((g - r).norm()) / size,
        sign_agreement=float((g.sign() == r.sign())[pointed].double().mean()),
        descends=product > 0,
        flag=None if own > 0 else Flag.ZERO,
    )


def compare_all(
    gradients: Mapping[str, Tensor], references: Mapping[str, Tensor], floor: float | None = None
) -> tuple[dict[str, Agreement], Agreement]:
    """Compare the gradients of every parameter, by name, and all of them as one vector.

    **Arguments:** `floor`, the norm of a parameter's reference, relative to the norm of the whole
    reference, up to which it counts as noise (`None`: `32 eps` of its floating-point type, but at
    most a thousandth, for a gradient that is zero in exact arithmetic keeps a remainder of that
    size).
    """
    if gradients.keys() != references.keys():
        odd = sorted(gradients.keys() ^ references.keys())
        raise ConfigError(f"these parameters have a gradient on one side only: {', '.join(odd)}")
    if not references:
        raise ConfigError("there is no gradient to compare: no parameter is trainable")
    joined = _joined([references[name] for name in references])
    whole = compare(_joined([gradients[name] for name in references]), joined)
    size = float(joined.norm())
    size = size if math.isfinite(size) else 0.0
    named = {}
    for name, reference in references.items():
        share = min(32 * torch.finfo(reference.dtype).eps, 1e-3) if floor is None else floor
        lowest = torch.finfo(reference.dtype).smallest_normal * math.sqrt(reference.numel())
        named[name] = compare(gradients[name], reference, max(share * size, lowest))
    return named, whole


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the numbers of all as one vector; a complex number is two of them."""
    whole = (t.detach().to_dense().cpu() for t in tensors)
    real = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in whole)
    return torch.cat([t.double().flatten() for t in real])


@dataclass(frozen=True)
class Summary:
    """The mean of a figure over trials, with what a mean hides.

    `half_width`: of the 95 % confidence interval (Student's t; `None` for fewer than two values).
    `worst`: the value farthest from ideal. `count`: how many values had the figure.
    """

    mean: float | None
    half_width: float | None
    worst: float | None
    count: int


def summarise(figure: str, values: Sequence[float | None]) -> Summary:
    """Summarise one of the `FIGURES` over trials; undefined values are left out."""
    known = [v for v in values if v is not None]
    if not known:
        return Summary(None, None, None, 0)
    mean = math.fsum(known) / len(known)
    return Summary(
        mean, half_width(known), max(known, key=lambda v: _distance(figure, v)), len(known)
    )


def _distance(figure: str, value: float) -> float:
    """Return how far a figure is from that of the reference itself."""
    if figure == "norm_ratio":
        return abs(math.log(value)) if value > 0 else math.inf
    return value if figure == "relative_error" else 1 - value


@dataclass(frozen=True)
class Agreements:
    """The agreements of one parameter, or of the whole gradient, over trials."""

    trials: Sequence[Agreement]
    figures: Mapping[str, Summary] = field(init=False)

    def __post_init__(self) -> None:
        found = {f: summarise(f, [getattr(t, f) for t in self.trials]) for f in FIGURES}
        object.__setattr__(self, "figures", found)

    @property
    def descends(self) -> float | None:
        """The fraction of the trials with `gᵀĝ > 0`."""
        known = [t.descends for t in self.trials if t.descends is not None]
        return sum(known) / len(known) if known else None

    @property
    def flags(self) -> dict[Flag, int]:
        """How many trials miss a figure, by why."""
        return dict(Counter(t.flag for t in self.trials if t.flag is not None))

"""What every contract is written in: requirements that say in words what is broken.

They are no `assert`s, which vanish under `python -O`.
"""

from __future__ import annotations

import pickle
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def require(holds: bool, text: str) -> None:
    if not holds:
        raise AssertionError(text)


def present(value: T | None, text: str) -> T:
    """Return the value, which is required to be there."""
    if value is None:
        raise AssertionError(text)
    return value


def close(got: Tensor, wanted: Tensor, rtol: float, text: str) -> None:
    """Require `‖got − wanted‖ ≤ rtol ‖wanted‖`."""
    error, size = float((got - wanted).norm()), float(wanted.norm())
    require(error <= rtol * size, f"{text}: off by {error:.3g} of {size:.3g} (rtol {rtol:g})")


def randn(shape: Any, generator: torch.Generator, like: Tensor) -> Tensor:
    draw = torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device)
    return draw.to(like.device)


def check_value(part: Any) -> None:
    """Check that a part is a value: immutable, comparable, hashable and picklable."""
    name = next(iter(part.__dataclass_fields__), "anything")
    try:
        setattr(part, name, None)
    except AttributeError:
        pass
    else:
        raise AssertionError(f"{part} can be changed: write @dataclass(frozen=True)")
    twin = pickle.loads(pickle.dumps(part))
    require(twin == part, f"{part} does not survive pickling: {twin}")
    require(hash(twin) == hash(part), f"equal values of {part} hash differently")

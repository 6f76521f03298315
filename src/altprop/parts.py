"""A step of several passes: which samples of its joint batch the pass that runs now sees.

What is drawn for a batch, or is not linear in it, is then the joint batch's, however the processes
and their passes share it: GrAPE's probes and estimates, a hinge's probes, the number of the pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class Part:
    """Samples `before`, …, `before + count − 1` of the `total` of a joint batch.

    **Arguments:** `first` and `last`, of the passes that this process makes of the step; `group`,
    the process group over which a step is shared (`None`: this process makes it alone); `sums`,
    what is added up over the passes of one step, which are given the same one.
    """

    before: int
    count: int
    total: int
    first: bool = True
    last: bool = True
    group: Any = None
    sums: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> slice:
        """The samples in the joint batch."""
        return slice(self.before, self.before + self.count)

    @property
    def share(self) -> float:
        """How much of the joint batch they are."""
        return self.count / self.total


_NOW: list[Part] = []


@contextmanager
def seeing(part: Part) -> Iterator[None]:
    """Let forward and backward passes know which part of a joint batch they see.

    The loss of each pass must be its mean times the pass's share of what this process sees, and the
    gradients be averaged over the processes: then they are the joint batch's.
    """
    _NOW.append(part)
    try:
        yield
    finally:
        _NOW.pop()


def now() -> Part | None:
    """Return the part that the running pass sees, or `None` where it is a step by itself."""
    return _NOW[-1] if _NOW else None

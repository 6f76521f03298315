"""What a learning rule is: an immutable value that decides what `.backward()` writes.

A rule meets a network at one of three seams, and there is no fourth: `transport` (what a linear
map sends back to its input), `broadcast` (what a tapped output receives from the error), and
`adjoint` (what an equilibrium receives from its cotangent).
"""

from __future__ import annotations

from abc import ABC
from typing import ClassVar, Literal

Seam = Literal["transport", "broadcast", "adjoint"]


class AbstractRule(ABC):
    """Base of every learning rule.

    A concrete rule is a frozen dataclass: its constructor checks and stores its arguments, and one
    method computes. It is a value: equal arguments make equal rules, and no call changes one.
    """

    seam: ClassVar[Seam]

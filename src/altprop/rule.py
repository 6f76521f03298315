"""What a learning rule is: an immutable value that decides what `.backward()` writes.

A rule meets a network at one of three seams, and there is no fourth: `transport` (what a linear
map sends back to its input), `broadcast` (what a tapped output receives from the error), and
`adjoint` (what an equilibrium receives from its cotangent).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from altprop.errors import RuleError
from altprop.layouts import spread_error as spread_error

Seam = Literal["transport", "broadcast", "adjoint"]


@dataclass(frozen=True)
class Site:
    """A place that needs a feedback matrix: its module path and the matrix's shape.

    **Fields:** `path`, of the module in the model, from which with the seed the matrix is drawn;
    `rows`, `columns`, its shape: of a transport (out, in), as the weight's; of a broadcast
    (features, k), `k` being the error's width.
    """

    path: str
    rows: int
    columns: int


class Scope(Protocol):
    """What `convert` shows a rule of the model, and the changes that a rule may ask for.

    Nothing is changed while rules plan: `convert` first hears every rule, raises once if any
    place was refused, and only then acts. `Any` stands for a handle that a rule passes back.
    """

    def maps(self) -> Iterable[Any]:
        """The linear maps that this rule was given, the output excepted for a broadcast."""

    def blocks(self) -> Iterable[Any]:
        """The blocks that this rule was given."""

    def maps_in(self, block: Any) -> Iterable[Any]:
        """The linear maps inside a block, but for those that an earlier pattern keeps."""

    def sublayers(self, block: Any) -> Iterable[Any]:
        """The modules of a block whose outputs are its summed residuals; refuses if unknown."""

    def keep(self, place: Any) -> None:
        """Leave a linear map to plain backprop."""

    def transport(self, place: Any) -> None:
        """Let this rule say what a linear map sends to its input."""

    def tap(self, places: Iterable[Any], *, at: Any = None) -> None:
        """Let the error reach these maps or modules; the error is taken at the output of the
        block `at`, else where `convert` was told that the logits are made."""

    def stack(self) -> None:
        """Make the blocks that the pattern names one layered equilibrium, whose estimator this
        rule is."""

    def refuse(self, path: str, why: str) -> None:
        """Record a problem; `convert` raises one error that lists all of them."""


class AbstractRule(ABC):
    """Base of every learning rule.

    A concrete rule is a frozen dataclass: its constructor checks and stores its arguments, and one
    method computes. It is a value: equal arguments make equal rules, and no call changes one.
    """

    seam: ClassVar[Seam]

    @property
    def takes(self) -> frozenset[str]:
        """What a name pattern hands to this rule: "maps" (linear maps), "blocks", or both."""
        return frozenset({"maps"})

    @abstractmethod
    def plan(self, scope: Scope) -> None:
        """Ask `scope` for the changes that put this rule into a model."""


class AbstractTransport(AbstractRule):
    """A rule for linear maps: `g ↦ g M`, the cotangent that a map sends to its input.

    A concrete rule gives `matrix`; with feedback also `draw`; with learned feedback also
    `learned = True` and `feedback_gradient`; with a draw at every pass also `noisy` and `noise`.
    """

    seam: ClassVar[Seam] = "transport"
    learned: ClassVar[bool] = False
    """Whether the feedback is a parameter that the user's optimiser moves."""
    signal: ClassVar[str] = "random feedback"
    """What parameters below a map receive, in the words of `explain`."""

    @property
    def noisy(self) -> bool:
        """Whether `noise` must be drawn anew at every recorded pass."""
        return False

    def plan(self, scope: Scope) -> None:
        for place in scope.maps():
            scope.transport(place)

    def draw(self, site: Site, generator: torch.Generator) -> Tensor | None:
        """Draw the feedback `B` (out, in) on the CPU, or none."""
        return None

    def noise(self, site: Site, generator: torch.Generator) -> Tensor:
        """Draw what one pass needs, on the CPU."""
        raise RuleError(f"{type(self).__name__} is noisy but has no noise()")

    @abstractmethod
    def matrix(self, W: Tensor, B: Tensor | None, noise: Tensor | None) -> Tensor:
        """Return `M` (out, in), by which the cotangent `g` is multiplied on its way down."""

    def feedback_gradient(
        self, W: Tensor, B: Tensor, grad_W: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        """Return the gradient of a learned `B`, same shape."""
        raise RuleError(f"{type(self).__name__} has no learned feedback")


class AbstractBroadcast(AbstractRule):
    """A rule for tapped outputs: `(e, B) ↦ e Bᵀ`, straight from the error to a place.

    A concrete rule gives `draw` and `plan`; the properties below say where the error is taken and
    what else reaches the tap, each with the plainest answer as its default.
    """

    seam: ClassVar[Seam] = "broadcast"
    learned: ClassVar[bool] = False
    signal: ClassVar[str] = "broadcast error"

    @property
    def sends(self) -> bool:
        """Whether a tapped linear map still sends the exact `g W` to its input."""
        return True

    @property
    def at_head_input(self) -> bool:
        """Whether the error is the gradient at the head's input rather than at its output."""
        return False

    @property
    def one_feedback(self) -> bool:
        """Whether all taps slice one matrix."""
        return False

    @property
    def width(self) -> int | None:
        """The features of a tapped block, where they cannot be read off its last linear map."""
        return None

    @property
    def period(self) -> int:
        """Every how many recorded forward passes one is exact backprop; 0 for never."""
        return 0

    @abstractmethod
    def draw(self, site: Site, generator: torch.Generator) -> Tensor:
        """Draw the feedback `B` (features, k) on the CPU."""

    def cotangent(self, e: Tensor, B: Tensor, shape: torch.Size) -> Tensor:
        """Return the cotangent `e Bᵀ` of a tap of this shape, its axes in the order of `e`'s."""
        return (spread_error(e, shape) @ B.t().to(e.dtype)).expand(shape)

    def estimates(self, probe: Probe, seed: int, step: int) -> Sequence[Tensor | None] | None:
        """Measure, before a recorded pass, what each tap's `B` should move towards, or nothing."""
        return None

    def feedback_gradient(self, B: Tensor, estimate: Tensor) -> Tensor:
        """Return the gradient of a learned `B`, same shape."""
        raise RuleError(f"{type(self).__name__} has no learned feedback")


class Probe(Protocol):
    """Forward-mode derivatives of the error's place with respect to each tap, all rules off."""

    taps: Sequence[Site]

    def push(self, tap: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw a Gaussian tangent `p` at a tap and return it with `J p`.

        Shapes: (..., features) and (..., k), the leading axes of both in the order of the error's;
        `spread_error` gives `J p` those that it lacks. In a data-parallel pass, or one that sees a
        part of a batch, of its own samples.
        """

    def average(self, estimate: Tensor) -> Tensor | None:
        """Turn a mean over this pass's samples, at the last tap, into that over the joint batch.

        `None` where further passes of the same step are to come: the last one knows the mean.
        """

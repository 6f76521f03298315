"""How an error reaches its taps: they are collected along a forward pass and joined at its end.

One autograd node takes the error's place and every tap (`assign.assign_taps`), so no module hook
and no shared state survives the pass; whatever was collected is dropped when the forward ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from altprop.assign import assign_taps
from altprop.conversion.probes import JacobianProbe, LayoutProbe, in_backward
from altprop.errors import RuleError
from altprop.layouts import OTHERWISE, SEVERAL, Fit, Layout, Shape, fit, fits, misfit, undecided
from altprop.rule import AbstractBroadcast, Site


class Tap(Protocol):
    """A place that hears the error; `on`, whether its rule is in force."""

    site: Site
    index: int
    on: bool


class Channel:
    """The way of one error to the taps of one rule."""

    def __init__(
        self, rule: AbstractBroadcast, seed: int, shared: str, layouts: tuple[Layout, ...]
    ) -> None:
        self.rule = rule
        self.seed = seed
        self.shared = shared  # the root's attribute that all taps slice, or ""
        self.layouts = layouts  # the user's, of which the first that fits counts; or none
        self.known_layouts: dict[int, Layout] = {}  # by site, since shapes or a probe told
        self.members: list[Tap] = []
        self.probe: JacobianProbe | LayoutProbe | None = None
        self.clear()

    def clear(self) -> None:
        self.mode: Literal["idle", "rule", "exact"] = "idle"
        self.joined = False
        self.call: tuple[nn.Module, Any, Any] | None = None
        self.matrix: Tensor | None = None
        self.taps: list[Tensor] = []
        self.indices: list[int] = []
        self.feedback: list[Tensor] = []
        self.which: list[int] = []
        self.places: dict[int, int] = {}
        self.estimates: list[Tensor | None] = []
        self.measured: Sequence[Tensor] | None = None

    @property
    def sites(self) -> list[Site]:
        """The sites of all taps, each at its tap's `index`."""
        return [tap.site for tap in self.members]

    @property
    def on(self) -> bool:
        """Whether any tap is in force."""
        return any(tap.on for tap in self.members)

    def forget(self, tap: Tap) -> None:
        """Let a tap go, whose place is on backprop from now on."""
        self.members.remove(tap)
        self.known_layouts.clear()
        for index, left in enumerate(self.members):
            left.index = index

    def begin(self, root: nn.Module, args: Any, kwargs: Any, exact: bool = False) -> None:
        """Start to collect for the recorded forward pass `root(*args, **kwargs)`."""
        self.call = root, args, kwargs
        self.mode = "exact" if exact else "rule"
        if self.shared:
            self.matrix = getattr(root, self.shared)

    def push(self, tap: Tensor, B: Tensor | None, index: int, rows: slice | None = None) -> None:
        """Collect a tap with its feedback, or with its rows of the shared one (`B` is none).

        **Arguments:** `B` (features, k); `index`, of the tap's site; `rows`, of `B` if the tap is
        only a part of its site.
        """
        count = self.members[index].site.rows
        # taps of one feedback share one product: the error is multiplied once for all of them
        key = index if B is not None else -count
        if rows is not None or key not in self.places:
            B = self.matrix if B is None else B
            assert B is not None
            place = len(self.feedback)
            self.feedback.append(B[:count] if rows is None else B[rows])
            self.estimates.append(None if self.measured is None else self.measured[index])
        else:
            place = self.places[key]
        if rows is None:
            self.places[key] = place
        if self.mode == "rule":
            self.taps.append(tap)
            self.indices.append(index)
            self.which.append(place)

    def join(self, error: Tensor) -> Tensor:
        """Return the error's tensor, from which the cotangent now also reaches every tap."""
        if self.probe is not None:
            self.probe.catch(error)
            return error
        if self.mode == "idle" or not torch.is_grad_enabled():
            return error
        if self.joined:
            raise RuleError(
                "the output was computed twice in one forward pass, so that the error has no one "
                "place: name a module that runs once as output=..."
            )
        if self.feedback and error.shape[-1] != self.feedback[0].shape[1]:
            have, width = error.shape[-1], self.feedback[0].shape[1]
            raise RuleError(
                f"the error has {have} features, but the feedback was drawn for {width}: write "
                f"revert(model) and convert it again, a block of that width with features={have}"
            )
        taps, want, groups = [], None, []
        for tap, index in zip(self.taps, self.indices, strict=True):
            if tap.shape[:-1] != want:  # most taps of a model have the same leading axes
                want = tap.shape[:-1]
                groups = self._groups(error.shape, tap.shape)
            taps.append(self._choose(groups, index, error.shape, tap.shape).turn(tap))
        self.joined = True
        joined = assign_taps(error, taps, self.which, self.feedback, self.estimates, self.rule)
        self.taps, self.indices, self.which, self.feedback, self.estimates = [], [], [], [], []
        return joined

    def _groups(self, error: Shape, tap: Shape) -> list[list[Fit]]:
        """Return the ways to lay an error on a tap that the shapes, or the user, leave open."""
        have, want = tuple(error[:-1]), tuple(tap[:-1])
        if not self.layouts:
            return fits(have, want)
        found = [fit(have, want, layout) for layout in self.layouts]
        return [[f] for f in found if f is not None][:1]

    def _choose(self, groups: list[list[Fit]], index: int, error: Shape, tap: Shape) -> Fit:
        path = self.sites[index].path
        if not groups:
            raise misfit(path, error, tap, self.layouts)
        if len(groups) == 1:
            self._learn(index, groups[0])
            return groups[0][0]
        if index not in self.known_layouts:
            self._measure_layouts()
        known = self.known_layouts.get(index)
        found = [f for group in groups for f in group if f.layout == known]
        if not found:
            raise undecided(path, error, tap, OTHERWISE if known is None else SEVERAL)
        return found[0]

    def _learn(self, index: int, told: list[Fit]) -> None:
        """Remember what shapes told, if no axis of one element hides which layout it is."""
        if torch.compiler.is_compiling() or any(size < 2 for size in told[0].fine):
            return
        known = self.known_layouts.setdefault(index, told[0].layout)
        if known not in [f.layout for f in told]:
            self.known_layouts[index] = (-1, -1)  # none: it has several

    def lay(self, index: int, error: Shape, tap: Shape) -> Fit:
        """Return how an error of this shape lies on a tap of that site.

        **Raises:** `RuleError` if it does not fit, or if it stays open which axis counts samples.
        """
        return self._choose(self._groups(error, tap), index, error, tap)

    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="the shapes leave open which axis counts the samples, and only a pass that is not "
        "compiled can measure it: write convert(..., batch_axis=0), or run one such pass before"
    )
    def _measure_layouts(self) -> None:
        assert self.call is not None
        self.known_layouts.update(LayoutProbe(self, *self.call).measure())

    def finish(self) -> None:
        """Check, at the end of a forward pass, that every tap will hear the error."""
        if self.feedback:
            raise RuleError(
                f"{len(self.feedback)} tapped outputs were computed after the output module, or "
                "it never ran: name as output=... the module that makes the logits (if it was "
                "replaced or reverted: write revert(model) and convert again)"
            )

    def missed(self, path: str, weights: Iterable[Tensor]) -> None:
        """Refuse that a part with trainable weights runs unrecorded while this pass is collected.

        Reentrant activation checkpointing does so, and its recomputation would come too late.
        """
        if self.mode != "idle" and any(weight.requires_grad for weight in weights):
            raise RuleError(
                f"{path} ran without recording inside a recorded forward: reentrant activation "
                "checkpointing hides it from the error; write use_reentrant=False"
            )

    def outside(self, path: str) -> None:
        """Refuse a recorded pass that no error can reach; let recomputations through."""
        if torch.is_grad_enabled() and not in_backward():
            raise RuleError(
                f"{path} ran outside the forward of the model that was converted, so no error can "
                "reach it: call the whole model, or wrap the call in rules_off or torch.no_grad()"
                ", or revert this part"
            )

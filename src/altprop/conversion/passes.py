"""One recorded forward pass: its taps are collected on the way and joined to the error at its end.

A pass is made where the forward begins and dropped where it ends, so nothing of it survives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altprop.assign import assign_map, assign_taps
from altprop.conversion.channel import Call, Channel, Run, Tap
from altprop.conversion.outputs import closed, keeping
from altprop.conversion.probes import measure_layouts
from altprop.conversion.record import weights_of
from altprop.conversion.sites import redrawn
from altprop.conversion.unheard import say_what_is_not_heard
from altprop.errors import RuleError
from altprop.layouts import Fit
from altprop.recording import hooked
from altprop.transforms import wants_gradient


class Pass(Run):
    """What is collected for the error of one channel.

    **Arguments:** `exact`, whether this pass is plain backprop (a calibration); `measured`, by
    site, what a learned feedback moves towards.
    """

    def __init__(
        self,
        channel: Channel,
        call: Call,
        exact: bool = False,
        measured: Sequence[Tensor | None] | None = None,
    ) -> None:
        super().__init__(channel, call)
        self.exact, self.measured = exact, measured
        self.around: Run | None = None
        self.joined = False
        self.matrix: Tensor | None = getattr(call[0], channel.shared) if channel.shared else None
        self.taps: list[Tensor] = []
        self.indices: list[int] = []  # of the taps' sites
        self.which: list[int] = []  # of the taps' feedback
        self.feedback: list[Tensor] = []
        self.estimates: list[Tensor | None] = []
        self.places: dict[int, int] = {}
        self.waiting = 0  # taps that the error has not reached

    def open(self) -> None:
        """Let the channel's places report to this pass, and to none around it."""
        self.around, self.channel.running = self.channel.running, self
        if self.channel.rule.period:
            self.channel.exact = self.exact

    def close(self) -> None:
        self.channel.running = self.around

    def map(
        self,
        tap: Tap,
        m: nn.Module,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        rows: slice | None,
    ) -> Tensor:
        if not self._hears(tap, [W]):
            return F.linear(x, W, b)
        count = tap.site.rows if rows is None else rows.stop - rows.start
        if W.shape[0] != count:
            raise redrawn(tap.site, (count, W.shape[1]), W.shape)
        y, silent = assign_map(x, W, b, send=self.channel.rule.sends, exact=self.exact)
        self.push(tap.turned(silent), tap.feedback(m, [W]), tap.index, rows)
        return y

    def cut(self, tap: Tap, m: nn.Module, hidden: Tensor) -> Tensor:
        if not self._hears(tap, m.parameters()):
            return hidden
        if hidden.shape[-1] != tap.site.rows:
            raise RuleError(
                f"{tap.site.path} returned {hidden.shape[-1]} features but its feedback was "
                f"drawn for {tap.site.rows}: give the rule features={hidden.shape[-1]}"
            )
        self.push(hidden, tap.feedback(m, weights_of(m)), tap.index)
        return hidden if self.exact else hidden.detach()

    def rest(self, tap: Tap, m: nn.Module, extra: Tensor) -> Tensor:
        cut = tap.on and torch.is_grad_enabled() and not self.exact
        return closed(extra, tap.site.path, m) if cut else extra

    def _hears(self, tap: Tap, weights: Iterable[Tensor]) -> bool:
        if tap.on and not torch.is_grad_enabled():
            self.missed(tap.site.path, weights)
            return False
        return tap.on

    def push(self, tap: Tensor, B: Tensor | None, index: int, rows: slice | None = None) -> None:
        """Collect a tap with its feedback, or with its rows of the shared one (`B` is none).

        **Arguments:** `B` (features, k); `index`, of the tap's site; `rows`, of `B` if the tap is
        only a part of its site.
        """
        count = self.channel.members[index].site.rows
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
        self.waiting += 1
        if not self.exact:
            self.taps.append(tap)
            self.indices.append(index)
            self.which.append(place)

    def join(self, error: Tensor) -> Tensor:
        """Return the error's tensor, from which the cotangent now also reaches every tap."""
        if not torch.is_grad_enabled():
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
        if not torch.compiler.is_compiling() and not (self.channel.heard or self.exact):
            self.channel.heard = True
            say_what_is_not_heard(self.channel, self.call[0], self.indices, [error, *self.taps])
        taps, self.joined, self.waiting = self._laid(error), True, 0
        # A checkpoint around the output alone repeats it where no pass collects anything.
        with keeping() if hooked() else contextlib.nullcontext():
            return assign_taps(
                error, taps, self.which, self.feedback, self.estimates, self.channel.rule
            )

    def _laid(self, error: Tensor) -> list[Tensor]:
        """Return the taps with their leading axes in the order of the error's."""
        taps, want = [], None
        ways: list[list[Fit]] = []
        for tap, index in zip(self.taps, self.indices, strict=True):
            if tap.shape[:-1] != want:  # most taps of a model have the same leading axes
                want = tap.shape[:-1]
                ways = self.channel.ways(error.shape, tap.shape)
            fit = self.channel.choose(ways, index, error.shape, tap.shape, self._measure)
            taps.append(fit.turn(tap))
        return taps

    def _measure(self) -> None:
        measure_layouts(self.channel, self.call)

    def finish(self) -> None:
        """Check, at the end of a forward pass, that every tap will hear the error."""
        if self.waiting:
            raise RuleError(
                f"{self.waiting} tapped outputs were computed after the output module, or "
                "it never ran: name as output=... the module that makes the logits (if it was "
                "replaced or reverted: write revert(model) and convert again)"
            )

    def missed(self, path: str, weights: Iterable[Tensor]) -> None:
        """Refuse that a part with trainable weights runs unrecorded while this pass is collected.

        Reentrant activation checkpointing does so, and its recomputation would come too late.
        """
        if any(map(wants_gradient, weights)):
            raise RuleError(
                f"{path} ran without recording inside a recorded forward: reentrant activation "
                "checkpointing hides it from the error; write use_reentrant=False"
            )

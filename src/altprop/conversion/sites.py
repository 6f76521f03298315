"""The places of rules that a converted module holds: a transported map, a tapped map or output.

Places are plain data with one method, which the module's role (`roles.py`) calls in its forward;
so deepcopy and pickle need no help.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altprop.assign import assign_map, assign_transport
from altprop.conversion.channel import Channel
from altprop.conversion.record import count_pass, sites_of, weights_of
from altprop.errors import RuleError
from altprop.feedback import generator_for
from altprop.rule import AbstractTransport, Site


def _feedback(
    place: TransportSite | MapTap | OutputTap,
    module: nn.Module,
    learned: bool,
    weights: Iterable[Tensor],
) -> Tensor | None:
    """Return a place's feedback, if it has its own; a learned one learns only while a weight does.

    What the user froze stays frozen; what `convert` froze learns again when the weight does.
    """
    B: Tensor | None = getattr(module, place.name) if place.name else None
    if B is None or not learned:
        return B
    if not any(weight.requires_grad for weight in weights):
        return B.detach()
    if place.held:
        _release(place, B)
    return B


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _release(place: TransportSite | MapTap | OutputTap, B: Tensor) -> None:
    if isinstance(B, nn.Parameter):
        B.requires_grad_()
        place.held = False


@dataclass
class TransportSite:
    """A linear map whose input receives what a transport rule sends."""

    site: Site
    rule: AbstractTransport
    name: str
    """The module's attribute that holds the feedback, or nothing."""
    seed: int
    noisy: bool
    held: bool = False
    """Whether `convert` froze a learned feedback, since its weight was frozen."""
    on: bool = True
    """Whether the rule is in force; `rules_off` turns it."""

    def __call__(
        self, module: nn.Module, x: Tensor, W: Tensor, b: Tensor | None, rows: slice | None = None
    ) -> Tensor:
        if not (self.on and torch.is_grad_enabled()):
            return F.linear(x, W if rows is None else W[rows], b)
        B = _feedback(self, module, self.rule.learned, [W])
        if B is not None and B.shape != W.shape:
            raise _redrawn(self.site, B.shape, W.shape)
        noise = self.noise(module, W) if self.noisy else None
        return assign_transport(x, W, b, self.rule, B, noise, rows)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def noise(self, module: nn.Module, W: Tensor) -> Tensor:
        generator = generator_for(self.seed, self.site.path, "noise", count_pass(module))
        with torch.device("cpu"):
            return self.rule.noise(Site(self.site.path, *W.shape), generator).to(W)


@dataclass(eq=False)
class MapTap:
    """A linear map whose weight learns from a broadcast error."""

    site: Site
    channel: Channel
    name: str
    index: int
    held: bool = False
    swapped: bool = False
    """Whether `x` has the caller's first two axes swapped; the tap then has them as he does."""
    on: bool = True

    def __call__(
        self, module: nn.Module, x: Tensor, W: Tensor, b: Tensor | None, rows: slice | None = None
    ) -> Tensor:
        channel = self.channel
        W = W if rows is None else W[rows]
        if channel.probe is not None:
            return self._turned(channel.probe.drop(self._turned(F.linear(x, W, b)), self.index))
        if not self.on:
            return F.linear(x, W, b)
        if not torch.is_grad_enabled():
            channel.missed(self.site.path, [W])
            return F.linear(x, W, b)
        if channel.mode == "idle":
            channel.outside(self.site.path)
        count = self.site.rows if rows is None else rows.stop - rows.start
        if W.shape[0] != count:
            raise _redrawn(self.site, (count, W.shape[1]), W.shape)
        y, tap = assign_map(x, W, b, send=channel.rule.sends, exact=channel.mode == "exact")
        if channel.mode != "idle":
            B = _feedback(self, module, channel.rule.learned, [W])
            channel.push(self._turned(tap), B, self.index, rows)
        return y

    def _turned(self, y: Tensor) -> Tensor:
        return y.transpose(0, 1) if self.swapped else y


@dataclass(eq=False)
class OutputTap:
    """A module whose output is cut: it goes on without its graph, and hears the error instead."""

    site: Site
    channel: Channel
    name: str
    index: int
    held: bool = False
    on: bool = True

    def __call__(self, module: nn.Module, out: Any) -> Any:
        hidden = out if isinstance(out, Tensor) else out[0]
        channel = self.channel
        if channel.probe is not None:
            cut = channel.probe.drop(hidden, self.index)
        elif not self.on:
            return out
        elif channel.mode == "idle":
            channel.outside(self.site.path)
            return out
        elif not torch.is_grad_enabled():
            channel.missed(self.site.path, module.parameters())
            return out
        else:
            if hidden.shape[-1] != self.site.rows:
                raise RuleError(
                    f"{self.site.path} returned {hidden.shape[-1]} features but its feedback was "
                    f"drawn for {self.site.rows}: give the rule features={hidden.shape[-1]}"
                )
            B = _feedback(self, module, channel.rule.learned, weights_of(module))
            channel.push(hidden, B, self.index)
            cut = hidden if channel.mode == "exact" else hidden.detach()
        if isinstance(out, Tensor):
            return cut
        return type(out)((cut, *out[1:]))


def _redrawn(site: Site, drawn: Sequence[int], now: Sequence[int]) -> RuleError:
    return RuleError(
        f"{site.path or 'this map'}: its weight has the shape {tuple(now)}, but its feedback was "
        f"drawn for {tuple(drawn)}: write revert(model) and convert it again"
    )


def refuse_unrecorded(module: nn.Module) -> None:
    """Refuse for all parts of a module that will not be called to refuse for themselves.

    Without recording no rule acts, so that a fast path may take their place, but not in a pass
    that is collected: see `Channel.missed`.
    """
    if torch.is_grad_enabled():
        return
    for part in module.modules():
        for tap in sites_of(part).values():
            if isinstance(tap, MapTap | OutputTap):
                tap.channel.missed(tap.site.path, part.parameters())

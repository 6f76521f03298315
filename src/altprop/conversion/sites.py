"""The places of rules that a converted module holds: a transported map, a tapped map or output.

Places are plain data with one method, which the module's role (`roles.py`) calls in its forward;
so deepcopy and pickle need no help.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altprop.assign import assign_map, assign_transport
from altprop.conversion.channel import Channel, refuse_outside
from altprop.conversion.outputs import closed, on_first
from altprop.conversion.record import Description, count_pass, sites_of
from altprop.errors import RuleError
from altprop.feedback import generator_for
from altprop.parts import now
from altprop.recording import hooked
from altprop.rule import AbstractBroadcast, AbstractTransport, Site
from altprop.transforms import wants_gradient


@dataclass(frozen=True)
class LinearMap:
    """How a layer keeps a matrix by which it multiplies: the names of its parameters."""

    weight: str = "weight"
    bias: str = "bias"
    transposed: bool = False
    """Whether the weight is stored as (in, out)."""
    name: str = ""
    """What the map is called below its layer, where that has several."""

    @property
    def key(self) -> str:
        """By what a record knows the map: the one of a layer as its weight."""
        return self.weight if self.name else "weight"

    def of(self, layer: nn.Module) -> tuple[Any, Any]:
        """Return the weight (out, in) and the bias, or none."""
        W, b = getattr(layer, self.weight, None), getattr(layer, self.bias, None)
        b = b if isinstance(b, Tensor) else None  # a flag, as `self.bias = False`, is none
        return W.t() if self.transposed and W is not None else W, b


@dataclass(eq=False, kw_only=True)
class _Held:
    """A place, and the feedback that its module holds for it."""

    site: Site
    name: str
    """The module's attribute that holds the feedback, or nothing."""
    held: bool = False
    """Whether `convert` froze a learned feedback, since its weight was frozen."""
    stored: LinearMap | None = None
    """Of a map, how its module keeps it."""
    on: bool = True
    """Whether the rule is in force; `rules_off` turns it."""

    def _feedback(
        self, module: nn.Module, learned: bool, weights: Iterable[Tensor]
    ) -> Tensor | None:
        """Return the place's own feedback, if any; a learned one learns only while a weight does.

        What the user froze stays frozen; what `convert` froze learns again when the weight does.
        """
        B: Tensor | None = getattr(module, self.name) if self.name else None
        if B is None:
            return None
        if not (learned and any(map(wants_gradient, weights))):
            return B.detach() if wants_gradient(B) else B
        if self.held:
            self._release(B)
        return B

    def leave(self) -> None:
        """Let the place go, which is on backprop from now on."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _release(self, B: Tensor) -> None:
        if isinstance(B, nn.Parameter):
            B.requires_grad_()
            self.held = False


@dataclass(eq=False, kw_only=True)
class TransportSite(_Held):
    """A linear map whose input receives what a transport rule sends."""

    rule: AbstractTransport
    seed: int

    def __call__(
        self, module: nn.Module, x: Tensor, W: Tensor, b: Tensor | None, rows: slice | None = None
    ) -> Tensor:
        if not (self.on and torch.is_grad_enabled()):
            return F.linear(x, W if rows is None else W[rows], b)
        B = self._feedback(module, self.rule.learned, [W])
        if B is not None and B.shape != W.shape:
            raise redrawn(self.site, B.shape, W.shape)
        noise = None
        if self.rule.noisy:
            noise = self.noise(module, W)
            if B is not None and self.rule.learned and more_to_come():
                B = B.detach()  # it learns from the noise alone, the same in every pass of a step
        return assign_transport(x, W, b, self.rule, B, noise, rows)

    def describe(self, module: nn.Module) -> Description:
        B: Tensor | None = getattr(module, self.name) if self.name else None
        drawn = B is not None or self.rule.noisy
        kind = "drawn at every pass" if self.rule.noisy else "from the weight"
        kind = "learned" if self.rule.learned else kind if B is None else "fixed"
        return Description(
            type(self.rule).__name__,
            below=self.rule.signal,
            carries=False,
            feedback=None if B is None else tuple(B.shape),
            kind=kind,
            seed=self.seed if drawn else None,
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def noise(self, module: nn.Module, W: Tensor) -> Tensor:
        generator = generator_for(self.seed, self.site.path, "noise", count_pass(module))
        with torch.device("cpu"):
            return self.rule.noise(Site(self.site.path, *W.shape), generator).to(W)


@dataclass(eq=False, kw_only=True)
class _Tap(_Held):
    """A place that hears a channel's error; what it does there is up to the running pass."""

    channel: Channel
    index: int
    swapped: bool = False
    """Whether `x` has the caller's first two axes swapped; the tap then has them as he does."""

    @property
    def rule(self) -> AbstractBroadcast:
        return self.channel.rule

    def feedback(self, module: nn.Module, weights: Iterable[Tensor]) -> Tensor | None:
        return self._feedback(module, self.rule.learned, weights)

    def leave(self) -> None:
        self.channel.forget(self)

    def turned(self, y: Tensor) -> Tensor:
        return y.transpose(0, 1) if self.swapped else y

    def describe(self, module: nn.Module) -> Description:
        return Description(
            type(self.rule).__name__,
            feedback=(self.site.rows, self.site.columns),
            kind=("learned" if self.rule.learned else "fixed")
            + ", shared" * bool(self.channel.shared),
            seed=self.channel.seed,
        )


@dataclass(eq=False, kw_only=True)
class MapTap(_Tap):
    """A linear map whose weight learns from a broadcast error."""

    def __call__(
        self, module: nn.Module, x: Tensor, W: Tensor, b: Tensor | None, rows: slice | None = None
    ) -> Tensor:
        W = W if rows is None else W[rows]
        if (running := self.channel.running) is not None:
            return running.map(self, module, x, W, b, rows)
        if not (self.on and torch.is_grad_enabled()):
            return F.linear(x, W, b)
        refuse_outside(self.site.path)
        return assign_map(x, W, b, send=self.rule.sends, exact=self.channel.exact)[0]

    def describe(self, module: nn.Module) -> Description:
        sends = self.rule.sends
        below = "" if sends else "none, but for paths around every map"
        told = super().describe(module)
        return replace(told, own=self.rule.signal, below=below, carries=sends)


@dataclass(eq=False, kw_only=True)
class OutputTap(_Tap):
    """A module whose output is cut: it goes on without its graph, and hears the error instead."""

    def __call__(self, module: nn.Module, out: Any) -> Any:
        if (running := self.channel.running) is not None:
            return on_first(
                lambda hidden: running.cut(self, module, hidden),
                out,
                self.site.path,
                lambda extra: running.rest(self, module, extra),
            )
        if not self.on:
            return out
        refuse_outside(self.site.path)
        if not (torch.is_grad_enabled() and hooked()) or self.channel.exact:
            return out
        # a checkpoint recomputes, and must find the graph where it was cut
        path = self.site.path
        return on_first(Tensor.detach, out, path, lambda extra: closed(extra, path, module))

    def describe(self, module: nn.Module) -> Description:
        return replace(super().describe(module), below="local backprop inside a block", cuts=True)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def more_to_come() -> bool:
    """Tell whether further passes over the same batch follow."""
    part = now()
    return part is not None and not part.last


def redrawn(site: Site, drawn: Sequence[int], now: Sequence[int]) -> RuleError:
    return RuleError(
        f"{site.path or 'this map'}: its weight has the shape {tuple(now)}, but its feedback was "
        f"drawn for {tuple(drawn)}: write revert(model) and convert it again"
    )


def refuse_unrecorded(module: nn.Module) -> None:
    """Refuse for all parts of a module that will not be called to refuse for themselves.

    Without recording no rule acts, so that a fast path may take their place, but not in a pass
    that is collected: see `Pass.missed`.
    """
    if torch.is_grad_enabled():
        return
    for part in module.modules():
        for tap in sites_of(part).values():
            if isinstance(tap, _Tap) and tap.channel.running is not None:
                tap.channel.running.missed(tap.site.path, part.parameters())

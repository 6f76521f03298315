"""What a converted module becomes: its own class with a role in front, the same parameters within.

A role is a mixin whose forward asks the rule; `site_class` puts roles before a module's class in a
class that pickles by its parts. Roles hold plain data, so deepcopy and pickle need no help.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from altprop.assign import assign_map, assign_transport
from altprop.channel import Channel
from altprop.errors import RuleError
from altprop.feedback import generator_for
from altprop.probes import JacobianProbe, in_backward
from altprop.rule import AbstractTransport, Site
from altprop.transforms import refuse_transforms

STEP = "B_step"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _count(module: nn.Module) -> int:
    """Return the number of this recorded pass; a checkpoint's recomputation repeats the last."""
    refuse_transforms("a rule that draws or measures at every pass cannot count its passes")
    step = cast(Tensor, getattr(module, STEP))
    if in_backward():
        if "_altprop_counted" not in module.__dict__:
            raise RuleError(
                f"a {type(module).__name__} whose rule draws at every pass was never recorded "
                "before the backward pass: reentrant activation checkpointing hides it; write "
                "use_reentrant=False"
            )
        return int(step) - 1
    module.__dict__["_altprop_counted"] = True
    number = int(step)
    step += 1
    return number


def weights_of(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters in a module, feedback excepted."""
    for part in module.modules():
        feedback = part.__dict__.get("_altprop_names", ())
        for name, parameter in part.named_parameters(recurse=False):
            if name not in feedback:
                yield parameter


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
        generator = generator_for(self.seed, self.site.path, "noise", _count(module))
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


class Role:
    """Base of the mixins: keeps old state dicts loadable, and says what a module became."""

    _altprop_names: tuple[str, ...]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing_keys, *rest
        )
        own = {prefix + name for name in self._altprop_names}
        missing_keys[:] = [key for key in missing_keys if key not in own]

    def extra_repr(self) -> str:
        text: str = super().extra_repr()  # type: ignore[misc]
        maps = getattr(self, "_altprop_maps", {})
        rules = {
            str(m.rule if isinstance(m, TransportSite) else m.channel.rule) for m in maps.values()
        }
        return ", ".join([text] * bool(text) + [f"rule={rule}" for rule in sorted(rules)])


class LinearRole(Role):
    """An `nn.Linear` (or `LocalLinear`) whose map a rule owns."""

    _altprop_maps: dict[str, Any]

    def forward(self, input: Tensor) -> Tensor:
        m: Any = self
        return self._altprop_maps["weight"](m, input, m.weight, m.bias)


class TransposedLinearRole(Role):
    """A Hugging Face `Conv1D`, whose weight is stored as (in, out)."""

    _altprop_maps: dict[str, Any]

    def forward(self, x: Tensor) -> Tensor:
        m: Any = self
        return self._altprop_maps["weight"](m, x, m.weight.t(), m.bias)


class TapRole(Role):
    """A block or sublayer whose output is a tap."""

    _altprop_tap: OutputTap

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        return self._altprop_tap(cast(nn.Module, self), out)


class OutputRole(Role):
    """The module at whose output (or input) the error is taken."""

    _altprop_outputs: list[Channel]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        for channel in self._altprop_outputs:
            if channel.rule.at_head_input:
                input = channel.join(input)
        out = super().forward(input, *args, **kwargs)  # type: ignore[misc]
        for channel in self._altprop_outputs:
            if not channel.rule.at_head_input:
                out = channel.join(out)
        return out


class RootRole(Role):
    """The model that was converted: its forward opens and closes every collection."""

    _altprop_channels: list[Channel]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        channels = [channel for channel in self._altprop_channels if channel.on]
        if not channels or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        try:
            if any(c.rule.period or c.rule.learned for c in channels):
                self._schedule(channels, args, kwargs)
            else:
                for channel in channels:
                    channel.begin(cast(nn.Module, self), args, kwargs)
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
            for channel in channels:
                channel.finish()
            return out
        finally:
            for channel in channels:
                channel.clear()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _schedule(self, channels: list[Channel], args: Any, kwargs: Any) -> None:
        """Decide whether this pass is a calibration; if not, let learned feedback be measured."""
        root = cast(nn.Module, self)
        step = _count(root)
        plans = []
        for channel in channels:  # all are measured before any starts to collect
            period = channel.rule.period
            exact = period > 0 and step % period == period - 1
            measured = None
            if channel.rule.learned and not exact:
                probe = JacobianProbe(channel, root, args, kwargs)
                measured = channel.rule.estimates(probe, channel.seed, step)
            plans.append((channel, exact, measured))
        for channel, exact, measured in plans:
            channel.begin(root, args, kwargs, exact)
            channel.measured = measured


class LocalRole(Role):
    """A block that takes the error at its own output, for the linear maps inside it."""

    _altprop_local: Channel

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        channel = self._altprop_local
        if channel.probe is not None:
            return self._joined(channel, args, kwargs)
        if not channel.on or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        channel.begin(cast(nn.Module, self), args, kwargs)
        try:
            return self._joined(channel, args, kwargs)
        finally:
            channel.clear()

    def _joined(self, channel: Channel, args: Any, kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if isinstance(out, Tensor):
            return channel.join(out)
        return type(out)((channel.join(out[0]), *out[1:]))


def sites_of(module: nn.Module) -> dict[str, TransportSite | MapTap | OutputTap]:
    """Return the places of rules that a module itself holds: by its weights' names, its output's
    under an empty one."""
    own = module.__dict__
    sites = dict(own.get("_altprop_maps", {}))
    if "_altprop_tap" in own:
        sites[""] = own["_altprop_tap"]
    if isinstance(own.get("_site"), TransportSite):  # a LocalLinear's own
        sites["weight"] = own["_site"]
    return sites


_BASE = "_altprop_base"  # where a class that was made here keeps the one that it was made of
_CLASSES: dict[tuple[type, ...], type[nn.Module]] = {}


def add_roles(module: nn.Module, roles: tuple[type[Role], ...]) -> None:
    """Put these roles, outermost first, before a module's own class.

    A class that a parametrisation has put around that one stays around it, where torch seeks it.
    """
    cls = type(module)
    if is_parametrized(module):
        module.__class__ = _rebased(cls, (site_class(cls.__bases__[0], roles),))
    else:
        module.__class__ = site_class(cls, roles)


def remove_roles(module: nn.Module) -> None:
    """Take every role out of a module's class; what others have put around it since stays."""
    module.__class__ = _without_roles(type(module))


def _without_roles(cls: type) -> type:
    if _BASE in cls.__dict__:
        return cast(type, cls.__dict__[_BASE])
    if not issubclass(cls, Role):
        return cls
    return _rebased(cls, tuple(_without_roles(base) for base in cls.__bases__))


def _rebased(cls: type, bases: tuple[type, ...]) -> type:
    """Return a class like one that was made for a single module, on other bases."""
    body = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, body)


def site_class(base: type[nn.Module], roles: tuple[type[Role], ...]) -> type[nn.Module]:
    """Return the class of a `base` with these roles in front of it, outermost first."""
    key = (base, *roles)
    if key not in _CLASSES:
        _CLASSES[key] = _make_class(base, roles)
    return _CLASSES[key]


def _maker(kind: type) -> type:
    """Return the metaclass, on that of a module's class, of what `site_class` makes.

    To call such a class is to make a plain module: `type(model).from_pretrained(...)` and
    `type(model)(config)` know nothing of the places that one module was given.
    """

    class Maker(kind):  # type: ignore[misc]
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            base = next(c for c in cls.__mro__ if not issubclass(c, Role))
            return base(*args, **kwargs)

    return Maker


def _make_class(base: type[nn.Module], roles: tuple[type[Role], ...]) -> type[nn.Module]:

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # the class has no importable name: pickle and deepcopy rebuild it from its parts
        parts: tuple[Any, ...] = base.__reduce_ex__(self, protocol)  # type: ignore[assignment]
        _, args, *rest = parts
        return (_rebuild, (base, roles, *args[1:]), *rest)

    @functools.wraps(base.forward)  # trainers read the signature to choose a batch's columns
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return super(cls, self).forward(*args, **kwargs)  # type: ignore[misc]

    # torch.compile limits recompilations per code object, so each class gets one of its own
    plain = cast(types.FunctionType, forward)
    plain.__code__ = plain.__code__.replace(co_name=f"forward_{base.__name__}")
    body = {
        "__reduce_ex__": __reduce_ex__, "forward": forward, "__module__": base.__module__,
        _BASE: base,
    }  # fmt: skip
    if issubclass(roles[0], (LinearRole, TransposedLinearRole)):
        del body["forward"]
    cls = cast(type[nn.Module], _maker(type(base))(base.__name__, (*roles, base), body))
    cls.__qualname__ = base.__qualname__
    return cls


def _rebuild(base: type[nn.Module], roles: tuple[type[Role], ...], *args: Any) -> nn.Module:
    cls = site_class(base, roles)
    return cls.__new__(cls, *args)

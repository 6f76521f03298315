"""The roles that modules of a converted model play: mixins whose forward asks the rule.

`add_roles` puts roles before a module's class in a class that pickles by its parts; `remove_roles`
takes them out again. What a role asks are the places that its module holds (`sites.py`).
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from altprop.conversion.channel import Call, Channel
from altprop.conversion.outputs import on_first
from altprop.conversion.passes import Pass
from altprop.conversion.probes import JacobianProbe
from altprop.conversion.record import Converted, count_pass
from altprop.errors import RuleError


class Role:
    """Base of the mixins: keeps old state dicts loadable, and says what a module became."""

    _altprop: Converted
    _altprop_argument: str
    """What the first argument of the class's own forward is called."""

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
        own = {prefix + name for name in self._altprop.names}
        missing_keys[:] = [key for key in missing_keys if key not in own]

    @property
    def qconfig(self) -> Any:
        """Refuse `torch.ao`'s quantisation, which looks types up exactly and would pass this by."""
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        raise RuleError(
            f"torch.ao does not know a converted {type(self).__name__} and would leave it as it "
            "is: quantise altprop.revert(copy.deepcopy(model))"
        )

    def extra_repr(self) -> str:
        text: str = super().extra_repr()  # type: ignore[misc]
        maps = [site for key, site in self._altprop.sites.items() if key]
        rules = {str(site.rule) for site in maps}
        return ", ".join([text] * bool(text) + [f"rule={rule}" for rule in sorted(rules)])


def given(role: Role, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any]:
    """Return the one argument of a layer that is a linear map, by position or by its own name."""
    if len(args) == 1 and not kwargs:
        return args
    name = role._altprop_argument
    if args or list(kwargs) != [name]:
        raise TypeError(
            f"a converted {type(role).__name__} is one linear map and takes one argument, {name}, "
            f"not {len(args)} by position and {list(kwargs)} by name"
        )
    return (kwargs[name],)


class LinearRole(Role):
    """A layer that is one linear map, which a rule owns."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        site, m = self._altprop.sites["weight"], cast(nn.Module, self)
        if kwargs or len(args) != 1:
            args = given(self, args, kwargs)
        return cast(Tensor, site(m, args[0], *site.stored.of(m)))


class TapRole(Role):
    """A block or sublayer whose output is a tap."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        return self._altprop.sites[""](self, out)


class OutputRole(Role):
    """The module at whose output (or input) the error is taken."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        channels = self._altprop.outputs
        (input,) = given(self, args, kwargs)
        for channel in channels:
            if channel.rule.at_head_input:
                input = channel.join(input)
        out = super().forward(input)  # type: ignore[misc]
        for channel in channels:
            if not channel.rule.at_head_input:
                out = channel.join(out)
        return out


class LocalRole(Role):
    """A block that takes the error at its own output, for the linear maps inside it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        return on_first(cast(Channel, self._altprop.local).join, out, type(self).__name__)


class RootRole(Role):
    """The model that was converted, or a `LocalRole`: its forward is the pass of its channels."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        channels = [channel for channel in self._altprop.channels if channel.on]
        if not channels or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        call = (cast(nn.Module, self), args, kwargs)
        if any(c.rule.period or c.rule.learned for c in channels):
            passes = self._scheduled(channels, call)
        else:
            passes = [Pass(channel, call) for channel in channels]
        try:
            for one in passes:
                one.open()
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
            for one in passes:
                one.finish()
            return out
        finally:
            for one in passes:
                one.close()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _scheduled(self, channels: list[Channel], call: Call) -> list[Pass]:
        """Decide whether this pass is a calibration; if not, let learned feedback be measured."""
        step, passes = count_pass(call[0]), []
        for channel in channels:  # all are measured before any starts to collect
            rule, period = channel.rule, channel.rule.period
            exact = period > 0 and step % period == period - 1
            measured = None
            if rule.learned and not exact:
                measured = rule.estimates(JacobianProbe(channel, call), channel.seed, step)
            passes.append(Pass(channel, call, exact, measured))
        return passes


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

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return super(cls, self).forward(*args, **kwargs)  # type: ignore[misc]

    # torch.compile limits recompilations per code object, so each class gets one of its own
    plain = cast(types.FunctionType, forward)
    plain.__code__ = plain.__code__.replace(co_name=f"forward_{base.__name__}")
    functools.update_wrapper(plain, base.forward)
    # trainers read the signature to choose a batch's columns; who undoes wrappers stops here
    del plain.__wrapped__  # type: ignore[attr-defined]
    signature = inspect.signature(base.forward)
    plain.__signature__ = signature  # type: ignore[attr-defined]
    first = [*signature.parameters, "input", "input"][1]  # after self
    body = {
        "__reduce_ex__": __reduce_ex__, "forward": forward, "__module__": base.__module__,
        _BASE: base, "_altprop_argument": first,
    }  # fmt: skip
    if issubclass(roles[0], LinearRole):
        del body["forward"]
    cls = cast(type[nn.Module], _maker(type(base))(base.__name__, (*roles, base), body))
    cls.__qualname__ = base.__qualname__
    return cls


def _rebuild(base: type[nn.Module], roles: tuple[type[Role], ...], *args: Any) -> nn.Module:
    cls = site_class(base, roles)
    return cls.__new__(cls, *args)

"""Whether modules compute what their classes say, so that closed forms may stand for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as _module
from torch.nn.utils.parametrize import type_before_parametrizations

FORCE = frozenset({"forward", "combine", "attended"})
_FORWARD = ("_forward_hooks", "_forward_pre_hooks")
_HOOKS = (*_FORWARD, "_backward_hooks", "_backward_pre_hooks")
_MADE, _OBSERVES = "parametrizations", "_altprop_observes"


Kinds = Mapping[str, Collection[type[nn.Module]]]


def is_changed(root: nn.Module) -> bool:
    """Tell whether the force may be another than its class says: no closed form is of it then.

    Methods were put in place on an instance, or hooks may change what a module is given or gives.
    """
    return is_overridden(root, FORCE) or is_hooked(root)


def is_overridden(root: nn.Module, methods: frozenset[str]) -> bool:
    """Tell whether any of these methods was put in place on the instance of any module."""
    return not all(methods.isdisjoint(vars(m)) for m in root.modules())


def is_watched(root: nn.Module) -> bool:
    """Tell whether something is to happen at the calls of any module, or at reads of its weights.

    Hooks may want to see a call, and they or parametrisations may make weights that are to be
    recorded with it.
    """
    if _module._has_any_global_hook():
        return True
    return any(_acts(m, _HOOKS) or _MADE in vars(m)["_modules"] for m in root.modules())


def is_hooked(root: nn.Module) -> bool:
    """Tell whether hooks may change what any module is given or gives out."""
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return True
    return any(_acts(m, _FORWARD) for m in root.modules())


def observing(hook: Callable[..., None]) -> Callable[..., None]:
    """Mark a hook that changes nothing, so that closed forms may stand for what it observes."""
    setattr(hook, _OBSERVES, True)
    return hook


def _acts(m: nn.Module, names: Collection[str]) -> bool:
    own: dict[str, Any] = vars(m)
    hooks = (hook for name in names for hook in (own.get(name) or {}).values())
    return not all(getattr(hook, _OBSERVES, False) for hook in hooks)


def consists_of(root: nn.Module, kinds: Kinds) -> bool:
    """Tell whether all modules below `root` are what closed forms are of.

    Each is exactly of a kind that has its name, lacks no weight or bias, and norms the last axis
    alone if it is a norm.
    """
    return all(
        type_before_parametrizations(m) in kinds.get(name, ())
        and all(p is not None for p in m._parameters.values())
        and len(vars(m).get("normalized_shape", "1")) == 1
        for name, m in _parts(root)
    )


def _parts(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in root.named_children():
        if name != _MADE:
            yield name, child
            yield from _parts(child)

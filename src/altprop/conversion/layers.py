"""Which layers are linear maps, and how each keeps them: a table that `register_layer` extends.

What has no row stays on backprop, and `convert` says so unless a pattern chose the places.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from altprop.conversion.attention import AttentionRole, why_not
from altprop.conversion.roles import LinearRole, Role
from altprop.conversion.sites import LinearMap
from altprop.errors import ConfigError, in_a_line
from altprop.linear import LocalLinear

BACKPROP = "keep it on backprop by a pattern of its own, with Backprop(), put first"


@dataclass(frozen=True)
class Row:
    """How to give rules to the maps of one type of layer."""

    maps: Callable[[Any], list[LinearMap]] = lambda layer: [LinearMap()]
    role: type[Role] = LinearRole
    why_not: Callable[[Any], str] = lambda layer: ""
    """What keeps this one layer from it, or nothing."""


def _local(layer: LocalLinear) -> str:
    told = f"this LocalLinear has method {layer.method!r}: build it with method='bp'"
    return told if layer.method != "bp" else ""


def _projections(layer: nn.MultiheadAttention) -> list[LinearMap]:
    names = ["in_proj"] if layer.in_proj_weight is not None else ["q_proj", "k_proj", "v_proj"]
    return [LinearMap(f"{name}_weight", "in_proj_bias", name=name) for name in names]


# by type, or by name where the library may not be there
_ROWS: dict[type | str, Row] = {
    nn.Linear: Row(),
    NonDynamicallyQuantizableLinear: Row(),
    LocalLinear: Row(why_not=_local),
    "transformers.pytorch_utils.Conv1D": Row(lambda layer: [LinearMap(transposed=True)]),
    nn.MultiheadAttention: Row(_projections, AttentionRole, why_not),
}


def register_layer(
    kind: type[nn.Module],
    *,
    weight: str = "weight",
    bias: str = "bias",
    transposed: bool = False,
) -> None:
    """Tell `convert` that a type of layer is one linear map, `x ↦ x Wᵀ + b`, which rules may have.

    A subclass of a registered type is another layer, which needs a call of its own. For a layer
    that does more, hold an `nn.Linear` in it: then `convert` finds that one.

    **Arguments:** `kind`, a subclass of `nn.Module`; `weight`, `bias`, the names of its parameters
    (there may be no bias); `transposed`, whether the weight is stored as (in, out).

    **Raises:** `ConfigError` for anything but a type of module. That a layer computes something
    else is refused by `convert`, which tries it on random vectors, alone and with tokens.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ConfigError(f"register_layer takes a subclass of nn.Module, not {kind!r}")
    stored = LinearMap(weight, bias, transposed)
    _ROWS[kind] = Row(lambda layer: [stored], why_not=lambda layer: _is_other(layer, stored))


@torch.no_grad()
def _is_other(layer: nn.Module, stored: LinearMap) -> str:
    """Say in what a layer is not the map that it was registered as, if anything."""
    W, b = stored.of(layer)
    told = f"register_layer({type(layer).__name__}, weight={stored.weight!r}, ...)"
    if not isinstance(W, torch.Tensor) or W.dim() != 2:
        return f"{told}: it has no matrix of that name"
    width = W.shape[1]
    other = f"{told}: its forward is another than x Wᵀ + b of weight and bias={stored.bias!r}"
    count = 3 if width != 3 else 4  # of tokens: an axis that cannot be taken for the features'
    for shape in ((2, width), (2, count, width), (2, width, count)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(W)
        try:
            with torch.random.fork_rng(devices=[]):
                y = layer.forward(x)
        except Exception as fault:
            if len(shape) == 2:
                return f"{told}: it does not take two vectors ({in_a_line(fault)})"
            continue  # not every layer takes tokens, and none shall take features elsewhere
        if shape[-1] != width:
            if isinstance(y, torch.Tensor) and y.shape == (2, len(W), count):
                return f"{other}, along the last axis"
        elif not _close(y, F.linear(x, W, b)):
            return other
    return ""


def _close(got: object, want: torch.Tensor) -> bool:
    if not isinstance(got, torch.Tensor) or got.shape != want.shape:
        return False
    return torch.allclose(got, want, rtol=1e-2, atol=1e-2)


def row_of(layer: nn.Module) -> tuple[Row | None, str]:
    """Return the row of a layer's type, if any, and why the row does not hold for this layer."""
    kind = type(layer)
    row = _ROWS.get(kind) or _ROWS.get(f"{kind.__module__}.{kind.__qualname__}")
    if row is not None:
        return row, ""
    base = next((base for base in kind.__mro__ if base in _ROWS), None)
    return (None, "") if base is None else (_ROWS[base], _unknown(kind, base))


def _unknown(kind: type, base: type) -> str:
    name = f"nn.{base.__name__}" if base.__module__.startswith("torch.nn") else base.__name__
    return f"{kind.__name__} is a subclass of {name} whose forward is not known: {BACKPROP}"


# layers that hold a matrix whatever its name, and those whose `weight` multiplies no vector
_MATRICES = (_ConvNd, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
NO_MATRICES = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
_NAMES = re.compile("weight|proj|kernel")


def _holds_matrix(module: nn.Module) -> bool:
    """Say whether a module itself, and not one within it, multiplies by some matrix of its own."""
    if isinstance(module, _MATRICES):
        return True
    return not isinstance(module, NO_MATRICES) and any(
        bool(_NAMES.search(name)) and (is_lazy(parameter) or parameter.dim() > 1)
        for name, parameter in module.named_parameters(recurse=False)
    )


def others(
    model: nn.Module, maps: Iterable[nn.Module], inside: Iterable[str]
) -> list[tuple[str, nn.Module]]:
    """Return, with their paths, what in the modules `inside` holds a matrix and is no map."""
    known = {id(module) for module in maps}
    within = tuple(path + "." if path else "" for path in inside)
    return [
        (path or "the model itself", module)
        for path, module in model.named_modules()
        if id(module) not in known and f"{path}.".startswith(within) and _holds_matrix(module)
    ]

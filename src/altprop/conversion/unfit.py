"""What of a model no rule can take: weights without a shape or values, and other kinds of layers.

The first are refused before anything is changed; the second stay on backprop, and `convert` says
so unless a pattern chose the places.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

COMPLEX = (
    "its weight is complex, and feedback is real: keep it on backprop by a pattern of its own, "
    "with Backprop(), put first"
)

# layers that hold a matrix whatever its name, and those whose `weight` multiplies no vector
_MATRICES = (_ConvNd, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
_NO_MATRICES = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
_NAMES = re.compile("weight|proj|kernel")


def unready(parts: Iterable[nn.Module], weights: Iterable[Tensor]) -> str:
    """Say what the weights lack, if anything, for a feedback to be drawn for them."""
    if any(isinstance(part, LazyModuleMixin) for part in parts):
        return "lazy, without a shape yet: run one batch through the model, then convert"
    if any(weight.is_meta for weight in weights):
        return "on the meta device, without values: materialise the model, then convert"
    return ""


def real(tensors: Iterable[Tensor]) -> Tensor:
    """Return the first tensor of real numbers, for the dtype and device of a feedback."""
    tensors = list(tensors)
    return next((t for t in tensors if t.is_floating_point()), tensors[0])


def holds_matrix(module: nn.Module) -> bool:
    """Say whether a module itself, and not one within it, multiplies by some matrix of its own."""
    if isinstance(module, _MATRICES):
        return True
    return not isinstance(module, _NO_MATRICES) and any(
        bool(_NAMES.search(name)) and (is_lazy(parameter) or parameter.dim() > 1)
        for name, parameter in module.named_parameters(recurse=False)
    )


def others(model: nn.Module, maps: Iterable[nn.Module], inside: Iterable[str]) -> list[str]:
    """Return, as `path (Kind)`, what in the modules `inside` holds a matrix and is no map."""
    known = {id(module) for module in maps}
    within = tuple(path + "." if path else "" for path in inside)
    return [
        f"{path or 'the model itself'} ({type(module).__name__})"
        for path, module in model.named_modules()
        if id(module) not in known and f"{path}.".startswith(within) and holds_matrix(module)
    ]

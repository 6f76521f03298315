"""What `convert` leaves at a module: one record, under one key, past state dicts and parameters.

It is plain data; so deepcopy and pickle need no help.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from altprop.conversion.channel import Channel
from altprop.equilibrium.module import CONVERTED
from altprop.errors import RuleError
from altprop.parts import now
from altprop.recording import in_backward
from altprop.transforms import refuse_transforms

STEP = "B_step"


@dataclass(eq=False)
class Converted:
    """What a module became."""

    root: bool = False
    """Whether it is the whole of what was given to `convert`."""
    call: Conversion | None = None
    """What else was given, if it is."""
    names: list[str] = field(default_factory=list)
    """The attributes that were added: feedback, and a count of passes."""
    rooms: list[str] = field(default_factory=list)
    """Those that took the place of an empty buffer."""
    sites: dict[str, Any] = field(default_factory=dict)
    """The places of rules, by their weights' names; that of the module's output by an empty one."""
    channels: list[Channel] = field(default_factory=list)
    """Those that this module's forward opens and closes."""
    outputs: list[Channel] = field(default_factory=list)
    """Those whose error is taken at this module."""
    local: Channel | None = None
    """That whose error is taken at this block, for the maps inside it."""
    stacks: list[Any] = field(default_factory=list)
    """Chains of blocks in this model that are one equilibrium each."""
    counted: bool = False
    """Whether a recorded pass was counted before any backward pass."""


@dataclass(frozen=True)
class Conversion:
    """The arguments of one call of `convert`, by which it can be made again."""

    rule: Any
    """A rule, or a mapping of name patterns to rules."""
    output: str | None
    seed: int
    solver: Any
    on_failure: str | None
    batch_axis: int | tuple[int, int] | None


@dataclass(frozen=True)
class Description:
    """What the place of a rule gives to its own parameters, and to what runs before it."""

    rule: str
    own: str = ""
    """The signal that its own parameters receive; empty for whatever comes from above."""
    below: str = ""
    """The signal that it sends on; empty for whatever comes from above."""
    cuts: bool = False
    """Whether nothing but `below` gets past it."""
    carries: bool = True
    """Whether its weight's exact transpose carries what is sent on."""
    feedback: tuple[int, ...] | None = None
    kind: str = ""
    seed: int | None = None


def record_of(module: nn.Module) -> Converted | None:
    """Return what `convert` left at this module itself, or none."""
    return module.__dict__.get(CONVERTED)


def sites_of(module: nn.Module) -> dict[str, Any]:
    """Return the places of rules that a module itself holds."""
    own = module.__dict__.get("_site")  # a LocalLinear's
    record = record_of(module)
    return ({"weight": own} if own is not None else {}) | ({} if record is None else record.sites)


def weights_of(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters in a module, feedback excepted."""
    for part in module.modules():
        record = record_of(part)
        for name, parameter in part.named_parameters(recurse=False):
            if record is None or name not in record.names:
                yield parameter


def parts_of(module: nn.Module, weight: str) -> list[Tensor]:
    """Return the parameters that a module's weight is, or is computed from, the largest first.

    Of a computed one, by a parametrisation or by hooks, each reading is another tensor, which
    learns only if it was computed while gradients were recorded.
    """
    parts: list[Tensor]
    if is_parametrized(module, weight):
        parts = list(cast(nn.ModuleDict, module.parametrizations)[weight].parameters())
    else:
        own = dict(module.named_parameters(recurse=False))
        names = [weight] if weight in own else [n for n in own if n.startswith(f"{weight}_")]
        parts = [own[name] for name in names]
    return sorted(parts, key=Tensor.numel, reverse=True) or [getattr(module, weight)]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def count_pass(module: nn.Module) -> int:
    """Return the number of this recorded pass.

    A checkpoint's recomputation repeats the last, and so does a pass that sees a further part of
    the same batch.
    """
    refuse_transforms("a rule that draws or measures at every pass cannot count its passes")
    step, record = cast(Tensor, getattr(module, STEP)), cast(Converted, record_of(module))
    if in_backward():
        if not record.counted:
            raise RuleError(
                f"a {type(module).__name__} whose rule draws at every pass was never recorded "
                "before the backward pass: reentrant activation checkpointing hides it; write "
                "use_reentrant=False"
            )
        return int(step) - 1
    if record.counted and (part := now()) is not None and not part.first:
        return int(step) - 1
    record.counted = True
    number = int(step)
    step += 1
    return number

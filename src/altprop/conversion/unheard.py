"""Places that the error cannot reach, since their modules never run though their weights are read.

A role acts where its module is called: `F.linear(x, self.qkv.weight)` goes past it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor, nn

from altprop.conversion.channel import Channel
from altprop.conversion.outputs import leaves, origin
from altprop.conversion.record import sites_of, weights_of
from altprop.errors import RuleWarning, listed


def say_what_is_not_heard(
    channel: Channel, root: nn.Module, heard: Iterable[int], ends: Iterable[Tensor]
) -> None:
    """Warn of members that have not run in a pass whose graph reads their weights all the same.

    A module that a pass skips altogether (an expert, a dropped layer) is none, and neither is a
    weight that it shares with a module elsewhere.

    **Arguments:** `heard`, the indices of members that ran; `ends`, the error's tensor and the
    taps, from which the whole graph of the pass is reached.
    """
    ran = set(heard)
    silent = {id(tap): tap for tap in channel.members if tap.on and tap.index not in ran}
    if not silent:
        return
    read = leaves(origin(end) for end in ends if end.requires_grad)
    holders: dict[int, list[nn.Module]] = {}
    for module in root.modules():
        for weight in module.parameters(recurse=False):
            holders.setdefault(id(weight), []).append(module)
    found = []
    for module in root.modules():
        for tap in sites_of(module).values():
            if id(tap) not in silent:
                continue
            inside = set(module.modules())
            own = module._parameters.get(tap.stored.weight) if tap.stored else None
            weights = weights_of(module) if tap.stored is None else [own]
            if any(id(w) in read and inside.issuperset(holders.get(id(w), ())) for w in weights):
                found.append(tap.site.path)
    if found:
        warnings.warn(
            f"{listed(found)}: weights are read there, but the module itself was not called, so "
            "that no error is broadcast to it and its gradient is backprop's; call it (self.qkv(x) "
            "for F.linear(x, self.qkv.weight)), or say that this is meant by a pattern with "
            "Backprop(), put first",
            RuleWarning,
            stacklevel=2,
        )

"""Feedback that learns: which matrices do, which weights they go with, and who moves them.

A learned feedback follows its weight: it learns while the weight does, and in the same optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from altprop.conversion.record import parts_of, record_of, weights_of
from altprop.errors import RuleError, listed

Feedback = tuple[str, nn.Parameter, list[Tensor]]


def all_feedback(model: nn.Module) -> Iterator[Feedback]:
    """Yield name, parameter and weights of every feedback that a learned rule owns.

    The first weight is the one whose optimiser shall move the feedback: of a linear map its own,
    or of what it is computed from the largest part, of a tapped block the first matrix, those that
    learn before those that do not.
    """
    for path, module in model.named_modules():
        if (record := record_of(module)) is None:
            continue
        for name in record.names:
            parameter = getattr(module, name)
            if not isinstance(parameter, nn.Parameter):
                continue
            own = [s.stored.weight for key, s in record.sites.items() if key and s.name == name]
            weights = [part for weight in own for part in parts_of(module, weight)]
            weights = weights or list(weights_of(module))
            weights.sort(key=lambda p: (not p.requires_grad, p.dim() < 2))
            yield f"{path}.{name}".lstrip("."), parameter, weights


def learned_feedback(model: nn.Module) -> Iterator[Feedback]:
    """Yield name, parameter and weights of every feedback that learns: not those of frozen ones."""
    return (found for found in all_feedback(model) if any(w.requires_grad for w in found[2]))


def feedback_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the learned feedback matrices of a converted model, for an optimiser to move.

    Those of frozen weights are not among them: they stay as they are until the weight learns.
    """
    return [parameter for _, parameter, _ in learned_feedback(model)]


def add_feedback(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Put each learned feedback into its weight's parameter group of an existing optimiser.

    Same rate, same weight decay: what Kolen-Pollack needs. A tapped block's feedback goes with the
    block's first matrix. What is there already stays, and what goes with weights of another
    optimiser is left to that one: call it for each.

    **Raises:** `RuleError` if the optimiser holds no weight that belongs to some feedback.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    at_home = False
    for name, parameter, weights in all_feedback(model):
        group = group_of.get(id(weights[0]))
        at_home = at_home or any(id(p) in group_of for p in (parameter, *weights))
        if group is None or id(parameter) in group_of:
            continue
        if "param_names" in group:  # under whatever prefix the weight has there
            index = next(i for i, p in enumerate(group["params"]) if p is weights[0])
            known, own = group["param_names"][index], names[id(weights[0])]
            prefix = known.removesuffix(own) if known.endswith(own) else ""
            group["param_names"].append(prefix + name)
        group["params"].append(parameter)
    homeless = [name for name, _, _ in learned_feedback(model)]
    if homeless and not at_home:
        raise RuleError(
            f"the optimiser holds no weight that goes with {listed(homeless)}: add them with "
            "optimizer.add_param_group({'params': feedback_parameters(model)})"
        )

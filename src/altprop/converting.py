"""The one verb: put learning rules into a model, undo it, and say what every parameter receives.

`convert` finds the places, lets every rule plan, raises one error for all that is wrong, and only
then changes classes and adds feedback; parameters, their names and their tying stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from altprop.attention import swaps
from altprop.channel import Channel, Switch
from altprop.equilibrium.estimators.estimator import AbstractEstimator
from altprop.equilibrium.module import STACK
from altprop.equilibrium.stack import convert_stack, revert_stack
from altprop.errors import ConfigError, RuleError
from altprop.feedback import generator_for
from altprop.layouts import Layout, allowed_layouts
from altprop.places import Conversion, Place, Places, Planner, TapRequest
from altprop.rule import AbstractBroadcast, AbstractRule, AbstractTransport, Site
from altprop.sites import (
    STEP,
    LocalRole,
    MapTap,
    OutputRole,
    OutputTap,
    Role,
    RootRole,
    TapRole,
    TransportSite,
    site_class,
)

M = TypeVar("M", bound=nn.Module)


def convert(
    model: M,
    rule: AbstractRule | Mapping[str, AbstractRule],
    *,
    output: str | None = None,
    seed: int = 0,
    stack: str | None = None,
    batch_axis: int | tuple[int, int] | None = None,
) -> M:
    """Let a learning rule decide what `.backward()` writes, in place, and return the model.

    Linear maps (`nn.Linear`, `LocalLinear`, Hugging Face's `Conv1D`, the projections of
    `nn.MultiheadAttention`) and blocks keep their parameters, names, tying and outputs; an
    optimiser built before still works (`add_feedback` gives it learned feedback). Convert before
    `fully_shard` and before or after `torch.compile`. The forward pass does not change.

    **Arguments:** `rule`, one rule for every place that fits it, or a mapping from name patterns
    to rules: `*` matches any text, a pattern also matches everything below what it names, the
    first pattern that matches a place counts, the rest stay on backprop. `output`, the path of
    the linear map that makes the logits: where broadcast rules take their error. `seed`, from
    which, with the module's path, every feedback matrix is drawn. `stack`, with an estimator such
    as `AEP()` for a rule: the list of blocks that become one layered equilibrium, as in
    `convert_stack`. `batch_axis`, for broadcast rules: which axis of what the taps see counts the
    samples, or a pair, the error's axis and the taps'; without it the shapes say so, or a probe in
    the first recorded pass that leaves it open.

    **Raises:** `RuleError`, one for everything that cannot be converted, with paths and what to
    write instead; `ConfigError` for arguments of a wrong kind. The model is then untouched.
    """
    if stack is not None:
        if not isinstance(rule, AbstractEstimator):
            raise ConfigError(
                f"stack={stack!r} takes an estimator such as AEP() for all its blocks, not {rule!r}"
            )
        if batch_axis is not None:
            raise ConfigError("batch_axis is for broadcast rules: leave it out with stack")
        return convert_stack(model, rule, stack)
    mapping = {"*": rule} if isinstance(rule, AbstractRule) else rule
    if not isinstance(mapping, Mapping) or not mapping:
        hint = f": write {rule.__name__}()" if isinstance(rule, type) else ""
        raise ConfigError(
            f"a rule must be a value such as FeedbackAlignment() or a mapping of name patterns to "
            f"rules, not {rule!r}{hint}"
        )
    for pattern, value in mapping.items():
        if not isinstance(pattern, str) or not isinstance(value, AbstractRule):
            hint = f": write {value.__name__}()" if isinstance(value, type) else ""
            raise ConfigError(f"{pattern!r}: {value!r} is not a rule{hint}")
    layouts = allowed_layouts(batch_axis)
    problems: list[str] = []
    places = Places(model, output, problems)
    planners = []
    if not problems:
        for index, (pattern, value) in enumerate(mapping.items()):
            earlier = list(mapping.items())[:index]
            bare = isinstance(rule, AbstractRule)
            planner = Planner(places, value, None if bare else pattern, earlier)
            value.plan(planner)
            planners.append(planner)
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in dict.fromkeys(problems))
        raise RuleError(f"cannot convert this {type(model).__name__}; nothing was changed:{lines}")
    _apply(model, places, planners, mapping, output, seed, layouts)
    return model


def _outermost(role: type[Role]) -> int:
    """Order roles: a root around an output around a tap around what replaces the forward."""
    order = (RootRole, OutputRole, TapRole, LocalRole)
    return order.index(role) if role in order else len(order)


class _Changes:
    """The roles, attributes and feedback that modules are about to get."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.roles: dict[nn.Module, list[type[Role]]] = {}
        self.names: dict[nn.Module, list[str]] = {}

    def role(self, module: nn.Module, role: type[Role]) -> None:
        roles = self.roles.setdefault(module, [])
        if role not in roles:
            roles.append(role)
        self.names.setdefault(module, [])

    def place(self, place: Place) -> None:
        for module, role in (*place.needs, (place.module, place.role)):
            self.role(module, role)

    def feedback(
        self, module: nn.Module, name: str, value: torch.Tensor, like: torch.Tensor, learned: bool
    ) -> None:
        value = value.to(dtype=like.dtype, device=like.device)
        if learned:
            module.register_parameter(name, nn.Parameter(value))
        else:
            module.register_buffer(name, value)
        self.names[module].append(name)

    def counter(self, module: nn.Module) -> None:
        if STEP not in self.names[module]:
            module.register_buffer(STEP, torch.zeros((), dtype=torch.int64))
            self.names[module].append(STEP)

    def finish(self) -> None:
        """Change the classes: last, so that an error before leaves every forward as it was."""
        for module, roles in self.roles.items():
            module.__dict__["_altprop_names"] = tuple(self.names[module])
            module.__class__ = site_class(type(module), tuple(sorted(roles, key=_outermost)))


def _apply(
    model: nn.Module,
    places: Places,
    planners: list[Planner],
    mapping: Mapping[str, AbstractRule],
    output: str | None,
    seed: int,
    layouts: tuple[Layout, ...],
) -> None:
    switch = Switch()
    changes = _Changes(seed)
    rules: dict[str, AbstractRule] = {}
    for planner in planners:
        for place in planner.transports:
            rules[place.path] = planner.rule
            _transport(changes, place, planner.rule, switch)
        for place in planner.kept:
            rules[place.path] = planner.rule
        for request in planner.taps:
            rules.update({place.path: planner.rule for place in request.places})
            _tap(changes, model, places, request, planner.rule, switch, layouts)
    changes.finish()
    model.__dict__["_altprop"] = Conversion(dict(mapping), rules, output, seed, switch)


def _transport(changes: _Changes, place: Place, rule: AbstractRule, switch: Switch) -> None:
    assert isinstance(rule, AbstractTransport)
    module, name = place.module, "B" + place.suffix
    site = Site(place.path, *place.shape)
    changes.place(place)
    B = rule.draw(site, generator_for(changes.seed, place.path))
    if B is not None:
        changes.feedback(module, name, B, place.weight, rule.learned)
    if rule.noisy:
        changes.counter(module)
    maps = module.__dict__.setdefault("_altprop_maps", {})
    name = "" if B is None else name
    maps[place.key] = TransportSite(site, rule, name, changes.seed, switch, rule.noisy)


def _tap(
    changes: _Changes,
    model: nn.Module,
    places: Places,
    request: TapRequest,
    rule: AbstractRule,
    switch: Switch,
    layouts: tuple[Layout, ...],
) -> None:
    assert isinstance(rule, AbstractBroadcast)
    local = request.at
    root = model if local is None else local.module
    k = request.width
    shared = ""
    if rule.one_feedback:
        taken = [n for n in changes.names.get(root, []) if n.startswith("B_dfa_shared")]
        shared = "B_dfa_shared" + str(len(taken) or "")
    if local is not None and layouts:  # here the error is at a block, as the taps are
        layouts = allowed_layouts(layouts[0][1])
    channel = Channel(rule, changes.seed, switch, shared, layouts)
    if local is not None:
        changes.role(root, LocalRole)
        root.__dict__["_altprop_local"] = channel
    else:
        changes.role(root, RootRole)
        root.__dict__.setdefault("_altprop_channels", []).append(channel)
        assert places.output is not None
        changes.role(places.output.module, OutputRole)
        places.output.module.__dict__.setdefault("_altprop_outputs", []).append(channel)
        if rule.period or rule.learned:
            changes.counter(root)
    like = next(p for p in model.parameters() if p.is_floating_point())
    if shared:
        site = Site(shared, max(place.rows for place in request.places), k)
        B = rule.draw(site, generator_for(changes.seed, shared))
        changes.feedback(root, shared, B, like, rule.learned)
    for index, place in enumerate(request.places):
        site = Site(place.path, place.rows, k)
        channel.sites.append(site)
        name = "" if shared else ("B_dfa" if local is None else "B_dfa_block") + place.suffix
        changes.place(place)
        if name:
            B = rule.draw(site, generator_for(changes.seed, place.path, "tap"))
            changes.feedback(place.module, name, B, place.weight, rule.learned)
        if place.is_map:
            maps = place.module.__dict__.setdefault("_altprop_maps", {})
            swapped = swaps(module for module, _ in place.needs)
            maps[place.key] = MapTap(site, channel, name, index, swapped)
        else:
            place.module.__dict__["_altprop_tap"] = OutputTap(site, channel, name, index)


def conversions(model: nn.Module) -> Iterator[tuple[str, nn.Module, Conversion]]:
    """Yield the path, the module and the record of every conversion in or below `model`."""
    for path, module in model.named_modules():
        record = module.__dict__.get("_altprop")
        if record is not None:
            yield path, module, record


def revert(model: M) -> M:
    """Undo `convert` in place, drop all feedback, and return the model.

    **Raises:** `RuleError` if neither the model nor any part of it was converted.
    """
    found = list(conversions(model))
    stacks = [module for module in model.modules() if STACK in module.__dict__]
    if not found and not stacks:
        raise RuleError(f"this {type(model).__name__} was not converted: nothing to revert")
    for module in stacks:
        revert_stack(module)
    for _, root, _ in found:
        for module in root.modules():
            if isinstance(module, Role):
                base = next(c for c in type(module).__mro__[1:] if not issubclass(c, Role))
                for name in module._altprop_names:
                    delattr(module, name)
                module.__class__ = base  # type: ignore[assignment]
                for key in [k for k in module.__dict__ if k.startswith("_altprop_")]:
                    del module.__dict__[key]
        del root.__dict__["_altprop"]
    return model


@contextlib.contextmanager
def rules_off(model: nn.Module) -> Iterator[None]:
    """Give exact gradients inside this context: every rule in `model` stands aside.

    It must cover the forward pass, and the backward pass too under activation checkpointing.
    """
    switches: dict[int, Any] = {id(r.switch): r.switch for _, _, r in conversions(model)}
    for module in model.modules():
        if STACK in module.__dict__:
            switches[id(module)] = module.__dict__[STACK]
        own = module.__dict__.get("_switch")
        if isinstance(own, Switch):
            switches[id(own)] = own
    before = [(switch, switch.on) for switch in switches.values()]
    try:
        for switch, _ in before:
            switch.on = False
        yield
    finally:
        for switch, on in before:
            switch.on = on


def learned_feedback(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, list[nn.Parameter]]]:
    """Yield name, parameter and the weights it goes with, for every learned feedback."""
    for path, module in model.named_modules():
        names: tuple[str, ...] = getattr(module, "_altprop_names", ())
        own = [n for n in names if isinstance(getattr(module, n), nn.Parameter)]
        for name in own:
            site = next((s for s in _sites(module) if s.name == name), None)
            if isinstance(site, (TransportSite, MapTap)):
                maps = module.__dict__["_altprop_maps"]
                with_it = [getattr(module, key) for key, s in maps.items() if s is site]
            else:
                feedback = {id(getattr(module, n)) for n in own}
                with_it = [p for p in module.parameters() if id(p) not in feedback]
            yield f"{path}.{name}".lstrip("."), getattr(module, name), with_it


def _sites(module: nn.Module) -> list[Any]:
    maps = list(module.__dict__.get("_altprop_maps", {}).values())
    tap = module.__dict__.get("_altprop_tap")
    return maps + ([] if tap is None else [tap])


def feedback_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the learned feedback matrices of a converted model, for an optimiser to move."""
    return [parameter for _, parameter, _ in learned_feedback(model)]


def add_feedback(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Put each learned feedback into its weight's parameter group of an existing optimiser.

    Same rate, same weight decay: what Kolen-Pollack needs. What is already there stays.

    **Raises:** `RuleError` if the optimiser holds no weight that belongs to some feedback.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    additions, homeless = [], []
    for name, parameter, weights in learned_feedback(model):
        if id(parameter) in group_of:
            continue
        group = next((group_of[id(w)] for w in weights if id(w) in group_of), None)
        if group is None:
            homeless.append(name)
        else:
            additions.append((group, parameter))
    if homeless:
        raise RuleError(
            f"the optimiser holds no weight that goes with {', '.join(homeless)}: add them with "
            "optimizer.add_param_group({'params': feedback_parameters(model)})"
        )
    for group, parameter in additions:
        group["params"].append(parameter)

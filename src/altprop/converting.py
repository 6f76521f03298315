"""The one verb: put learning rules into a model, undo it, and say what every parameter receives.

`convert` finds the places, lets every rule plan, raises one error for all that is wrong, and only
then changes classes and adds feedback; parameters, their names and their tying stay as they are.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from altprop.channel import Channel, Switch
from altprop.equilibrium.estimators.estimator import AbstractEstimator
from altprop.equilibrium.module import STACK, OnFailure
from altprop.equilibrium.solvers.solver import AbstractSolver
from altprop.equilibrium.stack import convert_stack, revert_stack
from altprop.errors import ConfigError, Problems, RuleError, RuleWarning, listed, told
from altprop.feedback import generator_for
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
from altprop.unfit import others

M = TypeVar("M", bound=nn.Module)


def convert(
    model: M,
    rule: AbstractRule | Mapping[str, AbstractRule],
    *,
    output: str | None = None,
    seed: int = 0,
    stack: str | None = None,
    solver: AbstractSolver | None = None,
    on_failure: OnFailure | None = None,
) -> M:
    """Let a learning rule decide what `.backward()` writes, in place, and return the model.

    Linear maps (`nn.Linear`, `LocalLinear`, Hugging Face's `Conv1D`, the projections of
    `nn.MultiheadAttention`) and blocks keep their parameters, names, tying and outputs; an
    optimiser built before still works (`add_feedback` gives it learned feedback). Convert before
    `fully_shard` and before or after `torch.compile`. The forward pass does not change. Other
    layers that multiply by a matrix stay on backprop; of those a bare rule warns (`RuleWarning`).

    **Arguments:** `rule`, one rule for every place that fits it, or a mapping from name patterns
    to rules: `*` matches any text, a pattern also matches everything below what it names, the
    first pattern that matches a place counts, the rest stay on backprop. `output`, the path of
    the linear map that makes the logits: where broadcast rules take their error. `seed`, from
    which, with the module's path, every feedback matrix is drawn. `stack`, with an estimator such
    as `AEP()` for a rule: the list of blocks that become one layered equilibrium, as in
    `convert_stack`, which says what `solver` and `on_failure` are.

    **Raises:** `RuleError`, one for everything that cannot be converted, with paths and what to
    write instead; `ConfigError` for arguments of a wrong kind. The model is then untouched, as it
    is when anything else goes wrong.
    """
    if stack is not None:
        if not isinstance(rule, AbstractEstimator):
            raise ConfigError(
                f"stack={stack!r} takes an estimator such as AEP() for all its blocks, not {rule!r}"
            )
        return convert_stack(model, rule, stack, solver, on_failure or "raise")
    if solver is not None or on_failure is not None:
        raise ConfigError(
            "solver and on_failure say how a stack of blocks is solved: write stack='blocks' too"
        )
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
    try:
        seed = operator.index(seed)
    except TypeError:
        raise ConfigError(f"the seed must be a whole number such as 0, not {seed!r}") from None
    problems: Problems = []
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
        lines = "".join(f"\n  - {line}" for line in told(problems))
        raise RuleError(f"cannot convert this {type(model).__name__}; nothing was changed:{lines}")
    if isinstance(rule, AbstractRule):
        _say_what_is_left(model, places, planners[0])
    with _all_or_nothing(model), torch.device("cpu"):  # where a rule's draws belong
        _apply(model, places, planners, mapping, output, seed)
    return model


def _say_what_is_left(model: nn.Module, places: Places, planner: Planner) -> None:
    """Warn of layers that stay on backprop, where no pattern says that this is meant."""
    if not (planner.transports or planner.taps):
        return
    left = others(model, [place.module for place in places.maps], planner.asked)
    if left:
        warnings.warn(
            f"{type(planner.rule).__name__} takes linear maps and leaves on backprop: "
            f"{listed(left)}; if that is meant, say so by a pattern: "
            f"convert(model, {{'*': {planner.rule!r}}})",
            RuleWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put every module back as it was if anything goes wrong inside."""
    before = [
        (module, type(module), [(part, dict(part)) for part in _dicts(module)])
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, kind, parts in before:
            module.__class__ = kind
            for part, content in parts:
                part.clear()
                part.update(content)
        raise


def _dicts(module: nn.Module) -> list[dict[str, Any]]:
    return [module.__dict__, module._parameters, module._buffers]


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
        self,
        module: nn.Module,
        name: str,
        value: torch.Tensor,
        like: torch.Tensor,
        learned: bool,
        frozen: bool,
    ) -> None:
        value = value.to(dtype=like.dtype, device=like.device)
        if module._buffers.get(name, value) is None:  # a LocalLinear's room for a feedback
            del module._buffers[name]
            module.__dict__.setdefault("_altprop_rooms", []).append(name)
        elif hasattr(module, name):
            raise RuleError(
                f"this {type(module).__name__} has an attribute named {name!r} already, which is "
                "the feedback's name: rename it"
            )
        if learned:
            module.register_parameter(name, nn.Parameter(value, requires_grad=not frozen))
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
            _tap(changes, model, places, request, planner.rule, switch)
    changes.finish()
    encoders = []
    for encoder in model.modules():  # its nested tensors skip the layers' own forwards
        if isinstance(encoder, nn.TransformerEncoder) and encoder.use_nested_tensor:
            encoder.use_nested_tensor = False
            encoders.append(encoder)
    model.__dict__["_altprop"] = Conversion(dict(mapping), rules, output, seed, switch, encoders)


def _frozen(place: Place) -> bool:
    """Say whether no weight of a place learns, so that its feedback must not either."""
    weights = [place.weight] if place.is_map else place.module.parameters()
    return not any(weight.requires_grad for weight in weights)


def _transport(changes: _Changes, place: Place, rule: AbstractRule, switch: Switch) -> None:
    assert isinstance(rule, AbstractTransport)
    module, name = place.module, "B" + place.suffix
    site = Site(place.path, *place.shape)
    changes.place(place)
    B = rule.draw(site, generator_for(changes.seed, place.path))
    if B is not None:
        changes.feedback(module, name, B, place.weight, rule.learned, _frozen(place))
    if rule.noisy:
        changes.counter(module)
    maps = module.__dict__.setdefault("_altprop_maps", {})
    name = "" if B is None else name
    made = TransportSite(site, rule, name, changes.seed, switch, rule.noisy, _frozen(place))
    maps[place.key] = made


def _tap(
    changes: _Changes,
    model: nn.Module,
    places: Places,
    request: TapRequest,
    rule: AbstractRule,
    switch: Switch,
) -> None:
    assert isinstance(rule, AbstractBroadcast)
    local = request.at
    root = model if local is None else local.module
    k = request.width
    shared = ""
    if rule.one_feedback:
        taken = [n for n in changes.names.get(root, []) if n.startswith("B_dfa_shared")]
        shared = "B_dfa_shared" + str(len(taken) or "")
    channel = Channel(rule, changes.seed, switch, shared)
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
    like = request.places[0].weight
    if shared:
        site = Site(shared, max(place.rows for place in request.places), k)
        B = rule.draw(site, generator_for(changes.seed, shared))
        frozen = all(_frozen(place) for place in request.places)
        changes.feedback(root, shared, B, like, rule.learned, frozen)
    for index, place in enumerate(request.places):
        site, frozen = Site(place.path, place.rows, k), _frozen(place)
        channel.sites.append(site)
        name = "" if shared else ("B_dfa" if local is None else "B_dfa_block") + place.suffix
        changes.place(place)
        if name:
            B = rule.draw(site, generator_for(changes.seed, place.path, "tap"))
            changes.feedback(place.module, name, B, place.weight, rule.learned, frozen)
        if place.is_map:
            maps = place.module.__dict__.setdefault("_altprop_maps", {})
            maps[place.key] = MapTap(site, channel, name, index, frozen)
        else:
            place.module.__dict__["_altprop_tap"] = OutputTap(site, channel, name, index, frozen)


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
    for _, root, record in found:
        for module in root.modules():
            if isinstance(module, Role):
                base = next(c for c in type(module).__mro__[1:] if not issubclass(c, Role))
                for name in module._altprop_names:
                    delattr(module, name)
                module.__class__ = base  # type: ignore[assignment]
                for name in module.__dict__.get("_altprop_rooms", ()):
                    module.register_buffer(name, None)
                for key in [k for k in module.__dict__ if k.startswith("_altprop_")]:
                    del module.__dict__[key]
        for encoder in record.encoders:
            encoder.use_nested_tensor = True
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

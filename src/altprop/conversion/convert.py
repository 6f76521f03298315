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
from torch.nn.utils.parametrize import is_parametrized

from altprop.conversion.attention import swaps
from altprop.conversion.channel import Channel
from altprop.conversion.places import CONVERTED, Place, Places, Planner, TapRequest
from altprop.conversion.roles import (
    LocalRole,
    OutputRole,
    Role,
    RootRole,
    TapRole,
    add_roles,
    remove_roles,
)
from altprop.conversion.sites import STEP, MapTap, OutputTap, TransportSite, sites_of
from altprop.conversion.stack import convert_stack, level_of, revert_block, revert_stack
from altprop.conversion.unfit import others
from altprop.equilibrium.call import OnFailure
from altprop.equilibrium.estimators.estimator import (
    AbstractAdjointEstimator,
    AbstractEstimator,
)
from altprop.equilibrium.exact import Exact
from altprop.equilibrium.module import STACK, Equilibrium
from altprop.equilibrium.solvers.solver import AbstractSolver
from altprop.errors import ConfigError, Problems, RuleError, RuleWarning, listed, told
from altprop.feedback import generator_for
from altprop.layouts import Layout, allowed_layouts
from altprop.rule import AbstractBroadcast, AbstractRule, AbstractTransport, Site

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
    batch_axis: int | tuple[int, int] | None = None,
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
    `convert_stack`, which says what `solver` and `on_failure` are. `batch_axis`, for broadcast
    rules: which axis of what the taps see counts the samples, or a pair, the error's axis and the
    taps'; without it the shapes say so, or a probe in the first recorded pass that leaves it open.

    **Raises:** `RuleError`, one for everything that cannot be converted, with paths and what to
    write instead; `ConfigError` for arguments of a wrong kind. The model is then untouched, as it
    is when anything else goes wrong.
    """
    if stack is not None:
        if not isinstance(rule, AbstractEstimator):
            raise ConfigError(
                f"stack={stack!r} takes an estimator such as AEP() for all its blocks, not {rule!r}"
            )
        if batch_axis is not None:
            raise ConfigError("batch_axis is for broadcast rules: leave it out with stack")
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
    layouts = allowed_layouts(batch_axis)
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
        _apply(model, places, planners, seed, layouts)
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
            add_roles(module, tuple(sorted(roles, key=_outermost)))


def _apply(
    model: nn.Module,
    places: Places,
    planners: list[Planner],
    seed: int,
    layouts: tuple[Layout, ...],
) -> None:
    changes = _Changes(seed)
    for planner in planners:
        for place in planner.transports:
            _transport(changes, place, planner.rule)
        for request in planner.taps:
            _tap(changes, model, places, request, planner.rule, layouts)
    changes.finish()
    model.__dict__[CONVERTED] = True


def _frozen(place: Place) -> bool:
    """Say whether no weight of a place learns, so that its feedback must not either."""
    weights = [place.weight] if place.is_map else place.module.parameters()
    return not any(weight.requires_grad for weight in weights)


def _transport(changes: _Changes, place: Place, rule: AbstractRule) -> None:
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
    made = TransportSite(site, rule, name, changes.seed, rule.noisy, _frozen(place))
    maps[place.key] = made


def _tap(
    changes: _Changes,
    model: nn.Module,
    places: Places,
    request: TapRequest,
    rule: AbstractRule,
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
    channel = Channel(rule, changes.seed, shared, layouts)
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
        name = "" if shared else ("B_dfa" if local is None else "B_dfa_block") + place.suffix
        changes.place(place)
        if name:
            B = rule.draw(site, generator_for(changes.seed, place.path, "tap"))
            changes.feedback(place.module, name, B, place.weight, rule.learned, frozen)
        tap: MapTap | OutputTap
        if place.is_map:
            maps = place.module.__dict__.setdefault("_altprop_maps", {})
            swapped = swaps(module for module, _ in place.needs)
            maps[place.key] = tap = MapTap(site, channel, name, index, frozen, swapped)
        else:
            tap = OutputTap(site, channel, name, index, frozen)
            place.module.__dict__["_altprop_tap"] = tap
        channel.members.append(tap)


def is_converted(module: nn.Module) -> bool:
    """Say whether `convert` left anything at this module itself."""
    marks = (CONVERTED, STACK)
    stacked = level_of(module) is not None
    return stacked or isinstance(module, Role) or any(mark in module.__dict__ for mark in marks)


def revert(model: M) -> M:
    """Undo `convert` in place, in `model` and all that is below it, and return the model.

    Of a converted model any part may be reverted alone: its places are on backprop from then on,
    its feedback is dropped, and the rest keeps its rules. What another library has done to the
    modules since (parametrisations, merged or replaced weights) stays.

    **Raises:** `RuleError` where there is nothing to revert, or where a feedback was parametrised;
    nothing is changed then.
    """
    found = [(path, module) for path, module in model.named_modules() if is_converted(module)]
    if not found:
        raise RuleError(f"this {type(model).__name__} was not converted: nothing to revert")
    for path, module in found:
        for name in getattr(module, "_altprop_names", ()):
            if is_parametrized(module, name):
                raise RuleError(
                    f"{name} of {path or 'the model itself'} is feedback, and was parametrised: "
                    f"write remove_parametrizations(module, {name!r}) first"
                )
    for _, module in found:
        if STACK in module.__dict__:
            revert_stack(module)
        revert_block(module)
        _strip(module)
        module.__dict__.pop(CONVERTED, None)
    return model


def _strip(module: nn.Module) -> None:
    """Make a module what it was before it got roles, if it has any."""
    if not isinstance(module, Role):
        return
    for site in sites_of(module).values():
        if not isinstance(site, TransportSite):
            site.channel.forget(site)
    for name in module._altprop_names:
        delattr(module, name)
    for name in module.__dict__.get("_altprop_rooms", ()):
        module.register_buffer(name, None)
    remove_roles(module)
    for key in [k for k in module.__dict__ if k.startswith("_altprop_")]:
        del module.__dict__[key]


@contextlib.contextmanager
def rules_off(model: nn.Module) -> Iterator[None]:
    """Give exact gradients inside this context: every rule in `model` stands aside.

    `model` may be any part of what was converted; the rules outside of it stay in force, so that
    exact is meant of the way from the cotangent that reaches the part. An `Equilibrium` solves its
    adjoint equation to rounding (`‖Jᵀa + g‖` at most 1e-6 of `‖a‖ + ‖g‖`, in float64 1e-10) at the
    state that its own solver found; under `BPTT` it stays as it is, exact for the relaxation that
    it records. The blocks of a converted stack are plain modules, all of them or none.

    The context must cover the forward pass, and the backward pass too under checkpointing.

    **Raises:** `RuleError` if there is nothing in `model` to switch off. In the backward pass an
    `Equilibrium` whose adjoint cannot be solved that well does as its `on_failure` says.
    """
    modules = list(model.modules())
    places: list[Any] = [site for module in modules for site in sites_of(module).values()]
    places += [level for module in modules if (level := level_of(module)) is not None]
    solved = [m for m in modules if isinstance(m, Equilibrium)]
    if not (places or solved or any(CONVERTED in m.__dict__ for m in modules)):
        raise RuleError(
            f"nothing to switch off: no rule, no Equilibrium and no block of a converted stack is "
            f"in this {type(model).__name__}; give rules_off the module that holds them"
        )
    before = [(place, place.on) for place in places]
    estimators = [(m, m.estimator) for m in solved]
    try:
        for place in places:
            place.on = False
        for block, estimator in estimators:
            if isinstance(estimator, AbstractAdjointEstimator):  # others have autograd's own
                block.estimator = Exact()
        yield
    finally:
        for place, on in before:
            place.on = on
        for block, estimator in estimators:
            block.estimator = estimator

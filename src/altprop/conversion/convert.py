"""The one verb: put learning rules into a model, undo it, and say what every parameter receives.

`convert` finds the places, lets every rule plan, raises one error for all that is wrong, and only
then changes classes and adds feedback; parameters, their names and their tying stay as they are.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from altprop.conversion.changes import apply
from altprop.conversion.layers import others
from altprop.conversion.places import Places
from altprop.conversion.planner import Planner
from altprop.conversion.record import Conversion, Converted, record_of, sites_of
from altprop.conversion.replaced import AFTERWARDS, drop_own, is_replaced, uncompiled
from altprop.conversion.roles import Role, remove_roles
from altprop.equilibrium.call import OnFailure
from altprop.equilibrium.estimators.estimator import (
    AbstractAdjointEstimator,
    AbstractEstimator,
)
from altprop.equilibrium.exact import Exact
from altprop.equilibrium.module import CONVERTED, Equilibrium
from altprop.equilibrium.solvers.solver import AbstractSolver
from altprop.errors import ConfigError, Problems, RuleError, RuleWarning, listed, told
from altprop.layouts import allowed_layouts
from altprop.rule import AbstractRule

M = TypeVar("M", bound=nn.Module)


def convert(
    model: M,
    rule: AbstractRule | Mapping[str, AbstractRule],
    *,
    output: str | None = None,
    seed: int = 0,
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

    An estimator such as `AEP()` is a rule for a list of blocks, which become one `Layered`
    equilibrium: its pattern is the path of an `nn.ModuleList` or `nn.Sequential` (`"blocks"`, `""`
    for a model that is one), or matches the blocks (`"blocks.[2-5]"`). The free state is their
    ordinary forward pass, bit for bit; what is below and above them keeps ordinary autograd.
    Every block must take the output of the one before as its first argument and may take any
    others. Under autocast the forward keeps its precision; the phases are evaluated in float32.

    **Arguments:** `rule`, one rule for every place that fits it, or a mapping from name patterns
    to rules: `*` matches any text, a pattern also matches everything below what it names, the
    first pattern that matches a place counts, the rest stay on backprop. `output`, the path of
    the linear map that makes the logits: where broadcast rules take their error. `seed`, from
    which, with the module's path, every feedback matrix is drawn. `solver`, of stacks: to relax all
    levels side by side instead of by sweeps (`Euler(step=1.0)` or `Anderson()`); `on_failure`, of
    stacks, as of `Equilibrium`. `batch_axis`, for broadcast rules: which axis of what the taps see
    counts the samples, or a pair, the error's axis and the taps'; without it the shapes say so, or
    a probe in the first recorded pass that leaves it open.

    **Raises:** `RuleError`, one for everything that cannot be converted, with paths and what to
    write instead; `ConfigError` for arguments of a wrong kind. The model is then untouched, as it
    is when anything else goes wrong.
    """
    mapping = rules_of(rule)
    layouts = allowed_layouts(batch_axis)
    try:
        seed = operator.index(seed)
    except TypeError:
        raise ConfigError(f"the seed must be a whole number such as 0, not {seed!r}") from None
    problems: Problems = []
    stacked = any(isinstance(value, AbstractEstimator) for value in mapping.values())
    if (solver is not None or on_failure is not None) and not stacked:
        raise ConfigError(
            "solver and on_failure say how a stack of blocks is solved: name one with its "
            "estimator, as in {'blocks': AEP()}"
        )
    if batch_axis is not None and all(
        isinstance(value, AbstractEstimator) for value in mapping.values()
    ):
        raise ConfigError("batch_axis is for broadcast rules: leave it out with estimators alone")
    places, planners = planned(model, rule, output, problems)
    if problems:
        lines = "".join(f"\n  - {line}" for line in told(problems))
        kind = type(places.model).__name__
        raise RuleError(f"cannot convert this {kind}; nothing was changed:{lines}")
    if isinstance(rule, AbstractRule):
        _say_what_is_left(places, planners[0])
    with _all_or_nothing(places.model), torch.device("cpu"):  # where a rule's draws belong
        apply(places, planners, seed, layouts, solver, on_failure or "raise")
        given = rule if isinstance(rule, AbstractRule) else dict(rule)
        record = cast(Converted, record_of(places.model))
        record.call = Conversion(given, output, seed, solver, on_failure, batch_axis)
    return model


def rules_of(rule: AbstractRule | Mapping[str, AbstractRule]) -> Mapping[str, AbstractRule]:
    """Return rules by name pattern.

    **Raises:** `ConfigError` for what is none.
    """
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
    return mapping


def planned(
    model: nn.Module,
    rule: AbstractRule | Mapping[str, AbstractRule],
    output: str | None,
    problems: Problems,
) -> tuple[Places, list[Planner]]:
    """Let every rule say what it asks for in a model; nothing is changed.

    **Arguments:** `problems`, to which all that cannot be converted is added.
    """
    mapping = rules_of(rule)
    places = Places(model, output, problems)
    planners: list[Planner] = []
    if problems:
        return places, planners
    patterns = [(uncompiled(pattern), value) for pattern, value in mapping.items()]
    for index, (pattern, value) in enumerate(patterns):
        bare = isinstance(rule, AbstractRule)
        planner = Planner(places, value, None if bare else pattern, patterns[:index])
        value.plan(planner)
        planners.append(planner)
    levels = [level for planner in planners for level in planner.levels]
    for planner in planners:
        planner.refuse_inside(levels)
        planner.refuse_replaced()
    return places, planners


def _say_what_is_left(places: Places, planner: Planner) -> None:
    """Warn of layers that stay on backprop, where no pattern says that this is meant."""
    if not (planner.transports or planner.taps):
        return
    left = others(places.model, [place.module for place in places.maps], planner.asked)
    if left:
        names = listed(f"{path} ({type(module).__name__})" for path, module in left)
        warnings.warn(
            f"{type(planner.rule).__name__} takes linear maps and leaves on backprop: "
            f"{names}; if that is meant, say so by a pattern: "
            f"convert(model, {{'*': {planner.rule!r}}})",
            RuleWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put every module back as it was if anything goes wrong inside."""
    before = [
        (m, type(m), [(part, dict(part)) for part in (m.__dict__, m._parameters, m._buffers)])
        for m in model.modules()
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


def revert(model: M) -> M:
    """Undo `convert` in place, in `model` and all that is below it, and return the model.

    Of a converted model any part may be reverted alone: its places are on backprop from then on,
    its feedback is dropped, and the rest keeps its rules. What another library has done to the
    modules since (parametrisations, merged or replaced weights) stays.

    **Raises:** `RuleError` where there is nothing to revert, or where a feedback was parametrised
    or a module's forward replaced since; nothing is changed then.
    """
    found = [
        (path, module, record)
        for path, module in model.named_modules()
        if (record := record_of(module)) is not None
    ]
    if not found:
        raise RuleError(f"this {type(model).__name__} was not converted: nothing to revert")
    for path, module, record in found:
        for name in record.names:
            if is_parametrized(module, name):
                raise RuleError(
                    f"{name} of {path or 'the model itself'} is feedback, and was parametrised: "
                    f"write remove_parametrizations(module, {name!r}) first"
                )
        if is_replaced(module) and isinstance(module, Role):
            raise RuleError(f"{path or 'the model itself'}: {AFTERWARDS}; nothing was reverted")
    for _, module, record in found:
        for site in record.sites.values():
            site.leave()
        for name in record.names:
            delattr(module, name)
        for name in record.rooms:
            module.register_buffer(name, None)
        drop_own(module)
        remove_roles(module)
        del module.__dict__[CONVERTED]
    return model


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
    solved = [m for m in modules if isinstance(m, Equilibrium)]
    if not (
        places
        or solved
        or any((record := record_of(m)) is not None and record.root for m in modules)
    ):
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

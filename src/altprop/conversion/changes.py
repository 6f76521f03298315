"""What rules have asked for, done to a model: records, feedback, and at last the classes."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from altprop.conversion.attention import swaps
from altprop.conversion.channel import Channel
from altprop.conversion.places import Place, Places
from altprop.conversion.planner import Planner, TapRequest
from altprop.conversion.record import STEP, Converted, parts_of
from altprop.conversion.replaced import drop_own
from altprop.conversion.roles import LocalRole, OutputRole, Role, RootRole, TapRole, add_roles
from altprop.conversion.sites import MapTap, OutputTap, TransportSite
from altprop.conversion.stack import Level, LevelRole, Stack
from altprop.equilibrium.call import OnFailure
from altprop.equilibrium.dynamics.layered import Layered
from altprop.equilibrium.estimators.estimator import AbstractEstimator
from altprop.equilibrium.module import CONVERTED, Equilibrium
from altprop.equilibrium.solvers.solver import AbstractSolver
from altprop.errors import RuleError
from altprop.feedback import generator_for
from altprop.layouts import Layout, allowed_layouts
from altprop.rule import AbstractBroadcast, AbstractRule, AbstractTransport, Site


def apply(
    places: Places,
    planners: list[Planner],
    seed: int,
    layouts: tuple[Layout, ...],
    solver: AbstractSolver | None,
    on_failure: OnFailure,
) -> None:
    """Give the model what the planners hold; the classes last, so that no error finds them changed.

    **Arguments:** `layouts`, of broadcast errors; `solver` and `on_failure`, of stacks.
    """
    changes = _Changes(places.model, places.output, seed, layouts)
    changes.record(places.model).root = True
    for planner in planners:
        for place in planner.transports:
            changes.transport(place, planner.rule)
        for request in planner.taps:
            changes.tap(request, planner.rule)
        if planner.levels:
            changes.stack(planner, solver, on_failure)
    for module, roles in changes.roles.items():
        drop_own(module)
        add_roles(module, tuple(sorted(roles, key=_outermost)))


def _outermost(role: type[Role]) -> int:
    """Order roles: a root around an output around a tap around what replaces the forward."""
    order = (RootRole, OutputRole, TapRole, LocalRole)
    return order.index(role) if role in order else len(order)


class _Changes:
    """The roles that modules are about to get; records, sites and feedback are there already."""

    def __init__(
        self, model: nn.Module, output: Place | None, seed: int, layouts: tuple[Layout, ...]
    ) -> None:
        self.model, self.output, self.seed, self.layouts = model, output, seed, layouts
        self.roles: dict[nn.Module, list[type[Role]]] = {}

    def record(self, module: nn.Module, role: type[Role] | None = None) -> Converted:
        """Return a module's record, and note that it shall play a role."""
        if role is not None and role not in self.roles.setdefault(module, []):
            self.roles[module].append(role)
        record: Converted = module.__dict__.setdefault(CONVERTED, Converted())
        return record

    def place(self, place: Place) -> Converted:
        for module, role in place.needs:
            self.record(module, role)
        return self.record(place.module, place.role)

    def feedback(
        self, module: nn.Module, name: str, B: Tensor, like: Tensor, learned: bool, frozen: bool
    ) -> None:
        record, B = self.record(module), B.to(dtype=like.dtype, device=like.device)
        if module._buffers.get(name, B) is None:  # a LocalLinear's room for a feedback
            del module._buffers[name]
            record.rooms.append(name)
        elif hasattr(module, name):
            raise RuleError(
                f"this {type(module).__name__} has an attribute named {name!r} already, which is "
                "the feedback's name: rename it"
            )
        if learned:
            module.register_parameter(name, nn.Parameter(B, requires_grad=not frozen))
        else:
            module.register_buffer(name, B)
        record.names.append(name)

    def counter(self, module: nn.Module) -> None:
        names = self.record(module).names
        if STEP not in names:
            module.register_buffer(STEP, torch.zeros((), dtype=torch.int64))
            names.append(STEP)

    def transport(self, place: Place, rule: AbstractRule) -> None:
        assert isinstance(rule, AbstractTransport)
        site, frozen, name = (
            Site(place.path, place.rows, place.columns),
            _frozen(place),
            "B" + place.suffix,
        )
        record = self.place(place)
        B = rule.draw(site, generator_for(self.seed, place.path))
        if B is None:
            name = ""
        else:
            self.feedback(place.module, name, B, place.weight, rule.learned, frozen)
        if rule.noisy:
            self.counter(place.module)
        record.sites[place.key] = TransportSite(
            site=site, name=name, held=frozen, rule=rule, seed=self.seed, stored=place.stored
        )

    def tap(self, request: TapRequest, rule: AbstractRule) -> None:
        assert isinstance(rule, AbstractBroadcast)
        channel = self.channel(request, rule)
        own = "" if channel.shared else "B_dfa" if request.at is None else "B_dfa_block"
        for index, place in enumerate(request.places):
            site, frozen = Site(place.path, place.rows, request.width), _frozen(place)
            name = own and own + place.suffix
            record = self.place(place)
            if name:
                B = rule.draw(site, generator_for(self.seed, place.path, "tap"))
                self.feedback(place.module, name, B, place.weight, rule.learned, frozen)
            kind = MapTap if place.is_map else OutputTap
            swapped = place.is_map and swaps(module for module, _ in place.needs)
            tap = kind(
                site=site, name=name, held=frozen, stored=place.stored,
                channel=channel, index=index, swapped=swapped,
            )  # fmt: skip
            record.sites[place.key] = tap
            channel.members.append(tap)

    def stack(self, planner: Planner, solver: AbstractSolver | None, on_failure: OnFailure) -> None:
        paths, blocks = zip(*planner.levels, strict=True)
        # a block may come twice in the chain, but its parameters only once
        layered = Layered(dict.fromkeys(blocks), "sweep" if solver is None else "synchronous")
        estimator = cast(AbstractEstimator, planner.rule)
        equilibrium = Equilibrium(layered, solver, estimator, on_failure)
        stack = Stack(planner.pattern or "", list(paths), list(blocks), equilibrium)
        self.record(self.model).stacks.append(stack)
        for block in blocks:
            self.record(block, LevelRole).sites[""] = Level(stack)

    def channel(self, request: TapRequest, rule: AbstractBroadcast) -> Channel:
        """Make the way of one error: where it begins, and the feedback that all its taps share."""
        root = self.model if request.at is None else request.at.module
        shared, layouts = "", self.layouts
        if rule.one_feedback:
            taken = [n for n in self.record(root).names if n.startswith("B_dfa_shared")]
            shared = "B_dfa_shared" + str(len(taken) or "")
        if request.at is not None and layouts:  # here the error is at a block, as the taps are
            layouts = allowed_layouts(layouts[0][1])
        channel = Channel(rule, self.seed, shared, layouts)
        self.record(root, RootRole).channels.append(channel)
        if request.at is not None:
            self.record(root, LocalRole).local = channel
        else:
            assert self.output is not None
            self.record(self.output.module, OutputRole).outputs.append(channel)
        if rule.period or rule.learned:
            self.counter(root)
        if shared:
            site = Site(shared, max(place.rows for place in request.places), request.width)
            B = rule.draw(site, generator_for(self.seed, shared))
            frozen = all(_frozen(place) for place in request.places)
            self.feedback(root, shared, B, request.places[0].weight, rule.learned, frozen)
        return channel


def _frozen(place: Place) -> bool:
    """Say whether no weight of a place learns, so that its feedback must not either."""
    stored, module = place.stored, place.module
    weights = module.parameters() if stored is None else parts_of(module, stored.weight)
    return not any(weight.requires_grad for weight in weights)

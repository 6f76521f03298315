"""An arm of a comparison: a rule in a task's model, or a control beside it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from altprop import (
    AbstractBroadcast,
    AbstractRule,
    ConfigError,
    RuleError,
    Site,
    convert,
    equilibria,
)
from altprop.drawing import drawing_alike
from altprop.errors import unknown
from altprop.lab.building import freeze
from altprop.lab.help import brief
from altprop.lab.tasks.task import AbstractTask

CONTROLS = ("backprop", "frozen", "calibration")
Rule = AbstractRule | Mapping[str, AbstractRule]


@dataclass(frozen=True)
class Arm:
    """What trains a model: a rule, a mapping of name patterns to rules, or neither of them.

    `name`, in tables; `rule`; `frozen`, whether hidden layers stay as they were drawn; `control`,
    whether it was added beside what was asked for.
    """

    name: str
    rule: Rule | None = None
    frozen: bool = False
    control: bool = False

    @property
    def text(self) -> str:
        """The rule as it is written, or the control's name."""
        return self.name if self.rule is None else brief(self.rule)

    @property
    def whole(self) -> str:
        """The rule with every field, defaults too, by which a resumed comparison knows it."""
        return self.name if self.rule is None else repr(self.rule)

    @property
    def folder(self) -> str:
        """A name for files: that of the arm, with a digest where that does not fit."""
        plain = re.sub(r"[^A-Za-z0-9.=_]+", "-", self.name).strip("-.")[:60]
        if plain == self.name:
            return plain
        return f"{plain}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}"

    def apply(self, task: AbstractTask, model: nn.Module, seed: int) -> None:
        """Put the rule into a task's model; its feedback is drawn from the seed.

        **Raises:** `RuleError` for a rule that does not fit, or without a layer to freeze.
        """
        if self.frozen and task.hidden:
            freeze(model, task.hidden)
        elif self.frozen:
            _freeze_below(model, output_of(task, model))
        if isinstance(self.rule, AbstractRule) and self.rule.seam == "adjoint":
            _estimate(model, self.rule)
        elif self.rule is not None:
            rules = [self.rule] if isinstance(self.rule, AbstractRule) else self.rule.values()
            broadcast = any(rule.seam == "broadcast" for rule in rules)
            output, axis = (output_of(task, model), 0) if broadcast else (None, None)
            convert(model, self.rule, output=output, seed=seed, batch_axis=axis)
            if isinstance(self.rule, CalibrationAlone):
                for parameter in model.parameters():
                    parameter.register_post_accumulate_grad_hook(_drop_zero)


def output_of(task: AbstractTask, model: nn.Module) -> str:
    """Return the path of the linear map that makes the logits: the last one that runs.

    **Raises:** `ConfigError` where none does, `RuleError` where other parameters reach the loss
    past it.
    """
    if task.output is not None:
        return task.output
    maps: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):  # which does not call its map
            maps[f"{path}.out_proj".lstrip(".")] = module
        elif isinstance(module, nn.Linear):
            maps.setdefault(path, module)
    ran: list[str] = []
    handles = [
        m.register_forward_hook(lambda *_, at=path: ran.append(at)) for path, m in maps.items()
    ]
    _loss_alone(task, model, handles)
    if not ran:
        raise ConfigError(f"{task.name}: no nn.Linear of the model runs: name its output=")
    output = ran[-1]
    cut = maps[output].register_forward_hook(lambda *found: tree_map_only(Tensor, _leaf, found[-1]))
    loss = _loss_alone(task, model, [cut])
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    reached = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    past = [name for (name, _), g in zip(named, reached, strict=True) if g is not None]
    if past:
        raise RuleError(
            f"{task.name}: {output} is the last nn.Linear that runs, and {past[0]} reaches the "
            "loss past it: name the map that makes the logits, output=, and what is below, hidden="
        )
    return output


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.is_floating_point())


def _loss_alone(task: AbstractTask, model: nn.Module, handles: Sequence[Any]) -> Tensor:
    """Return the loss of a batch, from which nothing of the model's buffers or of draws changes."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    try:
        with drawing_alike():
            return task.loss(model, task.batches(0).draw())
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _freeze_below(model: nn.Module, output: str) -> None:
    """Freeze all but the output's map, which may share its weight with an embedding."""
    head = {id(p) for p in model.get_submodule(output).parameters()}
    below = [p for p in model.parameters() if id(p) not in head]
    if not below:
        raise RuleError(
            f"frozen: {output or 'the model'} holds every parameter, and there is no hidden layer "
            "to freeze"
        )
    for parameter in below:
        parameter.requires_grad_(False)


def _estimate(model: nn.Module, estimator: Any) -> None:
    """Give an estimator to every equilibrium of a model, or make one of its stack of blocks."""
    found = list(equilibria(model))
    for _, block in found:
        block.estimator = estimator
    if found:
        return
    stacks = [
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and path.count(".") == 0
    ]
    if not stacks:
        raise RuleError(
            f"{type(estimator).__name__} is for an Equilibrium or a stack of blocks, and this "
            f"{type(model).__name__} has neither"
        )
    convert(model, {("blocks" if "blocks" in stacks else stacks[0]): estimator})


def _drop_zero(parameter: Tensor) -> None:
    """Drop a gradient of zeros, so that the optimiser leaves its parameter as it is."""
    if parameter.grad is not None and not bool(parameter.grad.any()):
        parameter.grad = None


@dataclass(frozen=True)
class CalibrationAlone(AbstractBroadcast):
    """The exact steps of a calibrated rule; between them, what it would reach stays as it is.

    What a calibrated rule gains over this is the rule's own. **Arguments:** `rule`.
    """

    rule: AbstractBroadcast

    @property
    def takes(self) -> frozenset[str]:
        return self.rule.takes

    @property
    def sends(self) -> bool:
        return self.rule.sends

    @property
    def at_head_input(self) -> bool:
        return self.rule.at_head_input

    @property
    def width(self) -> int | None:
        return self.rule.width

    @property
    def period(self) -> int:
        return self.rule.period

    def plan(self, scope: Any) -> None:
        self.rule.plan(scope)

    def draw(self, site: Site, generator: torch.Generator) -> Tensor:
        return torch.zeros(site.rows, site.columns)


def _rule(given: Any) -> Rule:
    """Return what an arm is given, if it is a rule or some by name pattern."""
    parts = list(given.values()) if isinstance(given, Mapping) else [given]
    for part in parts:
        if not isinstance(part, AbstractRule):
            name = part.__name__ if isinstance(part, type) else "FeedbackAlignment"
            raise ConfigError(f"a rule is {part!r}, expected an object such as {name}()")
    return given


def arms_of(rules: Sequence[Rule] | Mapping[str, Rule], controls: Sequence[str]) -> list[Arm]:
    """Return the arms of a comparison: the controls first, and then the rules.

    **Raises:** `ConfigError` for two arms of one name, for a control that is none, and for what is
    no rule.
    """
    if isinstance(rules, AbstractRule | str) or not isinstance(rules, Mapping | Sequence):
        raise ConfigError(
            f"rules is {rules!r}, expected several: write rules=(FeedbackAlignment(),)"
        )
    for control in controls:
        if control not in CONTROLS:
            raise unknown("control", control, CONTROLS)
    named = rules if isinstance(rules, Mapping) else {}
    arms = [Arm(name, _rule(rule)) for name, rule in named.items()]
    if not isinstance(rules, Mapping):
        arms = [Arm(brief(_rule(rule)), rule) for rule in rules]
    if odd := [arm.name for arm in arms if not isinstance(arm.name, str) or not arm.name.strip()]:
        raise ConfigError(f"an arm is called {odd[0]!r}, expected a name")
    beside = [
        arm
        for arm in (Arm("backprop", control=True), Arm("frozen", frozen=True, control=True))
        if arm.name in controls
    ]
    if "calibration" in controls:
        # one for all rules that calibrate alike: where, and how often
        alone: dict[Any, Arm] = {}
        for arm in arms:
            rule = arm.rule
            if isinstance(rule, AbstractBroadcast) and rule.period:
                key = rule.takes, rule.period, rule.at_head_input, rule.sends
                name = f"calibration alone, every {rule.period}"
                if any(a.name == name for a in alone.values() if key not in alone):
                    name += f" ({arm.name})"
                alone.setdefault(key, Arm(name, CalibrationAlone(rule), control=True))
        beside += alone.values()
    every = [*beside, *arms]
    names = [arm.name for arm in every]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"several arms are called {', '.join(twice)}: name each once")
    return every

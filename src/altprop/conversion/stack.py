"""Turn the blocks of a feed-forward model, where they stand, into a layered equilibrium.

The model keeps its own forward pass: each block's call is the first evaluation of its level, cut
off from the next, and the last block's call hands the collected state to an `Equilibrium`. So
logits, parameters, names and optimisers stay, and only `.backward()` changes.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from altprop.assign import assign_adjoint
from altprop.equilibrium.call import OnFailure
from altprop.equilibrium.dynamics.layered import BlockCall, DrivenLayers, Layered, first_of
from altprop.equilibrium.estimators.estimator import AbstractEstimator
from altprop.equilibrium.module import STACK, Equilibrium
from altprop.equilibrium.solvers.solver import AbstractSolver
from altprop.errors import ConfigError, RuleError, suggest
from altprop.transforms import refuse_vmap

M = TypeVar("M", bound=nn.Module)


def convert_stack(
    model: M,
    estimator: AbstractEstimator,
    stack: str,
    solver: AbstractSolver | None = None,
    on_failure: OnFailure = "raise",
) -> M:
    """Let an estimator give the gradient of a stack of blocks, in place, and return the model.

    The blocks become a `Layered` equilibrium, whose free state is their ordinary forward pass, bit
    for bit; what is below and above them keeps ordinary autograd. Every block must take the
    output of the one before as its first argument and may take any others; what the blocks
    return between them gets a gradient only through the next block. Without autograd (evaluation,
    generation with caches) the blocks are called as they are.

    Under autocast the forward pass keeps its precision, and the phases are evaluated in float32.

    **Arguments:** `estimator`, such as `AEP()`; `stack`, the path of an `nn.ModuleList` or
    `nn.Sequential` (`"blocks"`, `"transformer.h"`, or `""` for a model that is one), or a pattern
    of the blocks' paths (`"blocks.[2-5]"`); `solver`, to relax all levels side by side instead of
    by sweeps (`Euler(step=1.0)` or `Anderson()`); `on_failure`, as of `Equilibrium`.

    **Raises:** `RuleError` for a model that is converted already or has batch norm in its blocks,
    `ConfigError` for arguments that fit nothing; the model is then untouched.
    """
    if STACK in model.__dict__:
        raise RuleError("this model has a stack already: call revert_stack(model) first")
    blocks = _find(model, stack)
    taken = [path for path, block in blocks if "forward" in block.__dict__]
    if taken:
        raise RuleError(f"{', '.join(taken)}: somebody has replaced forward there already")
    for path, block in blocks:
        if _holds_rules(block):
            raise RuleError(
                f"{path} holds a converted part, whose rule would falsify the adjoint: call "
                "revert(model) first"
            )
    layers = [block for _, block in blocks]
    # a block may come twice in the chain, but its parameters only once
    layered = Layered(dict.fromkeys(layers), "sweep" if solver is None else "synchronous")
    equilibrium = Equilibrium(layered, solver, estimator, on_failure)
    record = Stack(stack, [path for path, _ in blocks], layers, equilibrium)
    model.__dict__[STACK] = record  # past nn.Module, which would register the blocks twice
    for block in dict.fromkeys(layers):
        block.__dict__["forward"] = Level(record, block)
        block.__dict__["opaque_to_rules"] = True
    return model


def revert_stack(model: M) -> M:
    """Undo `convert_stack` in place, and return the model.

    **Raises:** `RuleError` if the model has no converted stack.
    """
    record: Stack | None = model.__dict__.pop(STACK, None)
    if record is None:
        raise RuleError(f"this {type(model).__name__} has no converted stack: nothing to revert")
    for block in record.blocks:
        if (level := level_of(block)) is not None and level.stack is record:
            revert_block(block)
    return model


def level_of(block: nn.Module) -> Level | None:
    """Return what makes a module a level of a converted stack, or none if it is no such block."""
    forward = block.__dict__.get("forward")
    return forward if isinstance(forward, Level) else None


def revert_block(block: nn.Module) -> None:
    """Make a block of a converted stack, if it is one, an ordinary module again.

    What is left of its stack then refuses to run, until it is reverted too.
    """
    if level_of(block) is not None:
        del block.__dict__["forward"], block.__dict__["opaque_to_rules"]


class StackRow(NamedTuple):
    """What a parameter receives: at which level if any, by which rule, and the signal in words."""

    name: str
    level: int | None
    rule: str
    signal: str


def explain_stack(model: nn.Module) -> list[StackRow]:
    """Return one row per parameter of a model with a converted stack, or none without one.

    The order of registration is taken for that in which modules run: what comes after the stack is
    above it.
    """
    record: Stack | None = model.__dict__.get(STACK)
    if record is None:
        return []
    rule = type(record.equilibrium.estimator).__name__
    levels = {
        id(p): level
        for level, block in reversed(list(enumerate(record.blocks, start=1)))
        for p in block.parameters()
    }
    named = list(model.named_parameters())
    last = max((i for i, (_, p) in enumerate(named) if id(p) in levels), default=-1)
    rows = []
    for index, (name, p) in enumerate(named):
        if not p.requires_grad:
            rows.append(StackRow(name, None, "-", "frozen"))
        elif id(p) in levels:
            level = levels[id(p)]
            rows.append(StackRow(name, level, rule, record.signal(level)))
        else:
            signal = "exact" if index > last else "adjoint state of the stack"
            rows.append(StackRow(name, None, "Backprop", signal))
    return rows


@dataclass
class Stack:
    """The record of a conversion."""

    name: str
    paths: list[str]
    blocks: list[nn.Module]
    equilibrium: Equilibrium
    busy: bool = field(default=False, init=False)
    _run: _Run | None = field(default=None, init=False)

    def call(self, block: nn.Module, h: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of `block` in the model's forward pass."""
        if self.busy:
            return type(block).forward(block, h, *args, **kwargs)
        place = self.paths[self.blocks.index(block)]
        if torch._C._current_graph_task_id() != -1:
            raise RuleError(
                "a block of a converted stack was recomputed in the backward pass: turn "
                "activation checkpointing of the blocks off, the phases evaluate them anew anyway"
            )
        run, self._run = self._run, None  # an exception must not leave half a pass behind
        if run is None:
            self._check(place)
        if block is self.blocks[0] and (run is None or not run.awaits(block, self.blocks)):
            run = _Run(self, h)
        if run is None or not run.awaits(block, self.blocks):
            raise RuleError(
                f"{place} was called out of order: the blocks of a converted stack must be called "
                "one after the other, from the first to the last (if one was replaced: write "
                "revert(model) and convert it again)"
            )
        with self.evaluating():
            out = run.step(self, h, args, kwargs)
        if len(run.calls) < len(self.blocks):
            self._run = run
        return out

    def _check(self, place: str) -> None:
        """Refuse to run a stack some of whose blocks are no longer levels, or are switched off."""
        levels = [level_of(block) for block in self.blocks]
        zipped = list(zip(self.paths, levels, strict=True))
        gone = [path for path, level in zipped if level is None or level.stack is not self]
        off = [path for path, level in zipped if level is not None and not level.on]
        if gone:
            raise RuleError(
                f"{', '.join(gone)} of the stack that {place} belongs to was reverted or converted "
                "anew: write revert(model) for the rest of it, too"
            )
        if any(_holds_rules(block) for block in self.blocks):
            raise RuleError(
                f"a part of the stack that {place} belongs to was converted by itself, and its "
                "rule would falsify the adjoint: write revert(model), which reverts them all"
            )
        if off:
            raise RuleError(
                f"rules are off in {', '.join(off)} and on in {place}, which are levels of one "
                "equilibrium: give rules_off a module that holds all blocks of the stack"
            )

    def signal(self, level: int) -> str:
        """Say in words what reaches the parameters of a level."""
        return f"adjoint state of level {level} of {len(self.blocks)} of the layered equilibrium"

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """BlockCall blocks as they are inside, for what is collected or solved already."""
        before, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = before

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None, "busy": False}


class _Run:
    """One forward pass through the blocks, as far as it has come."""

    def __init__(self, stack: Stack, x: Any) -> None:
        if isinstance(x, Tensor):
            refuse_vmap(x, "a converted stack cannot be solved")
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
            given = f"{x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise RuleError(
                f"{stack.paths[0]}, the first block of the stack, was given {given}: expected a "
                "state of real numbers, (B, ...); leave embeddings out of the stack, "
                f"as in stack='{stack.name + '.' if stack.name else ''}[1-9]*'"
            )
        self.calls: list[BlockCall] = []
        layered = cast(Layered, stack.equilibrium.dynamics)
        self.driven = DrivenLayers(
            x.float() if x.itemsize < 4 else x,
            self.calls,
            layered.habits,
            layered.phases,
            inside=stack.evaluating,
            coarse=torch.is_autocast_enabled(x.device.type),
        )
        self.last: Tensor = x

    def awaits(self, block: nn.Module, blocks: Sequence[nn.Module]) -> bool:
        return len(self.calls) < len(blocks) and blocks[len(self.calls)] is block

    def step(self, stack: Stack, h: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        level = len(self.calls)
        if level and not _same(h, self.last):
            raise RuleError(
                f"{stack.paths[level]} was not given the output of {stack.paths[level - 1]} as its "
                "first argument: blocks with something between them are no plain stack; convert "
                "the parts that are, or wrap each with what follows it in one module"
            )
        block = stack.blocks[level]
        # what is called again must find the arguments as they were the first time
        again = partial(_again, stack.paths[level], level, self.driven.coarse)
        call = BlockCall(block, again(args), again(kwargs))
        whole = self.driven.push(
            h if level == 0 else self.last.detach(), BlockCall(block, args, kwargs)
        )
        self.calls.append(call)
        out = first_of(whole)
        if level + 1 < len(stack.blocks):
            self.last = handed = _handed_on(out, stack.paths[level])
        else:
            self.driven.close()
            handed = stack.equilibrium.relax(self.driven)
        return handed if isinstance(whole, Tensor) else (handed, *whole[1:])


class Level:
    """What stands for a block's `forward` while its stack is converted; `on`: if it is in force."""

    def __init__(self, stack: Stack, block: nn.Module) -> None:
        self.stack, self._block = stack, block
        self.on = True

    @property
    def signal(self) -> str:
        """What reaches the parameters of this block, in words."""
        return self.stack.signal(self.stack.blocks.index(self._block) + 1)

    def __call__(self, h: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.on or not torch.is_grad_enabled():
            return type(self._block).forward(self._block, h, *args, **kwargs)
        if torch.compiler.is_compiling():
            call = torch.compiler.disable(self.stack.call, reason="a stack is solved as a whole")
            return call(self._block, h, args, kwargs)
        return self.stack.call(self._block, h, args, kwargs)


def _find(model: nn.Module, stack: str) -> list[tuple[str, nn.Module]]:
    """Return the paths and blocks that `stack` names, in the model's order."""
    modules = dict(model.named_modules())
    found = modules.get(stack)
    if isinstance(found, nn.ModuleList | nn.Sequential):  # where a block may come twice
        blocks = [(f"{stack}.{name}".strip("."), b) for name, b in found._modules.items() if b]
    else:
        wild = any(c in stack for c in "*?[")
        blocks = [
            (path, module)
            for path, module in modules.items()
            if wild and path and path.count(".") == stack.count(".")
            if fnmatch.fnmatchcase(path, stack)
        ]
    if not blocks:
        lists = [
            path
            for path, m in modules.items()
            if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) and path
        ]
        hint = suggest(stack, lists) if lists else "the model has none: name the blocks' pattern"
        raise ConfigError(f"stack={stack!r} names no list of blocks in this model: {hint}")
    return blocks


def _holds_rules(block: nn.Module) -> bool:
    return any(key.startswith("_altprop") for m in block.modules() for key in m.__dict__)


def _same(h: Any, last: Tensor) -> bool:
    if h is last:
        return True
    alike = isinstance(h, Tensor) and h.shape == last.shape and h.dtype == last.dtype
    return alike and h.device == last.device and torch.equal(h, last)


def _handed_on(out: Tensor, path: str) -> Tensor:
    """Return a level's value for the model to hand to the next block, and for nothing else."""

    def refuse(cotangent: Tensor) -> Tensor:
        raise RuleError(
            f"a gradient reached the output of {path} from outside the next block: in a converted "
            "stack only the last block's output is read; detach what is read in between, or leave "
            "this block out of the stack"
        )

    value = out.detach()
    return assign_adjoint(out, value, refuse) if out.requires_grad else value


def _again(path: str, level: int, coarse: bool, given: Any) -> Any:
    """Return what a block was given as it needs it to be evaluated once more.

    Empty key-value caches, which Hugging Face's models make in training too, are left out, or the
    block would find its own keys in them; half precision is widened under autocast (`coarse`).

    **Raises:** `RuleError` for a cache that holds earlier tokens.
    """
    again = partial(_again, path, level, coarse)
    if type(given) in (tuple, list):
        return type(given)(map(again, given))
    if type(given) is dict:
        return {name: again(value) for name, value in given.items()}
    if isinstance(given, Tensor):
        half = coarse and given.is_floating_point() and given.itemsize < 4
        return given.float() if half else given
    if not hasattr(given, "get_seq_length"):
        return given
    if given.get_seq_length(level):
        raise RuleError(
            f"{path} was given keys and values of earlier tokens: train a converted stack on whole "
            "windows, without past_key_values"
        )
    return None

"""The blocks of a feed-forward model, where they stand, as one layered equilibrium.

The model keeps its own forward pass: each block's call is the first evaluation of its level, cut
off from the next, and the last block's call hands the collected state to an `Equilibrium`. So
logits, parameters, names and optimisers stay, and only `.backward()` changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from altprop.assign import assign_adjoint
from altprop.conversion.record import Description, sites_of
from altprop.conversion.roles import Role
from altprop.equilibrium.dynamics.layered import BlockCall, DrivenLayers, Layered, first_of
from altprop.equilibrium.module import Equilibrium
from altprop.errors import RuleError
from altprop.recording import in_backward
from altprop.transforms import refuse_vmap

# what autograd calls operations that leave numbers and gradients as they are
_PASSES = frozenset(
    {"Alias", "AsStrided", "Clone", "Expand", "NativeDropout", "Permute", "ReshapeAlias", "Slice",
     "Squeeze", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View",
     "RegisterPostBackwardFunction"}  # the last of FSDP2
)  # fmt: skip


@dataclass(eq=False)
class Level:
    """A block's place in a stack, of which it is one level."""

    stack: Stack
    on: bool = True
    """Whether the stack is in force here; `rules_off` turns it."""

    def leave(self) -> None:
        """Let the block go: what is left of its stack refuses to run, until it is reverted too."""

    def describe(self, module: nn.Module) -> Description:
        level, depth = self.stack.blocks.index(module) + 1, len(self.stack.blocks)
        return Description(
            type(self.stack.equilibrium.estimator).__name__,
            own=f"adjoint state of level {level} of {depth} of the layered equilibrium",
            below="adjoint state of a stack",
        )


class LevelRole(Role):
    """A block of a stack. Without autograd (evaluation, generation with caches) it is itself."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        level: Level = self._altprop.sites[""]
        if not level.on or level.stack.busy or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        call = level.stack.call
        if torch.compiler.is_compiling():
            call = torch.compiler.disable(call, reason="a stack is solved as a whole")
        return call(cast(nn.Module, self), *args, **kwargs)


@dataclass
class Stack:
    """Blocks that are called one after the other, and the equilibrium that they are."""

    name: str
    paths: list[str]
    blocks: list[nn.Module]
    equilibrium: Equilibrium
    busy: bool = field(default=False, init=False)
    _run: _Run | None = field(default=None, init=False)

    def call(self, block: nn.Module, h: Any, *args: Any, **kwargs: Any) -> Any:
        """Answer a call of `block` in the model's forward pass."""
        place = self.paths[self.blocks.index(block)]
        if in_backward():
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
        levels = [sites_of(block).get("") for block in self.blocks]
        zipped = list(zip(self.paths, levels, strict=True))
        gone = [path for path, level in zipped if getattr(level, "stack", None) is not self]
        off = [path for path, level in zipped if level is not None and not level.on]
        if gone:
            raise RuleError(
                f"{', '.join(gone)} of the stack that {place} belongs to was reverted or converted "
                "anew: write revert(model) for the rest of it, too"
            )
        parts = (m for block in self.blocks for m in block.modules() if m not in self.blocks)
        if any(sites_of(part) for part in parts):
            raise RuleError(
                f"a part of the stack that {place} belongs to was converted by itself, and its "
                "rule would falsify the adjoint: write revert(model), which reverts them all"
            )
        if off:
            raise RuleError(
                f"rules are off in {', '.join(off)} and on in {place}, which are levels of one "
                "equilibrium: give rules_off a module that holds all blocks of the stack"
            )

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
            estimator = type(stack.equilibrium.estimator).__name__
            raise RuleError(
                f"{stack.paths[0]}, the first block of the stack, was given {given}: expected a "
                "state of real numbers, (B, ...); leave embeddings out of the stack, "
                f"as in {{'{stack.name + '.' if stack.name else ''}[1-9]*': {estimator}()}}"
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
        single = cast(Layered, stack.equilibrium.dynamics).habits.single
        if level:  # what else the block computes of it shows that it does
            h = self.last.detach().requires_grad_(self.last.requires_grad and level not in single)
        whole = self.driven.push(h, BlockCall(block, args, kwargs))
        self.calls.append(call)
        (single.add if len(_tensors(whole)) == 1 else single.discard)(level)
        out = first_of(whole)
        if level + 1 < len(stack.blocks):
            self.last = handed = _handed_on(out, stack.paths[level])
        else:
            self.driven.close()
            handed = stack.equilibrium.relax(self.driven)
        if isinstance(whole, Tensor):
            return handed
        rest = whole[1:] if level == 0 else _shut(whole[1:], (args, kwargs), stack.paths[level])
        return (handed, *rest)


def _same(h: Any, last: Tensor) -> bool:
    """Tell whether a block is given what the one before gave, and its gradient goes back to it."""
    if h is last:
        return True
    alike = isinstance(h, Tensor) and h.shape == last.shape and h.dtype == last.dtype
    if not alike or h.device != last.device or not torch.equal(h, last):
        return False
    if not last.requires_grad or not h.requires_grad:
        return last.requires_grad == h.requires_grad
    node, end = h.grad_fn, last.grad_fn
    while node is not end:
        if (
            node is None
            or type(node).__name__.rstrip("0123456789").removesuffix("Backward") not in _PASSES
        ):
            return False
        (node, _), *_ = node.next_functions
    return True


def _tensors(given: Any) -> list[Tensor]:
    return [t for t in tree_leaves(given) if isinstance(t, Tensor)]


def _shut(rest: Any, given: Any, path: str) -> Any:
    """Return what a block gives beside its state, by which no gradient gets to the levels below.

    What it hands on as it was given comes from elsewhere.
    """
    was_given = set(map(id, _tensors(given)))

    def refuse(cotangent: Tensor) -> Tensor:
        raise RuleError(
            f"a gradient reached another output of {path} than its first, and would be lost to the "
            "levels below: detach it, add a residual to the first output and return one tensor, or "
            "leave auxiliary losses out of the stack"
        )

    def shut(t: Tensor) -> Tensor:
        open_ = not t.requires_grad or id(t) in was_given
        return t if open_ else assign_adjoint(t, t.detach(), refuse)

    return tree_map_only(Tensor, shut, rest)


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

"""Any stack of blocks as one system: `F_l = f_l(h_{l−1}) − h_l` with the state `(h_1, …, h_L)`.

Its free equilibrium is the ordinary forward pass and its Jacobian `−I` plus a strictly lower
triangle, so every phase that is linear up to a curvature of order `β` is solved by one sweep over
the levels. One top-down sweep of the linear problem alone would be backprop; the estimators
evaluate the nonlinear force of the whole stack at the nudged states (Scurria et al., arXiv
2602.03670).

Shapes: `B` samples, `L` levels, `n` numbers per sample over all levels; a state is `(B, n)`, the
levels' outputs flattened and laid side by side, for they may differ in shape.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from altprop.equilibrium.conduct import Draws, refuse_statistics
from altprop.equilibrium.driven import Driven, detached
from altprop.equilibrium.dynamics import AbstractDynamics
from altprop.equilibrium.products import AbstractLinearisation, AutogradLinearisation
from altprop.errors import ConfigError, RuleError

Phases = Literal["sweep", "synchronous"]


class Layered(AbstractDynamics):
    """A stack of blocks `f_1, …, f_L` as one dynamics, `F_l = f_l(h_{l−1}) − h_l` with `h_0 = x`.

    `Equilibrium(Layered(blocks))(x)` is bit for bit `f_L(… f_1(x))`, in one pass, and its gradient
    the estimator's: backprop's up to `O(β²)` for `AEP()`, and without any bias in the limit for
    every exact estimator. Each block is evaluated once per evaluation of the force. Blocks may be
    any modules that keep samples on the first axis and apart: batch norm mixes them. Dropout draws
    the same masks in all phases of one call.

    What is given to the module beside `x` goes to every block, `block(h, *args, **kwargs)`, and
    the first output of a block that returns a tuple is its level.

    **Arguments:** `blocks`, from the input's side; `phases`, how a nudged phase is solved:
    `"sweep"` corrects all levels in one sweep through the triangular Jacobian, `"synchronous"`
    relaxes them side by side by the module's own solver with `ε = 1`, in which a nudge needs `L`
    steps to reach the bottom: with `AEP(start="zero")` and `Euler(step=1.0, max_steps=…)` it is
    the literature's procedure.

    **Raises:** `ConfigError` for no blocks; `RuleError` for blocks with batch norm.
    """

    draws = True
    feedforward = True

    def __init__(self, blocks: Iterable[nn.Module], phases: Phases = "sweep") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if not self.blocks:
            raise ConfigError("Layered was given no blocks: write Layered([block, ...])")
        if phases not in get_args(Phases):
            raise ConfigError(f"phases is {phases!r}, expected 'sweep' or 'synchronous'")
        self.phases: Phases = phases
        refuse_statistics(self.blocks.named_modules(), "the blocks hold")

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        driven = self.under(x)
        with torch.no_grad():
            driven.settled()  # tells the levels' shapes
        return driven.evaluate(z)

    def start(self, x: Tensor) -> Tensor:
        """Return the free state itself, `(B, n)`."""
        with torch.no_grad():
            return self.under(x).settled()

    def linearise(self, z: Tensor, x: Tensor) -> AbstractLinearisation:
        driven = self.under(x)
        with torch.no_grad():
            driven.settled()
        return driven.linearise(z)

    def under(self, x: Tensor, *args: Any, **kwargs: Any) -> DrivenLayers:
        calls = [Call(block, args, kwargs) for block in self.blocks]
        return DrivenLayers(x, calls, self.phases, self.training)

    def extra_repr(self) -> str:
        return f"phases={self.phases!r}"


class Call(NamedTuple):
    """How one level is called: `block(h, *args, **kwargs)`."""

    block: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class DrivenLayers(Driven):
    """A stack of blocks under one input.

    **Arguments:** `x`; `calls`, one per level; `phases`; `training`, whether blocks may draw.
    """

    step = 1.0

    def __init__(
        self, x: Tensor, calls: Sequence[Call], phases: Phases = "sweep", training: bool = True
    ) -> None:
        self.x, self.phases = x, phases
        self._calls, self._training = calls, training
        self._draws_of: list[Draws | None] = []
        self._outs: list[Tensor] = []
        self._shapes: list[torch.Size] = []
        self._known: tuple[Tensor, Tensor] | None = None

    def push(self, h: Tensor, call: Call) -> Any:
        """Make the first evaluation of the next level at `h`, and return all that it gives out."""
        self._draws_of.append(Draws(h.device) if self._training else None)
        whole = call.block(h, *call.args, **call.kwargs)
        out = first_of(whole)
        if out.dim() < 1 or out.shape[:1] != self.x.shape[:1]:
            raise RuleError(
                f"block {len(self._outs)} turned {tuple(h.shape)} into {tuple(out.shape)}: a block "
                "must keep samples on the first axis"
            )
        self._outs.append(out)
        return whole

    def analytic(self, z: Tensor) -> Tensor:
        raise RuleError(
            "a stack of layers has no analytic force: HolomorphicEP relaxes complex states, on "
            "which ordinary modules are not defined; write estimator=AEP()"
        )

    def kept(self) -> DrivenLayers:
        kept = copy.copy(self)
        kept.x, kept._known = self.x.detach(), None
        kept._calls = [call._replace(**detached(call._asdict())) for call in self._calls]
        return kept

    def start(self) -> Tensor:
        return self.settled()

    def settled(self) -> Tensor:
        """Return the state that the ordinary forward pass leaves, `(B, n)`.

        Each level is recorded by itself, so this one pass is also the recorded force there.
        """
        if self._known is None and not self._shapes:
            h = self.x
            for call in self._calls:
                self.push(h, call)
                h = self._outs[-1].detach()
            self.close()
        assert self._known is not None
        return self._known[0]

    def close(self) -> None:
        """Make state and force of the levels that were pushed."""
        self._shapes = [out.shape for out in self._outs]
        self._read_as = self._outs[-1].dtype
        outs = torch.cat([out.flatten(1) for out in self._outs], 1)
        if outs.itemsize < 4 and not self.coarse:
            raise ConfigError(
                f"the blocks compute in {outs.dtype}: the nudges are smaller than that "
                "precision's round-off; keep their weights in float32 and use torch.autocast"
            )
        outs = outs.float() if outs.itemsize < 4 else outs
        state = outs.detach()
        self._known = (state, outs - state)
        self._outs = []

    def force(self, z: Tensor) -> Tensor:
        # the recorded pass is held until it is asked for, so that its memory is not held longer
        if self._known is not None and torch.equal(z, self._known[0]):
            force = self._known[1]
            self._known = None
            return force
        return self.evaluate(z)

    def evaluate(self, z: Tensor) -> Tensor:
        """Return the force at any state, `(B, n)`, evaluating every block once."""
        below = [self.x, *self._levels(z)[:-1]]
        outs = [self._block(level, h) for level, h in enumerate(below)]
        return torch.cat([out.flatten(1) for out in outs], 1) - z

    def linearise(self, z: Tensor) -> AbstractLinearisation:
        levels = self._levels(z.detach())
        parts = [
            AutogradLinearisation(partial(self._block, level), h)
            for level, h in enumerate(levels[:-1], start=1)
        ]
        return _LinearisedLayers(parts, self._levels, self.phases)

    def read(self, z: Tensor) -> Tensor:
        return self._levels(z)[-1].to(self._read_as)

    def _levels(self, z: Tensor) -> list[Tensor]:
        """Return the levels' outputs that a state `(B, n)` holds."""
        sizes = [shape[1:].numel() for shape in self._shapes]
        parts = zip(z.split(sizes, 1), self._shapes, strict=True)
        return [part.reshape(shape).contiguous() for part, shape in parts]

    def _block(self, level: int, h: Tensor) -> Tensor:
        call, draws = self._calls[level], self._draws_of[level]
        with nullcontext() if draws is None else draws.again():
            return first_of(call.block(h, *call.args, **call.kwargs))


class _LinearisedLayers(AbstractLinearisation):
    """`J = −I + N`, where `N` takes level `l − 1` to level `l` by the block's own Jacobian."""

    def __init__(
        self,
        parts: Sequence[AutogradLinearisation],
        levels: Callable[[Tensor], list[Tensor]],
        phases: Phases,
    ) -> None:
        self._parts, self._levels, self._phases = parts, levels, phases

    def vjp(self, a: Tensor) -> Tensor:
        up = self._levels(a)[1:]
        carried = [part.vjp(g) for part, g in zip(self._parts, up, strict=True)]
        return _side_by_side(carried, a, last=True) - a

    def jvp(self, v: Tensor) -> Tensor:
        below = self._levels(v)[:-1]
        carried = [part.jvp(h) for part, h in zip(self._parts, below, strict=True)]
        return _side_by_side(carried, v, last=False) - v

    def inverse(self, *, transposed: bool) -> Callable[[Tensor], Tensor] | None:
        if self._phases == "synchronous":
            return None
        return self._down if transposed else self._up

    def _down(self, r: Tensor) -> Tensor:
        """Return `(I − Nᵀ)⁻¹ r`: the sweep from the top level to the bottom."""
        levels = self._levels(r)
        for level in reversed(range(len(self._parts))):
            levels[level] = levels[level] + self._parts[level].vjp(levels[level + 1])
        return torch.cat([h.flatten(1) for h in levels], 1)

    def _up(self, r: Tensor) -> Tensor:
        """Return `(I − N)⁻¹ r`: the sweep from the bottom level to the top."""
        levels = self._levels(r)
        for level, part in enumerate(self._parts):
            levels[level + 1] = levels[level + 1] + part.jvp(levels[level])
        return torch.cat([h.flatten(1) for h in levels], 1)


def _side_by_side(carried: Sequence[Tensor], like: Tensor, *, last: bool) -> Tensor:
    """Return levels `(B, ...)` as a state, filled up to the shape of `like` by a zero level."""
    flat = [h.flatten(1) for h in carried]
    zero = like.new_zeros(like.shape[0], like.shape[1] - sum(h.shape[1] for h in flat))
    return torch.cat([*flat, zero] if last else [zero, *flat], 1)


def first_of(out: Any) -> Tensor:
    """Return the first output of a block: the tensor itself, or the head of a tuple or list."""
    head = out[0] if isinstance(out, tuple | list) and out else out
    if not isinstance(head, Tensor) or not head.is_floating_point():
        given = f"a tensor of {head.dtype}" if isinstance(head, Tensor) else type(head).__name__
        raise RuleError(f"a block returned {given} first; a level must be a tensor of real numbers")
    return head

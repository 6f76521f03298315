"""Any stack of blocks as one system: `F_l = f_l(h_{l−1}) − h_l` with the state `(h_1, …, h_L)`.

Its free equilibrium is the ordinary forward pass and its Jacobian `−I` plus a strictly lower
triangle, so every phase that is linear up to a curvature of order `β` is solved by one sweep over
the levels. One top-down sweep of the linear problem alone would be backprop; the estimators
evaluate the nonlinear force of the whole stack at the nudged states (Scurria et al., arXiv
2602.03670).

Shapes: `B` samples, `L` levels, `n` numbers per sample over all levels; a state is `(B, n)`, the
levels' outputs flattened and laid side by side, for they may differ in shape. On which axis the
levels have their samples is found out (`habits.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from altprop.equilibrium.dynamics.conduct import Draws, refuse_statistics, steady
from altprop.equilibrium.dynamics.dynamics import AbstractDynamics
from altprop.equilibrium.dynamics.habits import Habits, Layout
from altprop.equilibrium.dynamics.products import AbstractLinearisation, AutogradLinearisation
from altprop.equilibrium.dynamics.surroundings import Surroundings
from altprop.equilibrium.dynamics.system import System, detached
from altprop.errors import ConfigError, RuleError

Phases = Literal["sweep", "synchronous"]


class Layered(AbstractDynamics):
    """A stack of blocks `f_1, …, f_L` as one dynamics, `F_l = f_l(h_{l−1}) − h_l` with `h_0 = x`.

    `Equilibrium(Layered(blocks))(x)` is bit for bit `f_L(… f_1(x))`, in one pass, and its gradient
    the estimator's: backprop's up to `O(β²)` for `AEP()`, and without any bias in the limit for
    every exact estimator. Each block is evaluated once per evaluation of the force. Blocks may have
    the samples on axis 0 or, as torch's own layers do by default, on axis 1, whichever keeps them
    apart; where neither does, all samples are solved and certified as one. Batch norm, whose
    statistics every evaluation would change, is refused, and so is a block that changes a buffer.
    What blocks draw, dropout's masks say, is the same in all phases of one call.

    What is given to the module beside `x` goes to every block, `block(h, *args, **kwargs)`, and
    the first output of a block that returns a tuple is its level.

    **Arguments:** `blocks`, from the input's side; `phases`, how a nudged phase is solved:
    `"sweep"` corrects all levels in one sweep through the triangular Jacobian, `"synchronous"`
    relaxes them side by side by the module's own solver with `ε = 1`, in which a nudge needs `L`
    steps to reach the bottom: with `AEP(start="zero")` and `Euler(step=1.0, max_steps=…)` it is
    the literature's procedure.

    **Raises:** `ConfigError` for no blocks; `RuleError` for blocks with batch norm, and when it is
    called, for one that changes its buffers.
    """

    feedforward = True

    def __init__(self, blocks: Iterable[nn.Module], phases: Phases = "sweep") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if not self.blocks:
            raise ConfigError("Layered was given no blocks: write Layered([block, ...])")
        if phases not in get_args(Phases):
            raise ConfigError(f"phases is {phases!r}, expected 'sweep' or 'synchronous'")
        self.phases: Phases = phases
        self.habits = Habits()
        refuse_statistics(self.blocks.named_modules(), "the blocks hold")

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        driven = self.under(x)
        with torch.no_grad():
            driven.settled()  # tells the levels' shapes
        return driven.force(z)

    def start(self, x: Tensor) -> Tensor:
        """Return the free state itself, `(B, n)`."""
        with torch.no_grad():
            return self.under(x).start()

    def linearise(self, z: Tensor, x: Tensor) -> AbstractLinearisation:
        driven = self.under(x)
        with torch.no_grad():
            driven.settled()
        return driven.linearise(z)

    def under(self, x: Tensor, *args: Any, **kwargs: Any) -> DrivenLayers:
        calls = [BlockCall(block, args, kwargs) for block in self.blocks]
        return DrivenLayers(x, calls, self.habits, self.phases)

    def extra_repr(self) -> str:
        return f"phases={self.phases!r}"


class BlockCall(NamedTuple):
    """How one level is called: `block(h, *args, **kwargs)`."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class DrivenLayers(System):
    """A stack of blocks under one input.

    **Arguments:** `x`; `calls`, one per level; `habits`, what is known of the blocks; `phases`;
    `inside`, the context in which a block is evaluated once more; `coarse`, as in `System`.
    """

    step = 1.0

    def __init__(
        self,
        x: Tensor,
        calls: Sequence[BlockCall],
        habits: Habits,
        phases: Phases = "sweep",
        *,
        inside: Callable[[], AbstractContextManager[Any]] = nullcontext,
        coarse: bool = False,
    ) -> None:
        self._inside, self.coarse = inside, coarse
        self.x, self.phases, self._calls = x, phases, calls
        self._habits, self._layout = habits, Layout(0)
        self._draws_of: list[Draws | None] = []
        self._around = Surroundings()
        self._outs: list[Tensor] = []
        self._shapes: list[torch.Size] = []
        self._known: tuple[Tensor, Tensor] | None = None

    def push(self, h: Tensor, call: BlockCall) -> Any:
        """Make the first evaluation of the next level at `h`, and return all that it gives out."""
        level = len(self._outs)
        h = self._spare(level, h)
        draws, version = Draws(h.device), h._version
        block, calm = call.block, self._habits.calm
        still = steady(block, calm, (level, block.training), f"block {level}")
        with self._around.first(block.modules()), still:
            whole = block(h, *call.args, **call.kwargs)
        self._draws_of.append(draws if draws.moved() else None)
        if h._version == version:
            self._habits.pure.add(level)
        elif level in self._habits.pure:
            raise RuleError(
                f"block {level} has overwritten its input, which it did not do before: let it "
                "write into a tensor of its own"
            )
        self._outs.append(first_of(whole))
        return whole

    def _spare(self, level: int, h: Tensor) -> Tensor:
        """Return what a block may overwrite without harm, if it may do so."""
        return h if level in self._habits.pure else h.clone()

    def analytic(self, z: Tensor) -> Tensor:
        raise RuleError(
            "a stack of layers has no analytic force: HolomorphicEP relaxes complex states, on "
            "which ordinary modules are not defined; write estimator=AEP()"
        )

    def check_apart(self, z: Tensor, linearise: Callable[[], AbstractLinearisation]) -> None:
        """Refuse nothing: the habits have found out where the samples lie."""

    def kept(self) -> DrivenLayers:
        kept = copy.copy(self)
        kept.x, kept._known, kept._around = self.x.detach(), None, self._around.kept()
        kept._calls = [BlockCall(c.block, *detached((c.args, c.kwargs))) for c in self._calls]
        return kept

    def recalled(self) -> AbstractContextManager[None]:
        return self._around.again()

    def start(self) -> Tensor:
        return self.settled()[0]

    def settled(self) -> tuple[Tensor, Tensor]:
        """Return the state that the ordinary forward pass leaves, `(B, n)`, and the force there.

        Each level is recorded by itself, so this one pass is also the recorded force. It is handed
        over and not kept, so that its memory is not held longer.
        """
        if self._known is None:
            self._outs, self._draws_of, self._around = [], [], Surroundings()
            h = self.x
            for call in self._calls:
                self.push(h, call)
                h = self._outs[-1].detach()
            self.close()
        assert self._known is not None
        known, self._known = self._known, None
        return known

    def close(self) -> None:
        """Make state and force of the levels that were pushed."""
        self._around.give(self.x)
        for call in self._calls:
            self._around.give_more(call.args, call.kwargs)
        self._shapes = [out.shape for out in self._outs]
        self._read_as = self._outs[-1].dtype
        outs = [out.float() if out.itemsize < 4 and self.coarse else out for out in self._outs]
        half = next((out for out in outs if out.itemsize < 4), None)
        if half is not None:
            raise ConfigError(
                f"the blocks compute in {half.dtype}: the nudges are smaller than that "
                "precision's round-off; keep their weights in float32 and use torch.autocast"
            )

        def linearise(layout: Layout) -> tuple[AbstractLinearisation, Tensor]:
            self._lay(layout)
            z = self._joined(outs).detach()
            return self.linearise(z), z

        self._lay(self._habits.layout(self._shapes, linearise, self._parameters))
        force = self._joined(outs)
        state = force.detach()
        self._known = (state, force - state)
        self._outs = []

    def _parameters(self) -> Iterator[nn.Parameter]:
        for call in self._calls:
            yield from call.block.parameters()

    def _lay(self, layout: Layout) -> None:
        self._layout = layout
        self.widths = tuple(map(layout.width, self._shapes))

    def _joined(self, levels: Sequence[Tensor]) -> Tensor:
        """Return the state, `(B, n)`, of levels of their own shapes."""
        return torch.cat([self._layout.flat(h) for h in levels], 1)

    def force(self, z: Tensor) -> Tensor:
        """Return the force at any state, `(B, n)`, evaluating every block once."""
        below = [self.x, *self._levels(z)[:-1]]
        outs = [self._block(level, h) for level, h in enumerate(below)]
        return self._joined(outs) - z

    def linearise(self, z: Tensor) -> AbstractLinearisation:
        levels = self._levels(z.detach())
        parts = [
            AutogradLinearisation(partial(self._block, level), h)
            for level, h in enumerate(levels[:-1], start=1)
        ]
        return _LinearisedLayers(parts, self._levels, self._joined, self.phases)

    def read(self, z: Tensor) -> Tensor:
        return self._levels(z)[-1].to(self._read_as)

    def _levels(self, z: Tensor) -> list[Tensor]:
        """Return the levels' outputs that a state `(B, n)` holds."""
        parts = zip(z.split(self.widths, 1), self._shapes, strict=True)
        return [self._layout.shaped(rows, shape) for rows, shape in parts]

    def _block(self, level: int, h: Tensor) -> Tensor:
        call, draws = self._calls[level], self._draws_of[level]
        with self._inside(), nullcontext() if draws is None else draws.again():
            return first_of(call.block(self._spare(level, h), *call.args, **call.kwargs))


class _LinearisedLayers(AbstractLinearisation):
    """`J = −I + N`, where `N` takes level `l − 1` to level `l` by the block's own Jacobian."""

    def __init__(
        self,
        parts: Sequence[AutogradLinearisation],
        levels: Callable[[Tensor], list[Tensor]],
        joined: Callable[[Sequence[Tensor]], Tensor],
        phases: Phases,
    ) -> None:
        self._parts, self._levels, self._joined, self._phases = parts, levels, joined, phases

    def vjp(self, a: Tensor) -> Tensor:
        first, *up = self._levels(a)
        carried = [part.vjp(g) for part, g in zip(self._parts, up, strict=True)]
        return self._joined([*carried, torch.zeros_like(up[-1] if up else first)]) - a

    def jvp(self, v: Tensor) -> Tensor:
        levels = self._levels(v)
        carried = [part.jvp(h) for part, h in zip(self._parts, levels[:-1], strict=True)]
        return self._joined([torch.zeros_like(levels[0]), *carried]) - v

    def inverse(self, *, transposed: bool) -> Callable[[Tensor], Tensor] | None:
        if self._phases == "synchronous":
            return None
        return self._down if transposed else self._up

    def _down(self, r: Tensor) -> Tensor:
        """Return `(I − Nᵀ)⁻¹ r`: the sweep from the top level to the bottom."""
        levels = self._levels(r)
        for level in reversed(range(len(self._parts))):
            levels[level] = levels[level] + self._parts[level].vjp(levels[level + 1])
        return self._joined(levels)

    def _up(self, r: Tensor) -> Tensor:
        """Return `(I − N)⁻¹ r`: the sweep from the bottom level to the top."""
        levels = self._levels(r)
        for level, part in enumerate(self._parts):
            levels[level + 1] = levels[level + 1] + part.jvp(levels[level])
        return self._joined(levels)


def first_of(out: Any) -> Tensor:
    """Return the first output of a block: the tensor itself, or the head of a tuple or list."""
    head = out[0] if isinstance(out, tuple | list) and out else out
    if not isinstance(head, Tensor) or not head.is_floating_point():
        given = f"a tensor of {head.dtype}" if isinstance(head, Tensor) else type(head).__name__
        raise RuleError(f"a block returned {given} first; a level must be a tensor of real numbers")
    return head

"""Keep a fixed point while it learns: stabilisers that act between backward and clipping.

A stabiliser is a value; `init` makes its state, `apply` adds its own gradient to `.grad`. A
training loop calls it without knowing what it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from altprop.equilibrium.dynamics.conduct import refuse_shards
from altprop.equilibrium.dynamics.dynamics import AbstractDynamics
from altprop.equilibrium.dynamics.products import Gradients
from altprop.equilibrium.dynamics.system import System
from altprop.equilibrium.estimators.problem import Certificate
from altprop.equilibrium.module import Equilibrium, equilibria
from altprop.equilibrium.solvers.solver import (
    check_counts,
    check_fields,
    in_rows,
    is_count,
    is_positive,
    per_sample,
    sample_norm,
)
from altprop.errors import ConfigError, RuleError
from altprop.parts import now


class AbstractStabiliser(ABC):
    """Base of every stabiliser: a frozen dataclass."""

    @abstractmethod
    def init(self, generator: torch.Generator) -> Any:
        """Return this stabiliser's state; its random draws come from `generator` (on the CPU).

        The state has `state_dict()` and `load_state_dict(...)`, of tensors by name. What has a row
        for each sample of the batch is named `probe.…`; where several passes or processes share a
        batch, it has all rows, and those of this process's samples count.
        """

    @abstractmethod
    def apply(
        self,
        model: nn.Module,
        state: Any,
        step: int,
        *,
        urgent: bool = False,
    ) -> dict[str, float]:
        """Add this stabiliser's gradient to `.grad` of `model`'s parameters.

        Call it after `loss.backward()` and before clipping, with the number of the step from 0;
        `urgent` when the step's own gradient was refused, so that it acts even if it would rest.
        Returns what it measured, by name (empty on a step where it rests). Under `altprop.seeing`
        it adds what these samples have in the joint batch's gradient, which is the sum of that.
        """


@dataclass
class HingeState:
    """The probes that a `JacobianHinge` carries from step to step, by the block's path.

    Where it sees a part of a batch, they have the rows of the joint batch, and it uses its own.
    """

    generator: torch.Generator
    probes: dict[str, Tensor] = field(default_factory=dict)

    def noise(self, z: Tensor) -> Tensor:
        """Draw a normal number for each of the state's, `(B, ...)`, from the joint batch's."""
        part = now()
        shape = z.shape if part is None else (part.total, *z.shape[1:])
        drawn = torch.randn(shape, generator=self.generator, device="cpu")
        return (drawn if part is None else drawn[part.rows]).to(z)

    def probe(self, name: str, z: Tensor) -> Tensor | None:
        """Return the probe of these samples, or nothing if there is none of that shape."""
        probe, part = self.probes.get(name), now()
        if probe is not None and part is not None and len(probe) == part.total:
            probe = probe[part.rows] if probe[part.rows].any() else None  # a part not yet seen
        return None if probe is None or probe.shape != z.shape else probe.to(z)

    def keep(self, name: str, probe: Tensor) -> None:
        """Keep the probe of these samples for the next step."""
        part, held = now(), self.probes.get(name)
        if part is not None:
            if held is None or held.shape != (part.total, *probe.shape[1:]):
                held = probe.new_zeros((part.total, *probe.shape[1:]))
            held[part.rows] = probe
            probe = held
        self.probes[name] = probe

    def forget(self, name: str) -> None:
        """Let these samples start from new directions."""
        part, held = now(), self.probes.pop(name, None)
        if part is not None and held is not None and len(held) == part.total:
            held[part.rows] = 0
            self.probes[name] = held

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that a resumed run needs, as tensors by name."""
        return {
            "generator": self.generator.get_state(),
            **{f"probe.{path}": probe for path, probe in self.probes.items()},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
        self.generator.set_state(state["generator"])
        self.probes = {
            name.removeprefix("probe."): probe
            for name, probe in state.items()
            if name.startswith("probe.")
        }


@dataclass(frozen=True)
class JacobianHinge(AbstractStabiliser):
    """Push the Jacobian's gain back where it is past a margin: `w · mean_b max(0, ρ_b − τ)²`.

    For `g(z) = z + εF(z)` at the free state, held constant, `ρ_b = ‖J_gᵀ v_b‖` of each sample with
    a unit `v_b` that adds a power-iterated probe to the direction of the sample's adjoint's
    remaining residual: the probe finds the lasting hard modes, the residual those of this very
    batch. No sample hides among its batch-mates. The force is that of the last call, with its
    further arguments and its draws of dropout. The task pushes the feedback up and the hinge only
    down, so together they hold the gain near the margin.

    Of a causal dynamics the eigenvalues of `J_g` are those of the blocks on its diagonal, one per
    token, and a lost fixed point is mostly one token that excites itself, whose window as a whole
    is quiet. Where the dynamics tells its tokens apart, each has a `v` of its own too, iterated
    with its own block, which finds the radius of all of them in two or three products, and the
    worst token of a sample has a margin of its own.

    The gains cost an evaluation of the force and `power + 1` products of either kind per block on
    the steps where it acts, and a push two evaluations with their gradients, of the samples past
    the margin alone: with `u = J_gᵀ v / ρ` the derivative of `ρ` is that of `⟨v, J_g u⟩`, which is
    what `⟨v, g⟩` changes by between two states that differ along `u`. Without a gate in the
    dynamics it also shrinks what the block computes: use it with `GatedBlock`.

    **Arguments:** `target`, the margin `τ` (`None`: the dynamics' own `margin`, 0.5);
    `token_target`, that of the worst token's own block (`None`: tokens are not looked at); `every`,
    act on every so many steps, with `every` times the weight; `weight`, `w` for `every=1`; `fresh`,
    the size of the random part of the next probe relative to a unit vector; `power`, steps of power
    iteration before a gain is measured; `start`, from where the margin goes to `target` in equal
    parts over the first `over` steps (`None`: it stays there); `per`, what has a `v` of its own:
    `"sample"`, or `"batch"`, all of it together, which sees the root of the samples' mean square.
    """

    target: float | None = None
    token_target: float | None = 0.4
    every: int = 2
    weight: float = 4.0
    fresh: float = 0.05
    power: int = 1
    start: float | None = None
    over: int | None = None
    per: Literal["sample", "batch"] = "sample"

    def __post_init__(self) -> None:
        for name in ("target", "token_target"):
            if getattr(self, name) is not None:
                check_fields("JacobianHinge", **{name: getattr(self, name)})
        if (self.start is None) != (self.over is None):
            raise ConfigError(
                f"JacobianHinge: start is {self.start!r} and over is {self.over!r}: a margin that "
                "moves needs both, such as start=0.15, over=3000"
            )
        if self.start is not None and self.over is not None:
            check_fields("JacobianHinge", start=self.start)
            check_counts("JacobianHinge", over=self.over)
        check_fields("JacobianHinge", weight=self.weight)
        check_counts("JacobianHinge", every=self.every)
        if not (is_positive(self.fresh) or self.fresh == 0):
            raise ConfigError(f"JacobianHinge: fresh is {self.fresh!r}, expected a number ≥ 0")
        if not (is_count(self.power) or self.power == 0):
            raise ConfigError(
                f"JacobianHinge: power is {self.power!r}, expected a whole number, at least 0"
            )
        if self.per not in ("sample", "batch"):
            raise ConfigError(f"JacobianHinge: per is {self.per!r}, expected 'sample' or 'batch'")

    def init(self, generator: torch.Generator) -> HingeState:
        return HingeState(generator)

    def apply(
        self,
        model: nn.Module,
        state: HingeState,
        step: int,
        *,
        urgent: bool = False,
    ) -> dict[str, float]:
        if step % self.every and not urgent:
            return {}
        group, part, start = process_group(model), now(), state.generator.get_state()
        if part is not None and self.per == "batch":
            raise RuleError(
                "JacobianHinge(per='batch') looks at a batch as a whole, of which each process and "
                "each pass sees a part: write per='sample', or one process without accumulation"
            )
        pushed = list(called(model))
        for block, _, _ in pushed:
            refuse_shards(block.dynamics, "JacobianHinge")
        gains = [
            self._push(path, block.dynamics, seen, state, step, group)
            for block, path, seen in pushed
        ]
        if part is not None and not part.last:  # its next part draws the same numbers
            state.generator.set_state(start)
        return worst_gain([gain for gain in gains if gain is not None])

    def _push(
        self,
        path: str,
        dynamics: AbstractDynamics,
        seen: Certificate,
        state: HingeState,
        step: int,
        group: Any,
    ) -> float | None:
        assert seen.system is not None
        z, system = seen.state, seen.system.once()
        parameters = [p for p in dynamics.parameters() if p.requires_grad]
        if z.numel() == 0:  # nothing to measure, but other ranks may have samples
            accumulate([None] * len(parameters), parameters, group)
            return None
        target = dynamics.margin if self.target is None else self.target
        if self.start is not None and self.over is not None:
            target += (self.start - target) * max(0.0, 1 - step / self.over)
        with torch.autocast(z.device.type, enabled=False), system.recalled():
            products = system.linearise(z)
            kinds = [(path, target, _Blocks(self.per, products.vjp, system.step))]
            if self.token_target is not None and products.tells_tokens:
                own = _Blocks("token", products.own_vjp, system.step)
                kinds.append((f"{path}.tokens", self.token_target, own))
            gains = []
            push: Gradients = (None,) * len(parameters)
            for name, margin, blocks in kinds:
                v, pulled = self._look(name, blocks, seen, state)
                measured = blocks.worst(blocks.norm(pulled))
                gains.append(float(measured.max()))
                if not math.isfinite(gains[-1]):  # a lost state must not poison the probes to come
                    state.forget(name)
                elif gains[-1] > margin:
                    # d/dρ of the penalty, along the direction in which ρ is measured
                    slope = 2 * self.weight * self.every * (measured - margin).clamp_min(0)
                    slope = slope / samples(z)
                    along, v = slope * blocks.unit(pulled), v * (slope > 0)
                    more = _directional(parameters, system, z, along, v)
                    push = tuple(map(_sum, push, more))
            accumulate(push, parameters, group)
        return max(gains, key=_nan_is_worst)

    def _look(
        self, name: str, blocks: _Blocks, seen: Certificate, state: HingeState
    ) -> tuple[Tensor, Tensor]:
        """Return the directions in which gains are measured, and `J_gᵀ` of them, `(B, ...)`."""
        z, remainder = seen.state, seen.adjoint_remainder
        noise = blocks.unit(state.noise(z))
        probe = state.probe(name, z)
        v = noise if probe is None else blocks.unit(probe)
        if remainder is not None and bool(remainder.isfinite().all()):
            v = blocks.unit(v + blocks.unit(remainder))
        pulled = blocks.pull(v)
        for _ in range(self.power):
            v = blocks.unit(pulled)
            pulled = blocks.pull(v)
        state.keep(name, blocks.unit(pulled) + self.fresh * noise)
        return v, pulled


class _Blocks:
    """The blocks of `J_gᵀ` that have a direction of their own: a batch's, samples' or tokens'.

    **Arguments:** `kind`, which of them; `product`, `v ↦ Jᵀv` block by block; `step`, the dynamics'
    `ε`.
    """

    def __init__(
        self,
        kind: Literal["batch", "sample", "token"],
        product: Callable[[Tensor], Tensor],
        step: float,
    ) -> None:
        self._first = {"batch": 0, "sample": 1, "token": 2}[kind]  # axis that lies inside a block
        self._product, self._step = product, step

    def pull(self, v: Tensor) -> Tensor:
        """Return `J_gᵀ v`, block by block."""
        return v + self._step * self._product(v)

    def norm(self, v: Tensor) -> Tensor:
        """Return the norm of each block, shaped to multiply it."""
        inside = tuple(range(self._first, v.dim()))
        return torch.linalg.vector_norm(v, dim=inside, keepdim=True) if inside else v.abs()

    def unit(self, v: Tensor) -> Tensor:
        return v / (self.norm(v) + 1e-12)

    def worst(self, gains: Tensor) -> Tensor:
        """Return the gains, and 0 for each token but the worst of its sample.

        Alone in its sample, what a token sends back through its own block is what it sends at all.
        """
        if self._first < 2:
            return gains
        chosen = gains.argmax(1, keepdim=True)
        return torch.zeros_like(gains).scatter(1, chosen, gains.gather(1, chosen))


def _directional(
    parameters: list[nn.Parameter], system: System, z: Tensor, along: Tensor, v: Tensor
) -> Gradients:
    """Return the gradients of `⟨v, J_g u⟩` by some parameters, with `u = along`, `(B, ...)`.

    They are central differences of `⟨v, g⟩`'s along `u`, over the samples where that is not zero.
    At a step of the cube root of epsilon, relative to what moves of the state, truncation and
    rounding are alike; relative to a whole window it would be too long for one token of many.
    """
    rows = in_rows(along).any(1)
    part = None if bool(rows.all()) else system.samples(rows)
    if part is not None:
        system, z, along, v = part, z[rows], along[rows], v[rows]
    size = sample_norm(along)
    moved = sample_norm(z * (along.abs().amax(-1, keepdim=True) > 0))
    moved = torch.where(moved > 0, moved, sample_norm(z))
    h = torch.finfo(z.dtype).eps ** (1 / 3) * moved.clamp_min(1e-12)
    move = per_sample(h / size.clamp_min(1e-30), z) * along
    weight = per_sample(system.step * size / (2 * h), z) * v
    total: list[Tensor | None] = [None] * len(parameters)
    for sign in (1.0, -1.0):
        with torch.enable_grad():
            force, _ = system.record(z + sign * move)
        if not (parameters and force.requires_grad):
            return tuple(total)
        own = torch.autograd.grad(force, parameters, sign * weight, allow_unused=True)
        total = [_sum(t, g) for t, g in zip(total, own, strict=True)]
    return tuple(total)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def called(model: nn.Module) -> Iterator[tuple[Equilibrium, str, Certificate]]:
    """Yield the equilibria that have a last call and that could lose their fixed point."""
    for path, block in equilibria(model):
        seen = block.certificate
        if seen is not None and seen.system is not None and not block.dynamics.feedforward:
            yield block, path, seen


def samples(z: Tensor) -> int:
    """Return over how many samples a mean is taken: those of the joint batch."""
    part = now()
    return len(z) if part is None else part.total


def worst_gain(gains: list[float]) -> dict[str, float]:
    """Return the largest of the blocks' gains by its name; NaN is the worst of all."""
    return {"jacobian_gain": max(gains, key=_nan_is_worst)} if gains else {}


def _nan_is_worst(gain: float) -> float:
    return math.inf if math.isnan(gain) else gain


def process_group(model: nn.Module) -> Any:
    """Return the process group over which `model`'s gradients are averaged, or `None`."""
    return model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None


def accumulate(
    push: Sequence[Tensor | None], parameters: Sequence[nn.Parameter], group: Any
) -> None:
    """Add gradients to the `.grad` of parameters, averaged over the ranks of `group`.

    Every rank takes part, whether its own samples are past the margin or not.
    """
    for p, own in zip(parameters, push, strict=True):
        gradient = own
        if group is not None:
            gradient = torch.zeros_like(p) if own is None else own.contiguous()
            torch.distributed.all_reduce(gradient, group=group)
            gradient = gradient / group.size()
        if gradient is None:
            continue
        with torch.no_grad():
            p.grad = gradient.clone() if p.grad is None else p.grad.add_(gradient)

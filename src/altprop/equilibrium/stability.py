"""Keep a fixed point while it learns: stabilisers that act between backward and clipping.

A stabiliser is a value; `init` makes its state, `apply` adds its own gradient to `.grad`. A
training loop calls it without knowing what it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from altprop.equilibrium.conduct import refuse_shards
from altprop.equilibrium.dynamics import AbstractDynamics
from altprop.equilibrium.estimators.estimator import Certificate, System
from altprop.equilibrium.module import equilibria
from altprop.equilibrium.solvers.solver import check_counts, check_fields, is_positive
from altprop.errors import ConfigError


class AbstractStabiliser(ABC):
    """Base of every stabiliser: a frozen dataclass."""

    @abstractmethod
    def init(self, generator: torch.Generator) -> Any:
        """Return this stabiliser's state; its random draws come from `generator` (on the CPU).

        The state has `state_dict()` and `load_state_dict(...)`, of tensors by name.
        """

    @abstractmethod
    def apply(
        self, model: nn.Module, state: Any, step: int, *, urgent: bool = False
    ) -> dict[str, float]:
        """Add this stabiliser's gradient to `.grad` of `model`'s parameters.

        Call it after `loss.backward()` and before clipping, with the number of the step from 0;
        `urgent` when the step's own gradient was refused, so that it acts even if it would rest.
        Returns what it measured, by name (empty on a step where it rests).
        """


@dataclass
class HingeState:
    """The probes that a `JacobianHinge` carries from step to step, by the block's path."""

    generator: torch.Generator
    probes: dict[str, Tensor] = field(default_factory=dict)

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
    """Push the Jacobian's gain back, but only past a margin: `w · max(0, ρ − τ)²`.

    For `g(z) = z + εF(z)` at the free state, held constant, `ρ = ‖J_gᵀ v‖` with a unit `v` that
    adds a power-iterated probe to the direction of the adjoint's remaining residual: the probe
    finds the lasting hard modes, the residual those of this very batch. The force is that of the
    last call, with its further arguments and its draws of dropout. The task pushes the
    feedback up and the hinge only down, so together they hold the gain near the margin.

    Costs one VJP with a graph per block on the steps where it acts, and its backward where it
    pushes. Without a gate in the dynamics it also shrinks what the block computes: use it with
    `GatedBlock`.

    **Arguments:** `target`, the margin `τ` (`None`: the dynamics' own `margin`, 0.3 for most);
    `every`, act on every so many steps, with `every` times the weight; `weight`, `w` for `every=1`;
    `fresh`, the size of the random part of the next probe relative to a unit vector.
    """

    target: float | None = None
    every: int = 2
    weight: float = 1.0
    fresh: float = 0.05

    def __post_init__(self) -> None:
        if self.target is not None:
            check_fields("JacobianHinge", target=self.target)
        check_fields("JacobianHinge", weight=self.weight)
        check_counts("JacobianHinge", every=self.every)
        if not (is_positive(self.fresh) or self.fresh == 0):
            raise ConfigError(f"JacobianHinge: fresh is {self.fresh!r}, expected a number ≥ 0")

    def init(self, generator: torch.Generator) -> HingeState:
        return HingeState(generator)

    def apply(
        self, model: nn.Module, state: HingeState, step: int, *, urgent: bool = False
    ) -> dict[str, float]:
        if step % self.every and not urgent:
            return {}
        group = _process_group(model)
        called = [
            (path, block.dynamics, block.certificate, block.certificate.system)
            for path, block in equilibria(model)
            if block.certificate is not None and block.certificate.system is not None
            if not block.dynamics.feedforward
        ]
        for _, dynamics, *_ in called:
            refuse_shards(dynamics, "JacobianHinge")
        gains = [self._push(*call, state, group) for call in called]
        measured = [gain for gain in gains if gain is not None]
        return {"jacobian_gain": max(measured, key=_nan_is_worst)} if measured else {}

    def _push(
        self,
        path: str,
        dynamics: AbstractDynamics,
        seen: Certificate,
        system: System,
        state: HingeState,
        group: Any,
    ) -> float | None:
        z = seen.state
        if z.numel() == 0:  # nothing to measure, but other ranks may have samples
            _accumulate(None, dynamics, group)
            return None
        target = dynamics.margin if self.target is None else self.target
        noise = torch.randn(z.shape, generator=state.generator, device="cpu").to(z)
        noise /= math.sqrt(z.numel())
        probe = state.probes.get(path)
        if probe is None or probe.shape != z.shape:
            probe = noise
        direction = _unit(probe.to(z))
        remainder = seen.adjoint_remainder
        if remainder is not None and bool(remainder.isfinite().all()):
            direction = _unit(direction + _unit(remainder))
        # the fused attention kernels have no double backward
        with torch.enable_grad(), torch.autocast(z.device.type, enabled=False):
            with sdpa_kernel(SDPBackend.MATH):
                leaf = z.detach().requires_grad_()
                mapped = leaf + system.step * system.force(leaf)
                (pulled,) = torch.autograd.grad(mapped, leaf, direction, create_graph=True)
            gain = (pulled.square().sum() + 1e-12).sqrt()  # differentiable at J = 0
            size = float(gain.detach())
            over = math.isfinite(size) and size > target
            penalty = self.weight * self.every * (gain - target).square() if over else None
            _accumulate(penalty, dynamics, group)
        if math.isfinite(size):
            state.probes[path] = pulled.detach() / size + self.fresh * noise
        else:  # a lost state must not poison the probes of the steps to come
            state.probes.pop(path, None)
        return size


def _unit(v: Tensor) -> Tensor:
    return v / (v.norm() + 1e-12)


def _nan_is_worst(gain: float) -> float:
    return math.inf if math.isnan(gain) else gain


def _process_group(model: nn.Module) -> Any:
    """Return the process group over which `model`'s gradients are averaged, or `None`."""
    return model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None


def _accumulate(penalty: Tensor | None, module: nn.Module, group: Any) -> None:
    """Add the gradient of `penalty` to `.grad`, averaged over the ranks of `group`.

    Every rank takes part, whether its own samples are past the margin or not.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
    if parameters and penalty is not None and penalty.requires_grad:
        gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
    for p, own in zip(parameters, gradients, strict=True):
        gradient = own
        if group is not None:
            gradient = torch.zeros_like(p) if own is None else own.contiguous()
            torch.distributed.all_reduce(gradient, group=group)
            gradient = gradient / group.size()
        if gradient is None:
            continue
        with torch.no_grad():
            p.grad = gradient.clone() if p.grad is None else p.grad.add_(gradient)

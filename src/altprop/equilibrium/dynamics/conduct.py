"""How a force must behave for its equilibrium to have a gradient, and what is said if it does not.

A call evaluates its force many times and solves every sample by itself. So samples must not
interact, an evaluation must leave the buffers as they are, and random numbers must either be the
same ones in all evaluations, as dropout's are, or be declared as noise that is fresh in each.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from altprop.equilibrium.dynamics.products import AbstractLinearisation, ClosedForm
from altprop.equilibrium.dynamics.surroundings import version_of
from altprop.equilibrium.solvers.solver import AbstractSolver, in_rows
from altprop.errors import ConfigError, RuleError
from altprop.recording import hooked

DRAWS = ("replayed", "fresh")


class Draws:
    """Where the random generators stood at one moment, so that the same can be drawn again."""

    def __init__(self, device: torch.device) -> None:
        self._generators: list[Any] = [torch.default_generator]
        own = None if device.type == "cpu" else torch.get_device_module(device)
        if hasattr(own, "get_rng_state"):
            self._generators.append(_DeviceGenerator(own, device))
        self._states = self._now()

    def _now(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]

    def _stand(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)

    def moved(self) -> bool:
        """Tell whether anything was drawn since."""
        pairs = zip(self._states, self._now(), strict=True)
        return not all(torch.equal(then, now) for then, now in pairs)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw inside as was drawn from that moment on, and leave the generators as they were."""
        before = self._now()
        self._stand(self._states)
        try:
            yield
        finally:
            self._stand(before)


class _DeviceGenerator:
    """The generator of a device, by its module; Apple's has only one device."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self._module = module
        self._where = () if device.type == "mps" else (device,)

    def get_state(self) -> Tensor:
        state: Tensor = self._module.get_rng_state(*self._where)
        return state

    def set_state(self, state: Tensor) -> None:
        self._module.set_rng_state(state, *self._where)


_UPDATES = 8  # after so many, learning has shown what it can show at once


@dataclass
class Asked:
    """How often something was asked whose answer learning may change.

    What is at zero hides what is behind it. So it is asked in the first call, and again of the
    first one after each of the first updates of the parameters, and in every call whose number is a
    power of two.

    **Fields:** `calls`; `updates`, those that were seen, the initialisation being one; `version`,
    of the parameters.
    """

    calls: int = 0
    updates: int = 0
    version: int = -1

    def due(self, parameters: Callable[[], Iterable[Tensor]]) -> bool:
        """Tell whether it is to be asked in the call that comes."""
        return self.calls & (self.calls + 1) == 0 or self._moved(parameters) is not None

    def count(self, parameters: Callable[[], Iterable[Tensor]]) -> None:
        """Count a call that told something, or in which it was not asked."""
        self.calls += 1
        moved = self._moved(parameters)
        if moved is not None:
            self.updates, self.version = self.updates + 1, moved

    def _moved(self, parameters: Callable[[], Iterable[Tensor]]) -> int | None:
        """Return the parameters' version if it is a new one and still counts."""
        if self.updates >= _UPDATES:
            return None
        # every writing into a tensor makes its version grow
        version = sum(map(version_of, parameters()))
        return None if version == self.version else version


@dataclass
class Conduct:
    """What was found out about a dynamics so far, by asking when its force is evaluated.

    `warned`: whether something was said of its draws, or needs not be. `calm`: the modes (training
    or not) in which an evaluation left all buffers as they were. `apart`: when it was asked whether
    samples interact, by the number of the state's axes.
    """

    warned: bool = False
    calm: set[Hashable] = field(default_factory=set)
    apart: dict[int, Asked] = field(default_factory=dict)

    @contextmanager
    def unchanged(self, dynamics: nn.Module, uses: Iterable[nn.Module]) -> Iterator[None]:
        """Refuse a force that changes its own buffers when it is evaluated inside.

        Batch norm at work is refused before.

        **Arguments:** `uses`, the modules that the force calls.
        """
        refuse_statistics(_at_work(uses), "the force holds")
        with steady(dynamics, self.calm, dynamics.training, "the force"):
            yield

    def announce_draws(
        self, name: str, uses: Iterable[nn.Module], draws: Callable[[], bool]
    ) -> None:
        """Warn once of a force that draws random numbers, not all by dropout, and has not said why.

        **Arguments:** `name`, of the dynamics' class; `uses`, the modules that it calls; `draws`,
        which evaluates the force once more and tells whether that draws.
        """
        if self.warned:
            return
        self.warned = True
        dropping = [m for m in uses if m.training and _drops(m)]
        for m in dropping:
            m.training = False
        try:
            others = draws() if dropping else True
        finally:
            for m in dropping:
                m.training = True
        if others:
            warnings.warn(
                f"the force of {name} draws random numbers: all evaluations of a call now get the "
                "same ones, as dropout needs; say so by draws='replayed' (of from_function, or of "
                "the class), or draws='fresh' for noise that is new in each",
                RuntimeWarning,
                stacklevel=2,
            )

    def check_apart(
        self,
        parameters: Callable[[], Iterable[Tensor]],
        z: Tensor,
        linearise: Callable[[], AbstractLinearisation],
    ) -> None:
        """Refuse a force in which samples interact, as far as its Jacobian tells.

        **Arguments:** `z`, where, `(B, ...)`; `linearise`, what returns the Jacobian there.

        It is asked as `Asked` says. Closed forms are known not to mix samples.
        """
        if len(z) < 2 or not z.numel() or isinstance(linearise, ClosedForm):  # they tell nothing
            return
        asked = self.apart.setdefault(z.dim(), Asked())
        if asked.due(parameters):
            with unnoticed():
                seen = seeing(linearise(), z)
            if seen is not None:
                raise RuleError(
                    f"samples interact: the force on sample {seen[0]} depends on the state of "
                    f"sample {seen[1]}; samples must lie on axis 0 and not see each other: give "
                    "(N, T, C) and transpose inside a force that wants (T, N, C), use LayerNorm or "
                    "GroupNorm for what averages over the batch, and give x[None] where all of it "
                    "is one sample"
                )
        asked.count(parameters)


def check_draws(draws: Any) -> None:
    """Refuse what says nothing about the random numbers of a force."""
    if not isinstance(draws, bool) and draws not in DRAWS:
        raise ConfigError(
            f"draws is {draws!r}, expected 'replayed' (the same random numbers in every evaluation "
            "of a call, as dropout needs) or 'fresh' (noise that is new in each)"
        )


def refuse_statistics(named: Iterable[tuple[str, nn.Module]], what: str) -> None:
    """Refuse norms that mix the samples of a batch, or change their statistics when they run."""
    found = dict.fromkeys(name for name, m in named if _keeps_statistics(m))
    if found:
        raise RuleError(
            f"{what} batch norm ({', '.join(found)}), which mixes the samples of a batch and "
            "changes its statistics at every evaluation: use LayerNorm or GroupNorm (in a force it "
            "may stay in evaluation mode, with the statistics that it has)"
        )


def _keeps_statistics(m: nn.Module) -> bool:
    return isinstance(m, _BatchNorm) or (isinstance(m, _InstanceNorm) and m.track_running_stats)


def _at_work(modules: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that compute statistics of their input now, by the names of their kinds."""
    for m in modules:
        if m.training or getattr(m, "running_mean", m) is None:
            yield type(m).__name__, m


@contextmanager
def steady(module: nn.Module, calm: set[Hashable], mode: Hashable, what: str) -> Iterator[None]:
    """Refuse a module that changes its own buffers when it is called inside.

    In a mode that is seen for the first time buffers are put back, so that nothing has changed
    after the refusal.

    **Arguments:** `calm`, the modes that were seen, to which this one is added; `what`, the module
    in words.
    """
    named = [(n, b) for n, b in module.named_buffers() if not b.is_inference()]
    before = [b._version for _, b in named]
    copies = [] if mode in calm else [b.detach().clone() for _, b in named]
    yield
    changed = [n for (n, b), version in zip(named, before, strict=True) if b._version != version]
    if not changed:
        calm.add(mode)
        return
    with torch.no_grad():
        for (_, b), copy in zip(named, copies, strict=False):
            b.copy_(copy)
    raise RuleError(
        f"evaluating {what} changes its buffers ({', '.join(changed)}), so each of the many "
        "evaluations of a call would be of another system: put what owns them into evaluation mode "
        f"(.eval()), or change them outside of {what}"
    )


def _drops(m: nn.Module) -> bool:
    """Tell whether a module is dropout, or has some of its own as attention and LSTMs do."""
    if "drop" in type(m).__name__.lower():
        return True
    return any("drop" in name and isinstance(v, float) and v > 0 for name, v in vars(m).items())


def refuse_unrepeatable(*solvers: Any) -> None:
    """Refuse solvers that compare evaluations of a force which draws fresh noise in each."""
    for solver in solvers:
        if isinstance(solver, AbstractSolver) and solver.repeatable:
            raise RuleError(
                f"{type(solver).__name__} compares evaluations of the force, which must be "
                "repeatable for that, and draws='fresh' makes each one another: write "
                "Euler(step=..., max_steps=...), or draws='replayed'"
            )


def seeing(products: AbstractLinearisation, z: Tensor) -> tuple[int, int] | None:
    """Return a sample of the state `z`, `(B, ...)`, and one that it sees, or nothing.

    The product of the Jacobian with a cotangent of some samples must vanish in all others. Any two
    are told apart by a digit of their numbers, so that those which have it, and those which have
    it not, are asked for each of the `log₂ B` digits.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(z.shape, generator=generator, device="cpu").to(z)
    numbers = torch.arange(len(z), device=z.device)

    def touched(some: Tensor) -> Tensor:
        cotangent = torch.zeros_like(z)
        cotangent[some] = drawn[some]
        # (NaN, of a sample that is lost, is no sign of interaction)
        found = (in_rows(products.vjp(cotangent)).abs() > 0).any(1)
        found[some] = False
        return found.nonzero()

    for digit in range((len(z) - 1).bit_length()):
        has = (numbers >> digit) % 2 == 1
        for some in (numbers[has], numbers[~has]):
            if len(seen := touched(some)):
                while len(some) > 1:  # which of them it is
                    half = some[: len(some) // 2]
                    some = half if len(touched(half)) else some[len(some) // 2 :]
                return int(some[0]), int(torch.cat([touched(some), seen])[0])
    return None


def unnoticed() -> AbstractContextManager[None]:
    """Return a context for what is evaluated beside the forward pass, in some calls and not in all.

    Whoever counts or recomputes what a forward pass saves, as checkpointing does, must not see what
    is saved inside. Where nobody does, nothing is put in between, which `torch.func` refuses.
    """
    if not hooked():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda t: t)


def refuse_sharded(dynamics: nn.Module) -> None:
    """Refuse parts that FSDP2 shards by themselves, and so gathers and shards at their calls.

    How often a force is evaluated depends on the data, and so differs from rank to rank, where each
    gathering needs all of them; and the adjoint evaluates it where FSDP2 expects no calls.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in dynamics.modules()):
        raise RuleError(
            "fully_shard of a part of an equilibrium gathers its parameters at every evaluation of "
            "the force, and every rank makes another number of these: write fully_shard(block) for "
            "the whole Equilibrium, or fully_shard of the module that holds the whole stack"
        )


def refuse_shards(dynamics: nn.Module, what: str) -> None:
    """Refuse to evaluate a force where FSDP2 has its parameters in shards, between two steps."""
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is not None and any(isinstance(p, tensor.DTensor) for p in dynamics.parameters()):
        raise RuleError(
            f"{what} evaluates the force between backward and step, where FSDP2 has its parameters "
            "in shards: write DistributedDataParallel(model), or train without it"
        )

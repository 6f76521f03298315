"""What is measured of a model by running its forward pass once more, all rules off.

`JacobianProbe` gives learned feedback its derivatives; `LayoutProbe` finds out which axis of a tap
counts the samples. Both see the taps and the error of one channel.
"""

from __future__ import annotations

import contextlib
import functools
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from altprop.conversion.channel import Call, Channel, Kind, Run, Tap, kind_of
from altprop.conversion.record import record_of, sites_of
from altprop.equilibrium.dynamics.products import load_forward_mode
from altprop.errors import AltpropError, RuleError
from altprop.feedback import randn
from altprop.layouts import MIXED, SEVERAL, Fit, Layout, fits, undecided
from altprop.parts import now
from altprop.recording import in_backward
from altprop.rule import Site


def _process_group() -> Any:
    """Return the group over which the running pass averages its gradients, or `None`.

    Only a model that `DistributedDataParallel` runs is asked about: an initialised group alone does
    not say that every rank makes this pass.
    """
    parallel = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if parallel is None:
        return None
    if parallel._join_config.enable:
        raise RuleError(
            "learned feedback is measured by all ranks together in every pass, and under join() a "
            "rank may have run out of batches: give every rank as many, and drop join()"
        )
    return parallel.process_group


class _Probe(Run):
    """A run of a model, or of a block with an error of its own, that is only looked at."""

    @contextlib.contextmanager
    def _shown(self) -> Iterator[tuple[Any, Any]]:
        """Be shown what runs in here: all rules off, evaluation mode, no fused or compiled code.

        Neither the random numbers nor the buffers nor the tensors that the pass around it was given
        are touched: yields the call's arguments to run with.
        """
        root, modules = self.call[0], list(self.call[0].modules())
        training = [module for module in modules if module.training]
        devices = list({t.device for t in root.parameters() if t.device.type == "cuda"})
        places = [site for module in modules for site in sites_of(module).values() if site.on]
        buffers = [(m._buffers, dict(m._buffers), _others(m)) for m in modules if m._buffers]
        copies: dict[int, Tensor] = {}
        records = [record for module in modules if (record := record_of(module)) is not None]
        running = [(channel, channel.running) for r in records for channel in r.channels]
        fast = torch.backends.mha.get_fastpath_enabled()
        for channel, _ in running:
            channel.running = None
        self.channel.running = self
        for place in places:
            place.on = False
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # it calls no part, and no tap
            for module in training:
                module.training = False
            for held, own, names in buffers:
                held.update((name, _copied(own[name], copies)) for name in names)
            with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
                yield tree_map_only(Tensor, lambda t: _copied(t, copies), self.call[1:])
        finally:
            for held, own, names in buffers:
                held.update((name, own[name]) for name in names)
            for channel, before in running:
                channel.running = before
            for place in places:
                place.on = True
            torch.backends.mha.set_fastpath_enabled(fast)
            for module in training:
                module.training = True

    def map(
        self,
        tap: Tap,
        module: nn.Module,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        rows: slice | None,
    ) -> Tensor:
        return tap.turned(self.drop(tap.turned(F.linear(x, W, b)), tap.index))

    def cut(self, tap: Tap, m: nn.Module, hidden: Tensor) -> Tensor:
        return self.drop(hidden, tap.index)

    @abstractmethod
    def drop(self, hidden: Tensor, index: int) -> Tensor:
        """Return what goes on from the tapped tensor of a site."""

    def rest(self, tap: Tap, m: nn.Module, extra: Tensor) -> Tensor:
        return extra

    def missed(self, path: str, weights: Iterable[Tensor]) -> None:
        """Let it pass: nothing is collected."""


def _others(module: nn.Module) -> list[str]:
    """Return the names of a module's buffers, feedback excepted."""
    record = record_of(module)
    known = () if record is None else record.names
    return [
        name for name, held in module._buffers.items() if held is not None and name not in known
    ]


def _copied(tensor: Tensor | None, copies: dict[int, Tensor]) -> Tensor:
    """Return the one copy of a tensor."""
    assert tensor is not None
    if id(tensor) not in copies:
        copies[id(tensor)] = tensor.detach().clone()
    return copies[id(tensor)]


class JacobianProbe(_Probe):
    """Forward-mode derivatives of the error's place with respect to each tap, all rules off.

    In a data-parallel pass, or one that sees a part of a batch (`parts.seeing`), the tangents are
    the joint batch's: every pass draws them all from one generator and takes its own part, the
    parts lying one after the other along the axis that the user's `batch_axis` names, or the first.
    """

    def __init__(self, channel: Channel, call: Call) -> None:
        super().__init__(channel, call)
        self.taps: Sequence[Site] = channel.sites
        self._part = now()
        self._group = _process_group() if self._part is None else self._part.group
        self._share = 1.0 if self._part is None else self._part.share

    def push(self, tap: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw `p ~ N(0, I)` at a tap and return it with `J p`, detached.

        Shapes: (..., features) and (..., k), the leading axes of both in the order of the error's.
        Runs in evaluation mode under math attention.
        """
        from torch.autograd import forward_ad
        from torch.nn.attention import SDPBackend, sdpa_kernel

        self._index, self._generator = tap, generator
        self._tangent: Tensor | None = None
        self._response: Tensor | None = None
        load_forward_mode()
        if (kept := _stateful(self.call[1:])) is not None:
            raise RuleError(
                f"{type(self.channel.rule).__name__} runs the model once more to measure, which "
                f"might change the {type(kept).__name__} that it was given: call the model with "
                "tensors, numbers and texts alone (no cache)"
            )
        try:
            with (
                self._shown() as (args, kwargs),
                torch.no_grad(),
                sdpa_kernel(SDPBackend.MATH),
                forward_ad.dual_level(),
            ):
                self.call[0].forward(*args, **kwargs)
        except NotImplementedError as error:
            raise RuleError(
                f"an operation above {self.taps[tap].path} has no forward-mode derivative; under "
                f"activation checkpointing write use_reentrant=False ({error})"
            ) from error
        if self._tangent is None or self._response is None:
            raise RuleError(
                f"no derivative from {self.taps[tap].path} reached the output in forward mode: "
                "one of the two did not run, or some operation between them dropped the tangent "
                "(if one was replaced: write revert(model) and convert again)"
            )
        p, Jp, channel = self._tangent, self._response, self.channel
        measure = functools.partial(measure_layouts, channel, self.call)
        fit = channel.choose(channel.ways(Jp.shape, p.shape), tap, Jp.shape, p.shape, measure)
        return fit.turn(p), Jp

    def drop(self, hidden: Tensor, index: int) -> Tensor:
        """Give the tapped tensor its tangent, if this is the tap that is probed."""
        from torch.autograd import forward_ad

        if index != self._index or self._tangent is not None:
            return hidden
        self._tangent = p = self._draw(hidden)
        # what is kept may not change in place
        dual: Tensor = forward_ad.make_dual(hidden, p.clone())
        return dual

    def _draw(self, hidden: Tensor) -> Tensor:
        size, before, total = hidden.numel(), 0, hidden.numel()
        if self._part is not None:
            a_sample = size // self._part.count
            before, total = a_sample * self._part.before, a_sample * self._part.total
        elif self._group is not None:
            mine = torch.tensor(size, device=hidden.device)
            found = [torch.empty_like(mine) for _ in range(self._group.size())]
            torch.distributed.all_gather(found, mine, group=self._group)
            sizes = torch.stack(found).tolist()
            before, total = sum(sizes[: self._group.rank()]), sum(sizes)
            self._share = size / total
        drawn = randn(self._generator, total)[before : before + size]
        samples = self.channel.layouts[0][1] if self.channel.layouts else 0
        return drawn.view(hidden.movedim(samples, 0).shape).movedim(0, samples).to(hidden)

    def average(self, estimate: Tensor) -> Tensor | None:
        """Return the mean over the joint batch of a mean over this pass's part at the last tap."""
        if self._part is None and self._group is None:
            return estimate
        estimate = estimate * self._share
        if self._part is not None:
            path, sums = self.taps[self._index].path, self._part.sums
            estimate = sums[path] = estimate + sums[path] if path in sums else estimate
            if not self._part.last:
                return None
        if self._group is not None:
            torch.distributed.all_reduce(estimate, group=self._group)
        return estimate

    def join(self, error: Tensor) -> Tensor:
        """Keep the tangent that arrived at the error's place."""
        from torch.autograd import forward_ad

        response = forward_ad.unpack_dual(error).tangent
        self._response = None if response is None else response.clone()
        return error


def _stateful(value: Any) -> Any:
    """Return the first thing in a call's arguments that a second call might find changed."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return next((found for v in value if (found := _stateful(v)) is not None), None)
    plain = isinstance(value, Tensor | bool | int | float | str | torch.dtype | torch.device)
    return None if plain or value is None or callable(value) else value


class LayoutProbe(_Probe):
    """Which axis of each tap counts the samples, read off what the error depends on.

    A cotangent that is NaN at one index of an axis of the error, and zero elsewhere, makes NaN of
    every position of a tap that leads there, whatever the weights are (a head of zeros as well).
    The axis of which each index hears itself alone is that of the samples.
    """

    def __init__(self, channel: Channel, call: Call) -> None:
        super().__init__(channel, call)
        self._sites: list[int] = []
        self._taps: list[Tensor] = []
        self._error: Tensor | None = None
        self._reached: dict[Any, Sequence[Tensor | None]] = {}

    def drop(self, hidden: Tensor, index: int) -> Tensor:
        """Keep a tapped tensor, with its way to the error."""
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        if not in_backward():  # else it is a checkpoint's recomputation
            self._sites.append(index)
            self._taps.append(hidden)
        return hidden.clone()  # what is kept may not change in place

    def join(self, error: Tensor) -> Tensor:
        """Keep the tensor at the error's place."""
        self._error = error
        return error

    def measure(self) -> dict[Kind, list[Layout]]:
        """Return the layouts of all taps for which shapes leave several open.

        **Raises:** `RuleError` where the samples depend on one another, or nothing can be measured.
        """
        kept = _stateful(self.call[1:])
        if kept is not None:
            raise RuleError(
                "the shapes leave open which axis counts the samples, and a second run to measure "
                f"it might change the {type(kept).__name__} that the model was given: write "
                "convert(..., batch_axis=0) if it is the first, batch_axis=1 for (T, N, C)"
            )
        with (
            self._shown() as (args, kwargs),
            torch.enable_grad(),
            # nothing of this run is left to a checkpoint around it
            torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
            torch.autograd.set_detect_anomaly(False),
        ):
            self.call[0].forward(*args, **kwargs)
            return self._find()

    def _find(self) -> dict[Kind, list[Layout]]:
        found: dict[Kind, list[Layout]] = {}
        for number, index in enumerate(self._sites):
            error, tap = self._shapes(number)
            groups = fits(error[:-1], tap[:-1])
            if len(groups) < 2:
                continue
            alone = [[f.layout for f in group if self._alone(f, number)] for group in groups]
            alone = [layouts for layouts in alone if layouts]
            layouts = alone[0] if len(alone) == 1 else []
            kind = kind_of(index, error, tap)
            found[kind] = [x for x in layouts if x in found.get(kind, layouts)]
            if not found[kind]:
                path = self.channel.sites[index].path
                raise undecided(path, error, tap, SEVERAL if layouts else MIXED)
        return found

    def _shapes(self, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        assert self._error is not None
        return tuple(self._error.shape), tuple(self._taps[number].shape)

    def _alone(self, fit: Fit, number: int) -> bool:
        """Say whether each index of the samples' axis of a tap reaches itself alone in the error.

        The first two stand for all.
        """
        a, b = fit.layout
        for i in range(min(2, fit.fine[b])):
            reached = self._reach(fit.view, a, i)[number]
            if reached is None:
                return False
            along = reached.reshape(fit.fine).movedim(b, 0).reshape(fit.fine[b], -1).any(1)
            if along.nonzero().flatten().tolist() != [i]:
                return False
        return True

    def _reach(self, view: tuple[int, ...], axis: int, i: int) -> Sequence[Tensor | None]:
        """Return, for each tap, which positions lead to index `i` of an axis of the error."""
        key = (view, axis, i)
        if key not in self._reached:
            assert self._error is not None
            seed = self._error.new_zeros((*view, self._error.shape[-1]))
            seed.select(axis, i).fill_(math.nan)
            try:
                grads = torch.autograd.grad(
                    self._error,
                    self._taps,
                    seed.reshape(self._error.shape),
                    retain_graph=True,
                    allow_unused=True,
                )
            except (RuntimeError, AltpropError) as error:
                path = self.channel.sites[self._sites[0]].path
                shapes = self._shapes(0)
                raise undecided(path, *shapes, f"it could not be measured ({error})") from error
            self._reached[key] = [None if g is None else g.isnan().any(-1) for g in grads]
        return self._reached[key]


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="the shapes leave open which axis counts the samples, and only a pass that is not "
    "compiled can measure it: write convert(..., batch_axis=0), or run one such pass before"
)
def measure_layouts(channel: Channel, call: Call) -> None:
    """Fill in what layouts the taps of a channel have in this call."""
    for kind, layouts in LayoutProbe(channel, call).measure().items():
        channel.learn(kind, layouts)

"""How an error reaches its taps: they are collected along a forward pass and joined at its end.

One autograd node takes the error's place and every tap (`assign.assign_taps`), so no module hook
and no shared state survives the pass; whatever was collected is dropped when the forward ends.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from altprop.assign import assign_taps
from altprop.errors import RuleError
from altprop.feedback import randn
from altprop.rule import AbstractBroadcast, Site, spread_error


class Tap(Protocol):
    """A place that hears the error; `on`, whether its rule is in force."""

    site: Site
    index: int
    on: bool


def in_backward() -> bool:
    """Say whether autograd is running a backward pass in this thread, as a recomputation does."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


@functools.cache
def _load_forward_mode() -> None:
    """Load torch's forward-mode formulas, whose import warns of torch's own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


class Channel:
    """The way of one error to the taps of one rule."""

    def __init__(self, rule: AbstractBroadcast, seed: int, shared: str) -> None:
        self.rule = rule
        self.seed = seed
        self.shared = shared  # the root's attribute that all taps slice, or ""
        self.members: list[Tap] = []
        self.probe: JacobianProbe | None = None
        self.clear()

    def clear(self) -> None:
        self.mode: Literal["idle", "rule", "exact"] = "idle"
        self.joined = False
        self.matrix: Tensor | None = None
        self.taps: list[Tensor] = []
        self.feedback: list[Tensor] = []
        self.which: list[int] = []
        self.places: dict[int, int] = {}
        self.estimates: list[Tensor | None] = []
        self.measured: Sequence[Tensor] | None = None

    @property
    def sites(self) -> list[Site]:
        """The sites of all taps, each at its tap's `index`."""
        return [tap.site for tap in self.members]

    @property
    def on(self) -> bool:
        """Whether any tap is in force."""
        return any(tap.on for tap in self.members)

    def forget(self, tap: Tap) -> None:
        """Let a tap go, whose place is on backprop from now on."""
        self.members.remove(tap)
        for index, left in enumerate(self.members):
            left.index = index

    def begin(self, root: nn.Module, exact: bool = False) -> None:
        """Start to collect for a recorded forward pass of `root`."""
        self.mode = "exact" if exact else "rule"
        if self.shared:
            self.matrix = getattr(root, self.shared)

    def push(self, tap: Tensor, B: Tensor | None, index: int, rows: slice | None = None) -> None:
        """Collect a tap with its feedback, or with its rows of the shared one (`B` is none).

        **Arguments:** `B` (features, k); `index`, of the tap's site; `rows`, of `B` if the tap is
        only a part of its site.
        """
        count = self.members[index].site.rows
        # taps of one feedback share one product: the error is multiplied once for all of them
        key = index if B is not None else -count
        if rows is not None or key not in self.places:
            B = self.matrix if B is None else B
            assert B is not None
            place = len(self.feedback)
            self.feedback.append(B[:count] if rows is None else B[rows])
            self.estimates.append(None if self.measured is None else self.measured[index])
        else:
            place = self.places[key]
        if rows is None:
            self.places[key] = place
        if self.mode == "rule":
            self.taps.append(tap)
            self.which.append(place)

    def join(self, error: Tensor) -> Tensor:
        """Return the error's tensor, from which the cotangent now also reaches every tap."""
        if self.probe is not None:
            self.probe.catch(error)
            return error
        if self.mode == "idle" or not torch.is_grad_enabled():
            return error
        if self.joined:
            raise RuleError(
                "the output was computed twice in one forward pass, so that the error has no one "
                "place: name a module that runs once as output=..."
            )
        if self.feedback and error.shape[-1] != self.feedback[0].shape[1]:
            have, want = error.shape[-1], self.feedback[0].shape[1]
            raise RuleError(
                f"the error has {have} features, but the feedback was drawn for {want}: write "
                f"revert(model) and convert it again, a block of that width with features={have}"
            )
        for tap in self.taps:
            spread_error(error.detach(), tap.shape)  # raises if the shapes do not fit
        self.joined = True
        joined = assign_taps(error, self.taps, self.which, self.feedback, self.estimates, self.rule)
        self.taps, self.which, self.feedback, self.estimates = [], [], [], []
        return joined

    def finish(self) -> None:
        """Check, at the end of a forward pass, that every tap will hear the error."""
        if self.feedback:
            raise RuleError(
                f"{len(self.feedback)} tapped outputs were computed after the output module, or "
                "it never ran: name as output=... the module that makes the logits (if it was "
                "replaced or reverted: write revert(model) and convert again)"
            )

    def outside(self, path: str) -> None:
        """Refuse a recorded pass that no error can reach; let recomputations through."""
        if torch.is_grad_enabled() and not in_backward():
            raise RuleError(
                f"{path} ran outside the forward of the model that was converted, so no error can "
                "reach it: call the whole model, or wrap the call in rules_off or torch.no_grad()"
                ", or revert this part"
            )

    def unrecorded(self, path: str) -> RuleError:
        return RuleError(
            f"{path} ran without recording inside a recorded forward: reentrant activation "
            "checkpointing hides it from the error; write use_reentrant=False"
        )


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


class JacobianProbe:
    """Forward-mode derivatives of the error's place with respect to each tap, all rules off.

    In a data-parallel pass the tangents are the joint batch's: every rank draws them all from one
    generator and takes its own part, the ranks' batches lying one after the other.
    """

    def __init__(self, channel: Channel, root: nn.Module, args: Any, kwargs: Any) -> None:
        self.taps: Sequence[Site] = channel.sites
        self._group = _process_group()
        self._share = 1.0
        self._channel = channel
        self._root = root
        self._args = args
        self._kwargs = kwargs

    def push(self, tap: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw `p ~ N(0, I)` at a tap and return it with `J p`, detached.

        Shapes: (..., features) and (..., k). Runs in evaluation mode under math attention.
        """
        from torch.autograd import forward_ad
        from torch.nn.attention import SDPBackend, sdpa_kernel

        self._index, self._generator = tap, generator
        self._tangent: Tensor | None = None
        self._response: Tensor | None = None
        training = [module for module in self._root.modules() if module.training]
        devices = list({t.device for t in self._root.parameters() if t.device.type == "cuda"})
        _load_forward_mode()
        fast = torch.backends.mha.get_fastpath_enabled()  # a fused forward has no forward mode
        self._channel.probe = self
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for module in training:
                module.training = False
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices),
                sdpa_kernel(SDPBackend.MATH),
                forward_ad.dual_level(),
            ):
                self._root(*self._args, **self._kwargs)
        except NotImplementedError as error:
            raise RuleError(
                f"an operation above {self.taps[tap].path} has no forward-mode derivative; under "
                f"activation checkpointing write use_reentrant=False ({error})"
            ) from error
        finally:
            self._channel.probe = None
            torch.backends.mha.set_fastpath_enabled(fast)
            for module in training:
                module.training = True
        if self._tangent is None or self._response is None:
            raise RuleError(
                f"no derivative from {self.taps[tap].path} reached the output in forward mode: "
                "one of the two did not run, or some operation between them dropped the tangent "
                "(if one was replaced: write revert(model) and convert again)"
            )
        return self._tangent, self._response

    def drop(self, hidden: Tensor, index: int) -> Tensor:
        """Give the tapped tensor its tangent, if this is the tap that is probed."""
        from torch.autograd import forward_ad

        if index != self._index or self._tangent is not None:
            return hidden
        self._tangent = p = self._draw(hidden)
        dual: Tensor = forward_ad.make_dual(hidden, p)
        return dual

    def _draw(self, hidden: Tensor) -> Tensor:
        size, before, total = hidden.numel(), 0, hidden.numel()
        if self._group is not None:
            mine = torch.tensor(size, device=hidden.device)
            found = [torch.empty_like(mine) for _ in range(self._group.size())]
            torch.distributed.all_gather(found, mine, group=self._group)
            sizes = torch.stack(found).tolist()
            before, total = sum(sizes[: self._group.rank()]), sum(sizes)
            self._share = size / total
        drawn = randn(self._generator, total)
        return drawn[before : before + size].view(hidden.shape).to(hidden)

    def average(self, estimate: Tensor) -> Tensor:
        """Return the mean over the joint batch of a mean over this rank's part at the last tap."""
        if self._group is None:
            return estimate
        estimate = estimate * self._share
        torch.distributed.all_reduce(estimate, group=self._group)
        return estimate

    def catch(self, error: Tensor) -> None:
        """Keep the tangent that arrived at the error's place."""
        from torch.autograd import forward_ad

        self._response = forward_ad.unpack_dual(error).tangent

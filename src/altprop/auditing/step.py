"""What anybody's training step really did: its gradients beside the exact ones, and what it read.

The step runs on a copy of the model, so that nothing of the caller's changes.
"""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from altprop.auditing.agreement import Agreement, compare_all
from altprop.auditing.watch import PerParameter, Reading, watch
from altprop.conversion.convert import rules_off
from altprop.conversion.record import record_of
from altprop.equilibrium.module import Equilibrium
from altprop.errors import ConfigError

# How exact is exact: rounding in float32, over a deep model, stays below either.
_SAME, _PARALLEL = 1e-3, 1e-5
_SPREAD = 3.0  # standard deviations of a random direction's cosine


class Verdict(enum.Enum):
    """What a step's gradient of one parameter is; the value says it in words."""

    EXACT = "exact"
    SCALED = "exact but for its length"
    BIASED = "biased"
    UNCORRELATED = "no nearer than a random direction"
    UNTOUCHED = "untouched"
    UNKNOWN = "the exact gradient is zero or none"


@dataclass(frozen=True)
class StepRow:
    """What a step did to one parameter.

    `verdict`; `agreement`, of what the step wrote into `.grad`, or else of minus its change of the
    weight, beside the exact gradient; `moved`, of minus the change in either case (`None`: it did
    not change); `spread`, the standard deviation of a random direction's cosine; `reading`.
    """

    verdict: Verdict
    agreement: Agreement | None
    moved: Agreement | None
    spread: float
    reading: Reading

    def __str__(self) -> str:
        out = self.verdict.value
        found = self.agreement
        if found is not None and found.cosine is not None and found.norm_ratio is not None:
            if self.verdict is Verdict.SCALED:
                out += f", times {found.norm_ratio:.3g}"
            elif self.verdict in (Verdict.BIASED, Verdict.UNCORRELATED):
                out += f": cosine {found.cosine:.3f} (random ± {self.spread:.3f})"
        if self.moved is not None and self.moved.cosine is not None:
            out += f"; moved along it by cosine {self.moved.cosine:.3f}"
        return f"{out}; {self.reading}"


class StepAudit(PerParameter[StepRow]):
    """What a step did to every parameter, by its name; `str` of it is a table."""


def audit_step(
    step: Callable[[nn.Module, Any], Any],
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
) -> StepAudit:
    """Run a training step on a copy of `model`, and say of every parameter what it did to it.

    Rules of this library are switched off for the exact gradient. Both runs draw the same random
    numbers (dropout's masks, say). What the step writes into `.grad` is judged, and where it
    writes nothing there, its change of the weight, whose direction an optimiser may have bent.

    **Arguments:** `step`, called as `step(model, batch)` with the copy: anything from a `backward`
    to whole updates, with an optimiser that it makes of `model.parameters()` itself; `loss_fn`,
    `loss_fn(model, batch)` returns the loss, a scalar, whose gradient is the exact one; `batch`,
    handed on to both.

    **Raises:** `ConfigError` for a loss that is no scalar with a gradient.
    """
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    for copied in (theirs, ours):
        copied.zero_grad(set_to_none=True)
    exact = _exact(ours, loss_fn, batch)
    before = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    with torch.random.fork_rng(), watch(theirs) as seen:
        step(theirs, batch)
    after = dict(theirs.named_parameters())
    wrote = {n: p.grad for n, p in after.items() if p.grad is not None and bool(p.grad.any())}
    moved = {n: before[n] - p.detach() for n, p in after.items() if n in before}
    moved = {name: delta for name, delta in moved.items() if bool(delta.any())}
    told, changes = _compare({**moved, **wrote}, exact), _compare(moved, exact)
    rows = {}
    for name, p in before.items():
        spread = 1 / math.sqrt(p.numel())
        verdict = _verdict(told.get(name), name in {**moved, **wrote}, spread)
        rows[name] = StepRow(verdict, told.get(name), changes.get(name), spread, seen[name])
    return StepAudit(rows)


def _exact(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any
) -> dict[str, Tensor]:
    modules = list(model.modules())
    off = any(record_of(m) is not None or isinstance(m, Equilibrium) for m in modules)
    with torch.random.fork_rng(), torch.enable_grad(), rules_off(model) if off else nullcontext():
        loss = loss_fn(model, batch)
        _backward(loss)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _backward(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        given = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss))
        raise ConfigError(
            f"loss_fn returned {given}, expected a scalar loss that depends on the parameters: "
            "write loss_fn=lambda model, batch: criterion(model(batch[0]), batch[1])"
        )
    loss.backward()


def _compare(given: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, Agreement]:
    both = [name for name in exact if name in given]
    if not both:
        return {}
    return compare_all({n: given[n] for n in both}, {n: exact[n] for n in both})[0]


def _verdict(found: Agreement | None, touched: bool, spread: float) -> Verdict:
    if not touched:
        return Verdict.UNTOUCHED
    if found is None or found.cosine is None or found.relative_error is None:
        return Verdict.UNKNOWN
    if found.relative_error <= _SAME:
        return Verdict.EXACT
    if found.cosine >= 1 - _PARALLEL and spread < 1:
        return Verdict.SCALED
    if abs(found.cosine) <= _SPREAD * spread:
        return Verdict.UNCORRELATED
    return Verdict.BIASED

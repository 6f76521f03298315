"""What anybody's training step really did: its gradients beside the exact ones, and what it read.

The step runs on a copy of the model, so that nothing of the caller's changes.
"""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from altprop.auditing.agreement import Agreement, Flag, compare_all
from altprop.auditing.watch import PerParameter, Reading, watch
from altprop.conversion.convert import rules_off
from altprop.conversion.record import record_of
from altprop.drawing import drawing_alike
from altprop.equilibrium.module import Equilibrium
from altprop.errors import ConfigError
from altprop.statistics import t_quantile

# How exact is exact: rounding in float32, over a deep model, stays below either.
_SAME, _PARALLEL = 1e-3, 1e-5
# A random direction's cosine is below three standard deviations with this probability.
_SPREAD, _SURE = 3.0, 0.9973
_MUDDY = 0.3  # the share of a change that rounding may take before it says nothing
_MANY = 200  # numbers from which on the normal law serves


class Verdict(enum.Enum):
    """What a step's gradient of one parameter is; the value says it in words."""

    EXACT = "exact"
    SCALED = "exact but for its length"
    BIASED = "biased"
    UNCORRELATED = "no nearer than a random direction"
    UNTOUCHED = "untouched"
    LOST = "not finite"
    ROUNDED = "lost in the rounding of the weight"
    UNKNOWN = "the exact gradient is zero, not finite or none"


@dataclass(frozen=True)
class StepRow:
    """What a step did to one parameter.

    `verdict`; `agreement`, of what the step wrote into `.grad` before it first changed the weight,
    or else of minus its change of the weight, beside the exact gradient; `moved`, of minus the
    change in either case (`None`: it did not change); `spread`, the standard deviation of a random
    direction's cosine; `reading`; `by_change`, whether the change of the weight was judged.
    """

    verdict: Verdict
    agreement: Agreement | None
    moved: Agreement | None
    spread: float
    reading: Reading
    by_change: bool = False

    def __str__(self) -> str:
        out = self.verdict.value
        found = self.agreement
        if found is not None and found.cosine is not None and found.norm_ratio is not None:
            if self.verdict is Verdict.SCALED:
                out += f", times {found.norm_ratio:.3g}"
            elif self.verdict in (Verdict.BIASED, Verdict.UNCORRELATED):
                out += f": cosine {found.cosine:.3f} (random ± {self.spread:.3f})"
        if self.by_change:
            out += "; judged by its change of the weight"
        elif self.moved is not None and self.moved.cosine is not None:
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
    numbers (dropout's masks, say) and have a copy of the batch's tensors. What the step writes into
    `.grad` before its first update is judged, whatever it does with it then, and where it writes
    nothing there, its change of the weight, whose direction an optimiser may have bent.

    **Arguments:** `step`, called as `step(model, batch)` with the copy: anything from a `backward`
    to whole updates, with an optimiser that it makes of `model.parameters()` itself; `loss_fn`,
    `loss_fn(model, batch)` returns the loss, a scalar, whose gradient is the exact one; `batch`,
    handed on to both.

    **Raises:** `ConfigError` for a loss that is no scalar with a gradient, for a model that cannot
    be copied, and for a loss or step of the model that it holds and not of the one it is given.
    """
    theirs, ours = _copy(model), _copy(model)
    with _frozen(model):  # so that a loss of the model that it holds has no gradient
        exact = _exact(ours, loss_fn, _own(batch))
    before = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    watched = watch(theirs)
    with _kept(model), drawing_alike(), watched as seen, _written(theirs, before) as wrote:
        _hook_alike(theirs, model)
        step(theirs, _own(batch))
    moved = {n: before[n] - p.detach() for n, p in theirs.named_parameters() if n in before}
    moved = {name: delta for name, delta in moved.items() if bool(delta.any())}
    given = {**moved, **wrote}
    told, changes = _compare(given, exact), _compare(moved, exact)
    rows = {}
    for name, p in before.items():
        count = p.numel() * (2 if p.is_complex() else 1)
        spread, by_change = 1 / math.sqrt(count), name in moved and name not in wrote
        # what a change of the weight has lost of the gradient by rounding, relative to it
        lost = float(p.norm() * torch.finfo(p.dtype).eps / moved[name].norm()) if by_change else 0.0
        found, change = told.get(name), changes.get(name)
        verdict = _verdict(found, name in given, count, lost)
        rows[name] = StepRow(verdict, found, change, spread, seen[name], by_change)
    return StepAudit(rows)


def _copy(model: nn.Module) -> nn.Module:
    """Return a copy that has no gradients yet."""
    try:
        copied = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"the {type(model).__name__} cannot be copied ({str(error).splitlines()[0]}): keep "
            "tensors that were computed of its parameters out of its attributes, as "
            "nn.utils.parametrizations do (and nn.utils.weight_norm does not)"
        ) from error
    copied.zero_grad(set_to_none=True)
    return copied


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let nothing that is computed of `model` have a gradient."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Leave a model's weights and gradients as they are.

    **Raises:** `ConfigError` where what runs inside has changed them.
    """
    hooked = any(any(_hooks(p)) for p in model.parameters())
    before = [
        (p, p.detach().clone(), p.grad, None if p.grad is None else p.grad.clone())
        for p in model.parameters()
        if hooked  # only then is anything of the caller's run
    ]
    held = _versions(model)
    try:
        yield
    finally:
        changed = _versions(model) != held
        for p, weight, grad, gradient in before if changed else ():
            p.grad = grad
            with torch.no_grad():
                p.copy_(weight)
                if grad is not None and gradient is not None:
                    grad.copy_(gradient)
    if changed:
        raise ConfigError(
            "the step, or a hook of the model's parameters, trained the model that it holds, not "
            "the one that it is given: write it as step(model, batch) and use that model, with "
            "hooks and an optimiser made of its parameters in the step"
        )


def _hooks(p: Tensor) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the hooks of a parameter: of its gradient, and of what is done once it is there."""
    return p._backward_hooks or {}, getattr(p, "_post_accumulate_grad_hooks", None) or {}


def _hook_alike(copied: nn.Module, model: nn.Module) -> None:
    """Give a copy the hooks of its model's parameters, which are a part of the step."""
    for (name, p), q in zip(copied.named_parameters(), model.parameters(), strict=True):
        for hooks, register in zip(
            _hooks(q), (p.register_hook, p.register_post_accumulate_grad_hook), strict=True
        ):
            for hook in hooks.values() if p.requires_grad else ():
                register(_told(hook, name))


def _told(hook: Callable[[Tensor], Any], name: str) -> Callable[[Tensor], Any]:
    """Return a hook that says in one line that it cannot work on a copy."""

    def call(t: Tensor) -> Any:
        try:
            return hook(t)
        except Exception as error:
            raise ConfigError(
                f"a hook of {name} fails on the copy of the model ({type(error).__name__}): "
                "register it in the step, on the model that it is given"
            ) from error

    return call


def _own(batch: Any) -> Any:
    """Return a batch whose tensors and containers a step may change as it likes."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone().requires_grad_(value.requires_grad)
        try:
            return copy.deepcopy(value)
        except Exception:  # of what is no data, as a file that is open
            return value

    return tree_map(copied, batch)


def _versions(model: nn.Module) -> list[tuple[int, int | None]]:
    """Return what tells that a model's weights or gradients were changed in place or replaced."""
    return [(p._version, None if p.grad is None else p.grad._version) for p in model.parameters()]


@contextmanager
def _written(model: nn.Module, before: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Collect what is in each `.grad` when the weight is first changed, or at the end."""
    wrote: dict[str, Tensor] = {}
    served: set[str] = set()  # an optimiser, however little it moved the weight
    names = {id(p): name for name, p in model.named_parameters()}

    def note(p: Tensor) -> None:
        name = names.get(id(p))
        if name is None:
            return
        with _disable_current_modes():  # what is looked at here is no reading of the step's
            changed = not torch.equal(p, before[name])
            gradient = None if p.grad is None else p.grad.detach().to_dense()
            if gradient is None or not bool(gradient.any()):
                if not changed and name not in served:  # what was there came to nothing
                    wrote.pop(name, None)
            elif not (changed and (name in wrote or not ended)):
                wrote[name] = gradient.clone()

    def stepping(optimiser: torch.optim.Optimizer, *_: Any) -> None:
        for p in model.parameters():
            note(p)
        moving = [p for group in optimiser.param_groups for p in group["params"]]
        served.update(names[id(p)] for p in moving if id(p) in names and p.grad is not None)

    ended = False
    with ExitStack() as stack:
        stack.callback(register_optimizer_step_pre_hook(stepping).remove)
        for p in model.parameters():
            if p.requires_grad:
                stack.callback(p.register_post_accumulate_grad_hook(note).remove)
        yield wrote
    ended = True  # now of a weight that was changed too, if nothing was seen of it before
    for p in model.parameters():
        note(p)


def _exact(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any
) -> dict[str, Tensor]:
    modules = list(model.modules())
    off = any(record_of(m) is not None or isinstance(m, Equilibrium) for m in modules)
    with drawing_alike(), torch.enable_grad(), rules_off(model) if off else nullcontext():
        loss = loss_fn(model, batch)
        _backward(loss)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _backward(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        given = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss))
        raise ConfigError(
            f"loss_fn returned {given}, expected a scalar loss that depends on the parameters of "
            "the model that it is given, and not of one that it holds: write "
            "loss_fn=lambda model, batch: criterion(model(batch[0]), batch[1])"
        )
    loss.backward()


def _compare(given: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, Agreement]:
    both = [name for name in exact if name in given]
    if not both:
        return {}
    return compare_all({n: given[n] for n in both}, {n: exact[n] for n in both})[0]


def _verdict(found: Agreement | None, touched: bool, count: int, lost: float) -> Verdict:
    if not touched:
        return Verdict.UNTOUCHED
    if found is not None and found.flag is Flag.NON_FINITE:
        return Verdict.LOST
    if found is None or found.cosine is None or found.relative_error is None:
        return Verdict.UNKNOWN
    if lost > _MUDDY:
        return Verdict.ROUNDED
    if found.relative_error <= _SAME:
        return Verdict.EXACT
    if found.cosine >= 1 - max(_PARALLEL, lost**2):
        return Verdict.SCALED
    if abs(found.cosine) <= _random(count):
        return Verdict.UNCORRELATED
    return Verdict.BIASED


def _random(count: int) -> float:
    """Return what a random direction's cosine hardly exceeds; 0 where there is but one direction.

    Of `n` numbers, `c √(n − 1) / √(1 − c²)` has Student's law with `n − 1` degrees of freedom.
    """
    if count < 2:
        return 0.0
    t = _SPREAD if count > _MANY else t_quantile(count - 1, _SURE)
    return t / math.sqrt(count - 1 + t * t)

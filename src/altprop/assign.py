"""The one place where gradients are replaced: small autograd functions that know no rule.

A learning rule never touches the forward pass; it hands one of these functions a callable or
itself, and the function's backward writes what the rule returns in place of autograd's cotangent.
Those of transport and broadcast rules come in two halves, `value` and `keep`: the transforms of
`torch.func` want them apart.

Shapes: `x` (..., in), `W` and `B` (out, in), `b` (out), `g` (..., out), error `e` (..., k).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from altprop.errors import RuleError
from altprop.once import Grads, OnceOnly, once_only
from altprop.transforms import applied, in_halves, refuse_transforms, wants_gradient


class Transports(Protocol):
    """What a transport rule must answer; `AbstractTransport` is the class to derive from."""

    def matrix(self, W: Tensor, B: Tensor | None, noise: Tensor | None) -> Tensor: ...

    def feedback_gradient(
        self, W: Tensor, B: Tensor, grad_W: Tensor | None, noise: Tensor | None
    ) -> Tensor: ...


class Broadcasts(Protocol):
    """What a broadcast rule must answer; `AbstractBroadcast` is the class to derive from."""

    def cotangent(self, e: Tensor, B: Tensor, shape: torch.Size) -> Tensor: ...

    def feedback_gradient(self, B: Tensor, estimate: Tensor) -> Tensor: ...


class _AssignAdjoint(torch.autograd.Function):
    """`(F, value) ↦ value`, whose backward sends `adjoint(g)` into `F` instead of `g`."""

    @staticmethod
    def forward(
        ctx: Any, force: Tensor, value: Tensor, adjoint: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(force)
        ctx.adjoint = adjoint
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        # Under activation checkpointing this recomputes the module first, so that what the adjoint
        # measures is recorded after, and not before, what the recomputation records.
        (force,) = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(cotangent.device.type, enabled=False):
            a = ctx.adjoint(cotangent)
        if torch.is_grad_enabled():  # the caller said create_graph=True
            a = applied(OnceOnly, a, cotangent, force)
        return a, None, None


class _AssignPull(torch.autograd.Function):
    """`(value, sources) ↦ value`, whose backward sends `pull(keeper, a)` to the sources."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        pull: Callable[[Tensor, Tensor], Grads],
        keeper: Tensor,
        *sources: Tensor,
    ) -> Tensor:
        ctx.pull = pull
        # tensors made in inference mode cannot be saved, and nothing can be learned of them
        ctx.save_for_backward(keeper, *(None if s.is_inference() else s for s in sources))
        return value

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> Grads:
        keeper, *sources = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            grads = ctx.pull(keeper, a)
        if torch.is_grad_enabled():  # the caller said create_graph=True
            grads = once_only(grads, a, *sources)
        return None, None, None, *grads


def _matrix(t: Tensor) -> Tensor:
    """Return a tensor as the rows of its last axis; itself if it is that, since every call counts.

    (Three views less are a per cent of the time of a map from 128 to 512 features, 1024 tokens.)
    """
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


@in_halves
class _AssignTransport(torch.autograd.Function):
    """`x ↦ x Wᵀ + b`, whose backward sends `g M` to `x`; the weight keeps its own `gᵀ x`."""

    @staticmethod
    def value(
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        B: Tensor | None,
        noise: Tensor | None,
        rule: Transports,
        rows: slice | None,
    ) -> Tensor:
        return F.linear(x, W if rows is None else W[rows], b)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, W, _, B, noise, ctx.rule, ctx.rows = inputs
        ctx.shape = W.shape
        # As nn.Linear does, keep the input only for what learns, and the weight only for an input
        # that has a gradient: a first layer's may change in place before the backward pass.
        follows = B is not None and wants_gradient(B)
        asked = (W, B, noise) if follows or wants_gradient(x) else (None, None, None)
        ctx.save_for_backward(x if follows or wants_gradient(W) else None, *asked)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Grads:
        x, W, B, noise = ctx.saved_tensors
        if torch.is_grad_enabled():  # the caller said create_graph=True
            with torch.no_grad():
                grads = _AssignTransport.backward(ctx, g)
            return once_only(grads, g, x, W, B)
        needs_x, needs_W, needs_b, needs_B, *_ = ctx.needs_input_grad
        rule: Transports = ctx.rule
        rows: slice | None = ctx.rows
        others = None if rows is None else (0, 0, rows.start, ctx.shape[0] - rows.stop)
        flat = _matrix(g)
        to_x = to_W = to_b = to_B = None
        if needs_x:
            M = rule.matrix(W, B, noise)
            to_x = flat.mm(M if rows is None else M[rows])
            if flat is not g:
                to_x = to_x.reshape(*g.shape[:-1], ctx.shape[1])
        if x is not None:
            to_W = flat.t().mm(_matrix(x))
            to_W = to_W if others is None else F.pad(to_W, others)
        if needs_b:
            to_b = flat.sum(0)
        if needs_B:
            to_B = rule.feedback_gradient(W, B, to_W, noise)
            to_B = to_B if others is None else F.pad(to_B[rows], others)
        return to_x, to_W if needs_W else None, to_b, to_B, None, None, None


@in_halves
class _AssignMap(torch.autograd.Function):
    """`x ↦ (y, tap)`: `y` carries `g W` to the input, the tap's cotangent forms `W`'s gradient.

    `tap` is a zero without memory that only has the shape of `y`. With `send=False` nothing but
    zeros goes to the input. With `exact=True` both gradients are backprop's, from `y` alone: the
    same tensors are saved, so that a checkpointed forward may be repeated without knowing.
    """

    @staticmethod
    def value(
        x: Tensor, W: Tensor, b: Tensor | None, send: bool, exact: bool
    ) -> tuple[Tensor, Tensor]:
        y = F.linear(x, W, b)
        return y, y.new_zeros(()).expand(y.shape)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, W, _, ctx.send, ctx.exact = inputs
        ctx.in_shape, ctx.shape = x.shape, W.shape
        # The weight as above, but not where its input has a gradient only in a calibration, of
        # which a checkpoint's recomputation does not know: what is kept must be the same.
        learns = wants_gradient(W)
        kept = not (learns and ctx.send) or wants_gradient(x)
        ctx.save_for_backward(x if learns else None, W if kept else None)
        ctx.set_materialize_grads(False)
        if not (ctx.send or ctx.exact):
            ctx.mark_non_differentiable(output[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, tap: Tensor | None) -> Grads:
        x, W = ctx.saved_tensors
        if torch.is_grad_enabled():
            with torch.no_grad():
                grads = _AssignMap.backward(ctx, g, tap)
            return once_only(grads, g, tap, x, W)
        needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
        like = x if W is None else W
        to_x = to_W = to_b = None
        if needs_x:
            if g is None or not (ctx.send or ctx.exact):
                to_x = like.new_zeros(ctx.in_shape)
            else:
                to_x = g.matmul(W)
        signal = g if ctx.exact else tap
        if signal is None:
            to_W = like.new_zeros(ctx.shape) if needs_W else None
            to_b = like.new_zeros(ctx.shape[0]) if needs_b else None
        else:
            flat = _matrix(signal)
            to_W = flat.t() @ _matrix(x) if needs_W else None
            to_b = flat.sum(0) if needs_b else None
        return to_x, to_W, to_b, None, None


@in_halves
class _AssignTaps(torch.autograd.Function):
    """`(error, taps, B) ↦ error`, whose backward sends `e` on and `e Bᵀ` to every tap."""

    @staticmethod
    def value(error: Tensor, rule: Broadcasts, which: list[int], *tensors: Tensor | None) -> Tensor:
        return error.detach()  # no copy, and no view: its reader may change it in place

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.rule, ctx.which, *tensors = inputs
        taps, rest = tensors[: len(ctx.which)], tensors[len(ctx.which) :]
        ctx.shapes = [tap.shape for tap in taps]
        ctx.dtypes = [tap.dtype for tap in taps]
        ctx.save_for_backward(*rest)

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> Grads:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            with torch.no_grad():
                grads = _AssignTaps.backward(ctx, e)
            return (e, *once_only(grads[1:], e, *saved))
        feedback, estimates = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        rule: Broadcasts = ctx.rule
        count = len(ctx.shapes)
        products: dict[Any, Tensor] = {}
        to_taps: list[Tensor | None] = []
        for place, shape, dtype, needed in zip(
            ctx.which, ctx.shapes, ctx.dtypes, ctx.needs_input_grad[3 : 3 + count], strict=True
        ):
            key = (place, *shape)
            if needed and key not in products:
                products[key] = rule.cotangent(e, feedback[place], shape).to(dtype)
            to_taps.append(products[key] if needed else None)
        to_feedback: list[Tensor | None] = []
        for B, estimate, needed in zip(
            feedback,
            estimates,
            ctx.needs_input_grad[3 + count : 3 + count + len(feedback)],
            strict=True,
        ):
            if not needed:
                to_feedback.append(None)
            elif estimate is None:  # nothing was measured: a zero, so that no reduction stalls
                to_feedback.append(torch.zeros_like(B))
            else:
                to_feedback.append(rule.feedback_gradient(B, estimate))
        return e, None, None, *to_taps, *to_feedback, *([None] * len(estimates))


def _autocast(x: Tensor, *others: Tensor | None) -> list[Any]:
    """Cast as autocast would, but where autograd sees it, so that gradients come back uncast."""
    if x.dtype == torch.float64:
        return [x, *others]
    dtype = torch.get_autocast_dtype(x.device.type)
    return [x.to(dtype), *(t if t is None else t.to(dtype) for t in others)]


def assign_adjoint(force: Tensor, value: Tensor, adjoint: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `value` such that its cotangent `g` reaches the graph of `force` as `adjoint(g)`.

    With `L = C(z*)` and `F(z*; x, θ) = 0` the gradient is `dL/dθ = aᵀ ∂F/∂θ`, so one evaluation of
    the force that autograd recorded, together with the adjoint state `a`, gives every gradient.

    **Arguments:** `force`, a recorded evaluation of the force, any shape; `value`, what the module
    returns, same shape, not differentiated; `adjoint`, from the cotangent `g` to `a`, same shape,
    called without recording and outside autocast, whatever the caller of `backward` has set.

    **Raises:** `RuntimeError` when the result is differentiated twice.
    """
    refuse_transforms("the gradient of an equilibrium cannot be had")
    return _AssignAdjoint.apply(force, value, adjoint)


def assign_pull(
    value: Tensor,
    pull: Callable[[Tensor, Tensor], Grads],
    keeper: Tensor,
    sources: Sequence[Tensor],
) -> Tensor:
    """Return `value` such that its cotangent `a` reaches each source as `pull(keeper, a)` says.

    **Arguments:** `value`, any shape, not differentiated; `pull`, from the keeper and `a` to one
    gradient per source, called without recording and outside autocast; `keeper`, a tensor that
    autograd saves and gives back, and with it what is attached to it; `sources`, what `value` is
    a function of.

    **Raises:** `RuntimeError` when the result is differentiated twice, and when a source was
    changed in place before the backward pass.
    """
    refuse_transforms("the gradient of an equilibrium cannot be had")
    return _AssignPull.apply(value, pull, keeper, *sources)


def _real(*tensors: Tensor) -> None:
    """Refuse complex numbers: a rule that multiplies by `M` would have to say which conjugates."""
    if any(tensor.is_complex() for tensor in tensors):
        raise RuleError(
            "a learning rule is for real numbers, and was given complex ones: keep this place on "
            "backprop by a pattern of its own, with Backprop(), put first"
        )


def assign_transport(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    rule: Transports,
    B: Tensor | None = None,
    noise: Tensor | None = None,
    rows: slice | None = None,
) -> Tensor:
    """Return `x Wᵀ + b` such that `x` receives `g · rule.matrix(W, B, noise)`.

    The gradients of `W` and `b` stay `gᵀ x` and `Σ g`. A `B` that requires a gradient receives
    `rule.feedback_gradient(W, B, grad_W, noise)`.

    **Arguments:** `x` (..., in); `W`, `B` (out, in); `b` (out) or none; `noise`, what the rule drew
    for this pass, or none; `rows`, which of a joint map `x` meets, `b` being theirs: the rule still
    sees the whole map.

    **Raises:** `RuntimeError` when the result is differentiated twice.
    """
    _real(x, W)
    if torch.is_autocast_enabled(x.device.type):
        x, W, b, B = _autocast(x, W, b, B)
    return applied(_AssignTransport, x, W, b, B, noise, rule, rows)


def assign_map(
    x: Tensor, W: Tensor, b: Tensor | None, *, send: bool, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """Return `x Wᵀ + b` and a tap of its shape, whose cotangent alone makes `W`'s gradient.

    **Arguments:** `send`, whether the input receives the exact `g W` (hybrid) or zeros (pure);
    `exact`, whether this pass is plain backprop (a calibration), the tap then being inert.

    **Raises:** `RuntimeError` when the result is differentiated twice.
    """
    _real(x, W)
    if torch.is_autocast_enabled(x.device.type):
        x, W, b = _autocast(x, W, b)
    return applied(_AssignMap, x, W, b, send, exact)


def assign_taps(
    error: Tensor,
    taps: Sequence[Tensor],
    which: Sequence[int],
    feedback: Sequence[Tensor],
    estimates: Sequence[Tensor | None],
    rule: Broadcasts,
) -> Tensor:
    """Return `error` unchanged, such that its cotangent `e` also reaches every tap as `e Bᵀ`.

    **Arguments:** `error` (..., k), the logits or whatever the error is taken at; `taps`, tensors
    of shape (..., features); `which`, for each tap the place of its `B` (features, k) in
    `feedback`; those that no tap uses get a zero gradient; `estimates`, for each `B` what a
    learned one moves towards.

    **Raises:** `RuntimeError` when the result is differentiated twice.
    """
    _real(error, *taps)
    return applied(_AssignTaps, error, rule, list(which), *taps, *feedback, *estimates)

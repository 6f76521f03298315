"""What each rule means, computed on a model that was never converted.

A transport: every linear map's output is `y = W x` with `x` cut off, plus a zero `M x − M x` whose
gradient alone reaches `x`, so that autograd itself sends `g M` down. A broadcast to maps: their
inputs are recorded, and `(e Bᵀ)ᵀ x` is summed over the samples' tokens, paired one by one. A
broadcast to blocks: their outputs are cut, and each is given `e Bᵀ` as its cotangent.
Shapes: N samples, T tokens, `x` (N, T, in), `e` (N, T, k) or (N, 1, k) without a token axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from cases import Batch, Case, Gradients, written
from torch import Tensor, nn
from torch.nn.utils import parametrize

import altprop as ap

PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass
class Map:
    """A linear map of a plain model: its weight (out, in) under any name, and where it is."""

    path: str
    module: nn.Module
    key: str
    flipped: bool = False

    @property
    def weight(self) -> Tensor:
        W = getattr(self.module, self.key)
        return W.t() if self.flipped else W

    @property
    def place(self) -> tuple[int, str]:
        """What tells it from other maps."""
        return id(self.module), self.key

    @property
    def suffix(self) -> str:
        """What the feedback's name ends with, where a module holds several maps."""
        return "" if self.key == "weight" else "_" + self.key.removesuffix("_weight")

    def parameter(self, kind: str) -> str:
        """Return the name of the weight or bias; empty if it is made from other parameters."""
        packed = self.key != "weight"
        name = self.key if kind == "weight" else "in_proj_bias" if packed else "bias"
        known = dict(self.module.named_parameters(recurse=False))
        return f"{self.path}.{name}".lstrip(".") if name in known else ""

    @property
    def inside_attention(self) -> bool:
        """Whether torch's attention calls it, which does so with time first."""
        return self.key != "weight" or type(self.module).__name__.startswith("NonDynamically")


def maps_of(model: nn.Module) -> list[Map]:
    """Return the linear maps of a plain model."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            found += [Map(path, module, k) for k in PACKED if getattr(module, k) is not None]
        elif isinstance(module, nn.Linear):
            found.append(Map(path, module, "weight"))
        elif type(module).__name__ == "Conv1D":
            found.append(Map(path, module, "weight", flipped=True))
    return found


def ruled(case: Case, plain: nn.Module, rule: ap.AbstractRule) -> list[Map]:
    """Return the maps that a rule for maps is given: all but the exceptions."""
    broadcast = isinstance(rule, ap.AbstractBroadcast)
    found = []
    for m in maps_of(plain):
        path = f"{m.path}{m.suffix.replace('_', '.', 1)}".removeprefix(case.inside).lstrip(".")
        path = path.replace(".base_layer", "") if case.inside else path
        if case.inside and ".lora_" in path:
            continue  # it came after the rule
        kept = list(case.patterns(rule))[:-1]
        if any(_covers(p, path) for p in kept) or (broadcast and path == case.output):
            continue
        found.append(m)
    return found


def _covers(pattern: str, path: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, pattern + ".*")


def feedback(state: dict[str, Tensor], m: Map, name: str = "B") -> Tensor:
    return state[f"{m.path}.{name}{m.suffix}".lstrip(".")]


Back = Callable[[Map], Tensor | None]
Call = tuple[Map, slice, Tensor]


@contextmanager
def sending(plain: nn.Module, back: Back) -> Iterator[list[Call]]:
    """Let each map of a model send `g · back(map)` to its input; for none, the exact `g W`.

    Yields a list to which every call of a map adds the map, the rows of it and its input.
    """
    calls: list[Call] = []
    linear, addmm = F.linear, torch.addmm
    with parametrize.cached():  # so that a parametrised weight is one tensor
        known: dict[int, Map] = {}
        for m in maps_of(plain):
            known.setdefault(id(getattr(m.module, m.key)), m)  # tied: one map, with one input

        def through(x: Tensor, W: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
            whole = W if id(W) in known else W._base
            m = known.get(id(whole))
            if m is None:
                return call(x)
            start = 0 if m.flipped else W.storage_offset() // W.shape[1]
            rows = slice(start, start + (W.shape[1] if m.flipped else W.shape[0]))
            calls.append((m, rows, x.detach()))
            M = back(m)
            if M is None:
                return call(x)
            carried = linear(x, M[rows].detach())
            return call(x.detach()) + (carried - carried.detach())

        try:
            F.linear = lambda x, W, b=None: through(x, W, lambda x: linear(x, W, b))  # type: ignore[assignment]
            torch.addmm = lambda b, x, W: through(x, W, lambda x: addmm(b, x, W))  # type: ignore[assignment]
            yield calls
        finally:
            F.linear, torch.addmm = linear, addmm


def transported(case: Case, rule: ap.AbstractTransport, converted: nn.Module) -> Gradients:
    """Return the gradients where every map sends what the rule's paper says."""
    plain, state = case.reference, converted.state_dict()
    chosen = {m.place for m in ruled(case, plain, rule)}

    def back(m: Map) -> Tensor | None:
        if m.place not in chosen:
            return None
        W = m.weight.detach()
        if isinstance(rule, ap.Backprop):
            return W
        if not isinstance(rule, ap.SignSymmetry):
            return feedback(state, m)
        return W.sign() * W.square().mean().sqrt()

    with sending(plain, back):
        return case.gradients(plain)


def head_error(case: Case, plain: nn.Module, batch: Batch, place: str) -> tuple[Tensor, Tensor]:
    """Run `plain` and return the error, as it lies at the head, and the loss."""
    kept: list[Tensor] = []
    at_input = place == "head_input"

    def keep(_: nn.Module, x: tuple[Tensor], out: Any = None) -> Any:
        kept.append(out if out is not None else x[0] if x[0].requires_grad else x[0].clone())
        kept[0].requires_grad_()
        return kept[0]

    plain.zero_grad()
    head = case.output_module(plain)
    register = head.register_forward_pre_hook if at_input else head.register_forward_hook
    hook = register(keep)
    loss = case.loss(plain, batch)
    hook.remove()
    (e,) = torch.autograd.grad(loss, kept[0], retain_graph=True)
    return e, loss


def by_sample(case: Case, x: Tensor, N: int, inside_attention: bool = False) -> Tensor:
    """Return a tensor of samples and tokens, however it lies, as (N, T, ...)."""
    if inside_attention or case.time_first:
        return x.reshape(-1, N, x.shape[-1]).transpose(0, 1)
    return x.reshape(N, -1, x.shape[-1])


def to_maps(case: Case, rule: Any, converted: nn.Module) -> Gradients:
    """Return the gradients where every map hears `e Bᵀ`, and sends what it sends.

    The error is the head's, or for a `BlockDirectFeedback` that at the map's block's output.
    """
    plain, state, batch = case.reference, converted.state_dict(), case.batch()
    N, local = len(batch), isinstance(rule, ap.BlockDirectFeedback)
    blocks = blocks_of(case, plain) if local else []
    chosen = [
        m for m in ruled(case, plain, rule)
        if not local or any(m.module in set(b.modules()) for _, b in blocks)
    ]  # fmt: skip
    pure = getattr(rule, "pass_through", "hybrid") == "pure"
    silent = {m.place for m in chosen} if pure else set()
    outs: dict[int, Tensor] = {}

    def keep(block: nn.Module, _: Any, out: Any) -> None:
        outs[id(block)] = first(out)

    hooks = [block.register_forward_hook(keep) for _, block in blocks]

    def back(m: Map) -> Tensor | None:
        return torch.zeros_like(m.weight) if m.place in silent else None

    with sending(plain, back) as calls:
        e, loss = head_error(case, plain, batch, getattr(rule, "error", "logits"))
        errors = torch.autograd.grad(loss, list(outs.values()), retain_graph=True) if outs else ()
        loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = written(plain)
    e_of = dict(zip(outs, errors, strict=True))
    for m in chosen:
        if local:
            block = next(b for _, b in blocks if m.module in set(b.modules()))
            error = e_of[id(block)]
            B = feedback(state, m, "B_dfa_block")
        else:
            error, B = e, broadcast_feedback(case, state, m, "B_dfa")
        signal = by_sample(case, error, N) @ B.t()
        W, b = torch.zeros_like(m.weight), torch.zeros(len(m.weight), dtype=torch.float64)
        for other, rows, x in calls:
            if other.place != m.place:
                continue
            x = by_sample(case, x, N, m.inside_attention)
            part = signal[..., rows].expand(N, x.shape[1], -1)
            W[rows] += torch.einsum("nto,nti->oi", part, x)
            b[rows] += part.sum((0, 1))
        _put(gradients, plain, m.parameter("weight"), W.t() if m.flipped else W)
        _put(gradients, plain, m.parameter("bias"), b)
        if not m.parameter("weight"):  # made from others: they get what autograd makes of it
            _through(gradients, plain, m, W)
    return gradients


def _put(gradients: Gradients, plain: nn.Module, name: str, value: Tensor) -> None:
    if name and plain.get_parameter(name).requires_grad:
        gradients[name] = value


def _through(gradients: Gradients, plain: nn.Module, m: Map, W: Tensor) -> None:
    own = {f"{m.path}.{n}": p for n, p in m.module.named_parameters() if n.startswith("param")}
    found = torch.autograd.grad(m.weight, list(own.values()), W)
    gradients.update(zip(own, found, strict=True))


def broadcast_feedback(case: Case, state: dict[str, Tensor], m: Map, name: str) -> Tensor:
    shared = f"{case.inside}.B_dfa_shared".lstrip(".")
    return state[shared][: len(m.weight)] if shared in state else feedback(state, m, name)


def blocks_of(case: Case, plain: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the blocks that a rule for blocks is given."""
    stack = f"{case.inside}.{case.stacks[-1]}".lstrip(".")
    module = plain.get_submodule(stack)
    return [(f"{stack}.{name}", block) for name, block in module.named_children()]


def first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def to_blocks(case: Case, rule: Any, converted: nn.Module) -> Gradients:
    """Return the gradients where every block's output is cut and hears `e Bᵀ`."""
    plain, state, batch = case.reference, converted.state_dict(), case.batch()
    cuts: list[tuple[str, Tensor]] = []

    def cut(path: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> Any:
            cuts.append((path, first(out)))
            value = first(out).detach()
            return value if isinstance(out, Tensor) else type(out)((value, *out[1:]))

        return hook

    hooks = [block.register_forward_hook(cut(path)) for path, block in blocks_of(case, plain)]
    e, loss = head_error(case, plain, batch, rule.error)
    for hook in hooks:
        hook.remove()
    signals = []
    for path, out in cuts:
        if f"{path}.B_dfa" in state:
            B = state[f"{path}.B_dfa"]
        else:
            B = state[f"{case.inside}.B_dfa_shared".lstrip(".")][: out.shape[-1]]
        if isinstance(rule, ap.GrAPE):
            B = B * (rule.std * math.sqrt(B.shape[1]) / B.norm(dim=1, keepdim=True))
        given = by_sample(case, out, len(batch))
        signal = (by_sample(case, e, len(batch)) @ B.t()).expand(given.shape)
        signals.append((signal.transpose(0, 1) if case.time_first else signal).reshape(out.shape))
    learn = [(out, s) for (_, out), s in zip(cuts, signals, strict=True) if out.requires_grad]
    torch.autograd.backward([loss, *(o for o, _ in learn)], [None, *(s for _, s in learn)])
    return written(plain)


def expected(case: Case, rule: Any, converted: nn.Module) -> Gradients:
    """Return what a rule writes into the parameters of the model, feedback excepted."""
    if isinstance(rule, ap.AbstractTransport):
        return transported(case, rule, converted)
    if isinstance(rule, ap.BlockDirectFeedback) or "maps" in rule.takes:
        return to_maps(case, rule, converted)
    return to_blocks(case, rule, converted)

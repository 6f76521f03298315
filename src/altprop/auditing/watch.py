"""Which weights a training step reads while it makes gradients: "is this really not backprop?".

Backprop sends a cotangent through every weight as a matrix. A rule that does without it need not
say so: the operations that run inside autograd's backward show their operands, and one that lies
in a parameter's memory, or was computed from parameters alone, was read.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from altprop.auditing.operands import (
    computed_anew,
    counts,
    one_by_one,
    opened,
    place_of,
    tensors,
    unread_of,
    unwrapped,
    writes_first,
)
from altprop.equilibrium.dynamics.plain import observing

T = TypeVar("T")


class Read(enum.IntEnum):
    """How a parameter was read while gradients were made; the more, the greater."""

    NOT = 0
    NORM = 1  # its norm, or another sum over it
    SIGN = 2
    ELEMENTWISE = 3  # each number beside one of the data, as a norm's gain is
    MATRIX = 4  # as a matrix that the data were sent through


@dataclass
class Reading:
    """How one parameter was read. `operations`: by which of torch's, and how often."""

    how: Read = Read.NOT
    operations: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        by = ", ".join(f"{name} × {n}" for name, n in self.operations.most_common())
        return _WORDS[self.how] + (f" ({by})" if by else "")


_WORDS = {
    Read.NOT: "not read",
    Read.NORM: "its norm read",
    Read.SIGN: "its sign read",
    Read.ELEMENTWISE: "read elementwise",
    Read.MATRIX: "carried as a matrix",
}


class PerParameter(Mapping[str, T]):
    """What was found of each parameter of a model, by its name; `str` of it is a table."""

    def __init__(self, found: dict[str, T]) -> None:
        self._found = found

    def __getitem__(self, name: str) -> T:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:{width}}  {found}" for name, found in self.items())


class Watched(PerParameter[Reading]):
    """What was read of each parameter of a model, by its name; `str` of it is a table."""


@contextmanager
def watch(model: nn.Module) -> Iterator[Watched]:
    """Watch what is read of `model`'s parameters while gradients are made inside.

    What counts is what runs inside autograd's backward and, for gradients that are made by hand,
    every product with a weight outside of all forward passes of `model` and its parts. Memory that
    is shared, copies, casts, transposes, masks, signs and norms of a parameter are followed. What
    activation checkpointing computes anew is a forward pass and does not count.

    Compiled models run uncompiled inside, and every operation is several times slower; outside of
    the context nothing is added. It sees the process that it runs in, on every rank its own.
    """
    parameters = dict(model.named_parameters())
    watched = Watched({name: Reading() for name in parameters})
    mode = _Mode(parameters, list(model.buffers()), watched)
    with ExitStack() as stack:
        for module in model.modules():
            enter = observing(lambda _, *given: mode.enter(given))
            before = module.register_forward_pre_hook(enter, with_kwargs=True)
            leave = observing(lambda *_: mode.leave())
            after = module.register_forward_hook(leave, always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        with mode:
            yield watched


_Source = dict[str, Read]  # what of which parameters a tensor is made of; MATRIX: the numbers

_EACH = "_foreach_"
_SIGNS = frozenset({"sign", "sgn", "signbit", "gt", "ge", "lt", "le"})
_SUMS = frozenset(
    {"linalg_vector_norm", "norm", "sum", "mean", "amax", "amin", "max", "min", "var", "std"}
)
_SHAPES = frozenset({"zeros_like", "ones_like", "empty_like", "full_like", "rand_like"}) | {
    "randn_like", "new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided",
    "zero_", "fill_", "set_", "resize_", "is_same_size", "_has_same_storage_numel",
}  # fmt: skip
_WRITES = frozenset({"copy_", "zero_", "fill_", "normal_", "uniform_", "bernoulli_", "random_"})
_ROWS = frozenset({"index", "index_select", "embedding", "gather", "take"})  # picked of a tensor
_JOINS = frozenset({"cat", "stack"})
_COMPARES = _JOINS | {  # that take two tensors and are no product
    "allclose", "equal", "dist", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss",
    "mse_loss_backward", "l1_loss_backward", "smooth_l1_loss_backward", "huber_loss_backward",
}  # fmt: skip


class _Mode(TorchDispatchMode):
    """Shows every operation its operands' sources, and records what is read in making gradients."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], buffers: Sequence[Tensor], watched: Watched
    ) -> None:
        super().__init__()
        self._watched, self._buffers = watched, buffers
        self._depth = 0  # of the forward passes that are running
        self._parts: dict[int, list[tuple[int, int, str]]] = {}  # of a storage, in bytes
        self._derived: dict[int, _Source] = {}
        self._data: dict[int, StorageWeakRef] = {}  # made of what the last forward was given
        self._held: list[Any] = []  # a storage's address is its name as long as it lives
        self._opened: dict[int, bool] = {}  # whether autograd was on where a backward began
        self._parameters = parameters
        self._find()

    def _find(self) -> None:
        """Note where the parameters lie, besides where they lay before."""
        for name, p in self._parameters.items():
            place = place_of(p)
            if place is not None and (*place[1:], name) not in self._parts.get(place[0], ()):
                self._parts.setdefault(place[0], []).append((*place[1:], name))
                self._held.append(p.untyped_storage())

    def enter(self, given: Any) -> None:
        if self._depth == 0:
            self._find()
            if torch._C._current_graph_task_id() == -1:
                self._data.clear()
            self._mark([t for t in map(unwrapped, opened(given)) if not self._source(t)])
        self._depth += 1

    def leave(self) -> None:
        self._depth -= 1

    def _mark(self, data: Sequence[Tensor]) -> None:
        """Note that tensors hold data and are no weights, whatever is added to them."""
        for t in data:
            place = place_of(t)
            if place is not None and place[0] not in self._parts and place[0] not in self._data:
                self._data[place[0]] = StorageWeakRef(t.untyped_storage())

    def _heard(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """Return those that hold data, in a forward pass; a single figure of them is none."""
        if not self._forward:
            return []
        placed = [(t, place_of(t)) for t in operands if t.dim() > 0 and t.numel()]
        # no weight is sparse, which has no place
        return [t for t, place in placed if place is None or place[0] in self._data]

    @property
    def _forward(self) -> bool:
        """Whether a forward pass runs, for the first time or anew."""
        return self._depth > 0 and not self._backward

    @property
    def _backward(self) -> bool:
        return torch._C._current_graph_task_id() != -1 and not computed_anew()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._opened.setdefault(torch._C._current_graph_task_id(), torch.is_grad_enabled())
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in _WRITES:
            self._forget(args[0])
        if func.is_view or name in _SHAPES:  # nothing of the numbers is read
            return out
        if self._heard(tensors((args, kwargs))):
            self._mark(tensors(out))
        if name.startswith(_EACH):
            for one, made in one_by_one(args, out):
                self._look(func, name.removeprefix(_EACH), one, kwargs, made)
        else:
            self._look(func, name, args, kwargs, out)
        return out

    def _look(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        unread = unread_of(name, args)
        operands = tensors((args, kwargs))
        given = [(t, {} if any(t is u for u in unread) else self._source(t)) for t in operands]
        if any(source for _, source in given):
            self._see(func, name.rstrip("_"), args, given, out)

    def _see(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        given: list[tuple[Tensor, _Source]],
        out: Any,
    ) -> None:
        outs = tensors(out)
        written = args[0] if writes_first(func) and isinstance(args[0], Tensor) else None
        data = self._heard([t for t, _ in given])
        if name in _ROWS:
            if self._picked(args[0], outs, data):
                for made in outs:
                    self._derive(made, [(t, source) for t, source in given if t is args[0]], name)
            return
        if data and written is not None:
            self._derived.pop((place_of(written) or (0,))[0], None)
        others = [t for t, source in given if not source and t is not written and counts(t)]
        pointwise = torch.Tag.pointwise in func.tags or func.__name__.startswith(_EACH)
        if not others and not data:
            for made in outs:
                self._derive(made, given, name)
            return
        larger = max((t.numel() for t in outs), default=0)
        for t, source in given:
            if not source or t is written:  # to be written to is not to be read
                continue
            spread = t.dim() > 1 and min(t.shape) > 1 and larger > t.numel()
            product = spread if pointwise else t.dim() > 1 and name not in _COMPARES
            if self._makes_gradients(product):
                self._record(source, name, product)
            if pointwise:  # masked, noisy or scaled it is that matrix still, and a token is data
                still = all(other is t or other.numel() < t.numel() for other in data)
            elif name in _JOINS:  # to what the model keeps beside it
                still = self._backward or (not data and all(map(self._kept, others)))
            else:  # turned by a constant
                still = self._forward and not data
            if still and t.dim() > 1:
                for made in outs:
                    if made.shape == t.shape or name in _JOINS:
                        self._derive(made, [(t, source)], name)

    def _kept(self, t: Tensor) -> bool:
        place = place_of(t)
        return place is not None and place[0] in {(place_of(b) or (0,))[0] for b in self._buffers}

    def _picked(self, t: Tensor, outs: Sequence[Tensor], data: Sequence[Tensor]) -> bool:
        """Tell whether rows that are picked of a weight are a weight, and not what data look up.

        Which they are in a backward pass, where no data choose them, or where these choose among
        matrices.
        """
        if self._backward or (self._forward and not data):
            return True
        return t.dim() > (2 if data else 1) and outs[0].shape[-2:] == t.shape[-2:]

    def _forget(self, t: Tensor) -> None:
        """Note that a tensor's memory is overwritten, if that is all of it."""
        place = place_of(t)
        if place is not None and t.numel() * t.itemsize == t.untyped_storage().nbytes():
            self._derived.pop(place[0], None)

    def _record(self, source: _Source, name: str, product: bool) -> None:
        for parameter, what in source.items():
            how = what
            if what is Read.MATRIX:
                how = Read.MATRIX if product else Read.ELEMENTWISE
            reading = self._watched[parameter]
            reading.how = max(reading.how, how)
            reading.operations[name] += 1

    def _derive(self, made: Tensor, given: list[tuple[Tensor, _Source]], name: str) -> None:
        place = place_of(made)
        if place is None:
            return
        own = {parameter for *_, parameter in self._parts.get(place[0], ())}
        if own and name != "copy" and all(source.keys() <= own for _, source in given):
            return
        most = Read.SIGN if name in _SIGNS else Read.NORM if name in _SUMS else Read.MATRIX
        sources: _Source = {}
        for _, source in given:
            for parameter, what in source.items():
                sources[parameter] = max(sources.get(parameter, Read.NOT), min(what, most))
        if place[0] not in self._derived:
            self._held.append(made.untyped_storage())
        self._derived[place[0]] = sources

    def _source(self, t: Tensor) -> _Source:
        place = place_of(t)
        if place is None:
            return {}
        key, low, high = place
        own = {name for a, b, name in self._parts.get(key, ()) if low < b and a < high}
        return {**self._derived.get(key, {}), **dict.fromkeys(own, Read.MATRIX)}

    def _makes_gradients(self, product: bool) -> bool:
        """Tell whether what runs now makes a gradient, a product with a weight or another read."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return product and self._depth == 0
        if computed_anew():
            return False
        # gradients of gradients run with autograd on, and so does what a rule computes anew
        return not torch.is_grad_enabled() or (self._opened[task] and self._depth == 0)

"""Peak memory of a computation, as the bytes of the tensor storages alive at once.

On the CPU there is no allocator to ask, so every operation's results are followed by weak
references. The figure is exact and repeatable: neither the machine nor its allocator enters it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def peak_live_bytes(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Call `fn` and return the most bytes that it held at once, above what was alive before.

    On the CPU these are the storages that tensor operations return, in the forward and in the
    backward pass; scratch space inside one operation is not seen. On CUDA it is the allocator's own
    maximum, scratch space included.

    **Arguments:** `fn`, what to measure; its result is dropped. `device`, where it computes.
    """
    kind = torch.device(device)
    gc.collect()  # so that garbage in cycles is not collected, and counted, at random moments
    if kind.type == "cuda":
        torch.cuda.synchronize(kind)
        torch.cuda.reset_peak_memory_stats(kind)
        before = torch.cuda.memory_allocated(kind)
        fn()
        torch.cuda.synchronize(kind)
        return torch.cuda.max_memory_allocated(kind) - before
    with _LiveStorages() as live:
        fn()
    return live.peak


class _LiveStorages(TorchDispatchMode):
    """Follow the storages that operations return while this mode is on.

    What an operation receives without an earlier one having returned it was there before: its
    storage, and every view of it, counts nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: dict[int, weakref.ref[Any]] = {}  # by id, which a weak reference keeps honest

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, counts=False)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._meet(tensor, counts=True)
        self.peak = max(self.peak, self._now)
        return out

    def _meet(self, tensor: Tensor, counts: bool) -> None:
        if tensor.layout is not torch.strided:
            return  # a sparse tensor has no storage of its own
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes() if counts else 0
        if key in self._known:
            return

        def forget(_: Any) -> None:
            del self._known[key]
            self._now -= size

        self._known[key] = weakref.ref(storage, forget)
        self._now += size


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in what an operation takes or returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)

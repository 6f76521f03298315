"""A run in many processes: all that a run knows of them. With one process there is nothing to do.

Started by `torchrun`, every process ("rank") runs the same program on its share of each batch. What
one rank alone can know is decided together here, so that all take the same way; the first rank
alone writes and shows.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from altprop import AltpropError, ConfigError, ProcessError
from altprop.errors import in_a_line, listed

T = TypeVar("T")
PATIENCE = timedelta(seconds=40)  # for an answer of another process, until a run ends
LAUNCH = "torchrun --nproc-per-node"


def asked() -> int:
    """Return how many processes this one was started among, by torchrun's `WORLD_SIZE`.

    **Raises:** `ConfigError` if that is no number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE is {text!r}, expected a number: start by {LAUNCH} 2")
    return int(text)


def leads() -> bool:
    """Tell whether this process is the first of those that were started together, or alone."""
    return asked() == 1 or os.environ.get("RANK", "0") == "0"


def own_device(name: str) -> str:
    """Return the device of that name that is this process's: of several GPUs, one for each."""
    if name != "cuda" or asked() == 1:
        return name
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    return f"cuda:{index}"


class Ranks:
    """The processes of a run, of which this is one.

    **Arguments:** `group`, over which they speak to each other; `None` for a process alone.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank: int = 0 if group is None else group.rank()
        self.size: int = 1 if group is None else group.size()
        self._parallel: DistributedDataParallel | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the first rank, which alone writes and shows."""
        return self.rank == 0

    def sharing(self, parallel: str) -> Ranks:
        """Return those that share every batch; of a pipeline all see it whole, each for itself."""
        return Ranks() if parallel == "pipeline" else self

    def gather(self, value: T) -> list[T]:
        """Return what every rank gives, in their order; any value that can be pickled."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value, group=self.group)
        return found

    def numbers(self, values: Sequence[float]) -> torch.Tensor:
        """Return as many numbers of every rank, float64 `(ranks, numbers)`."""
        own = torch.tensor([values], dtype=torch.float64)
        if self.group is None:
            return own
        found = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(found, own, group=self.group)
        return torch.cat(found)

    def check_same(self, value: Any, what: str) -> None:
        """Refuse to go on where another rank was given another value.

        **Arguments:** `what`, what differs then.

        **Raises:** `ConfigError` on all ranks.
        """
        others = self.gather(value)
        for rank, other in enumerate(others):
            if other != others[0]:
                raise ConfigError(
                    f"rank {rank} has other {what} than rank 0: give every process the same command"
                )

    def first(self, act: Callable[[], T]) -> T:
        """Let the first rank act, and return on all what that returned.

        **Raises:** on all ranks what it raised.
        """
        with self.together():
            value = act() if self.leads else None
        return self.same(value)  # type: ignore[return-value]

    def same(self, value: T) -> T:
        """Return the first rank's value."""
        if self.group is None:
            return value
        found = [value]
        distributed.broadcast_object_list(found, src=0, group=self.group)
        return found[0]

    def mean(self, value: float) -> float:
        """Return the mean of the ranks' values."""
        return value if self.group is None else float(self.numbers([value]).mean())

    def agree(self, signal: int, due: bool) -> tuple[int, bool]:
        """Return a signal that any rank was sent, or 0, and whether the first rank is to save."""
        if self.group is None:
            return signal, due
        found = self.numbers([signal, due])
        return int(found[:, 0].max()), bool(found[0, 1])

    def worst(self, found: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return the largest of what this and all other ranks measured, by name; NaN is larger.

        All ranks must measure the same.
        """
        names = list(dict.fromkeys(name for one in found for name in one))
        if not names:
            return {}
        rows = [[one.get(name, -math.inf) for name in names] for one in found]
        own = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(names)).amax(0)
        return dict(zip(names, self.numbers(own.tolist()).amax(0).tolist(), strict=True))

    def share(self, model: nn.Module) -> None:
        """Let the gradients of a model be averaged over the ranks, each of which has it whole."""
        if self.group is not None:  # buffers stay equal: feedback is drawn from the seed
            self._parallel = None  # of a model before
            self._parallel = DistributedDataParallel(model, forward_sync_buffers=False)

    def shard(self, model: nn.Module, parts: Sequence[nn.Module]) -> None:
        """Give each rank a part of every parameter, and let its gradient be averaged.

        It must happen before there is an optimiser: sharding makes other parameters.

        **Arguments:** `parts`, what is gathered by itself when it is called.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self._parallel = None
        mesh = init_device_mesh(next(model.parameters()).device.type, (self.size,))
        for part in parts:
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)

    def called(self, model: nn.Module) -> nn.Module:
        """Return what to call for a training pass of `model`."""
        return model if self._parallel is None else self._parallel

    def syncing(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Let the passes of a step but its `last` keep their gradients to this rank."""
        if _is_sharded(model):
            cast(Any, model).set_requires_gradient_sync(last)
        elif self._parallel is not None and not last:
            return self._parallel.no_sync()
        return nullcontext()

    @contextmanager
    def added(self, model: nn.Module) -> Iterator[None]:
        """Let what is added to `.grad` in here be summed over the ranks, by one reduction.

        Parameters in shards are whole in here.
        """
        kept = {name: p.grad for name, p in model.named_parameters()}
        with self.whole(model):
            parameters = dict(model.named_parameters())
            for p in parameters.values():
                p.grad = None
            yield
            own = {name: p.grad for name, p in parameters.items()}
            for p in parameters.values():
                p.grad = None
        total = self._sum(own, parameters)
        for name, p in model.named_parameters():
            p.grad, more = kept[name], total.get(name)
            if more is not None:
                more = like(more, p)
                p.grad = more if p.grad is None else p.grad + more

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """Let parameters in shards be whole in here, for what is no call of the model."""
        shards = [cast(Any, m) for m in model.modules() if _is_sharded(m)]
        for module in shards:
            module.unshard()
        yield
        for module in shards:
            module.reshard()

    def _sum(
        self, own: Mapping[str, Tensor | None], parameters: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the sums over ranks, of what some rank has, by name."""
        if self.group is None:
            return {name: g for name, g in own.items() if g is not None}
        has = self.numbers([float(g is not None) for g in own.values()]).any(0).tolist()
        names = [name for name, some in zip(own, has, strict=True) if some]
        if not names:
            return {}
        parts = [g if (g := own[n]) is not None else torch.zeros_like(parameters[n]) for n in names]
        flat = torch.cat([part.flatten() for part in parts])
        distributed.all_reduce(flat, group=self.group)
        sums = flat.split([part.numel() for part in parts])
        return {n: s.view_as(p) for n, s, p in zip(names, sums, parts, strict=True)}

    def rows(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the joint batch of which each rank knows its own rows, with all."""
        if self.group is None:
            return tensor
        count = len(tensor) // self.size
        own = tensor[self.rank * count : (self.rank + 1) * count].contiguous()
        found = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(found, own, group=self.group)
        return torch.cat(found)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let all ranks fail together, with the error of the first that does."""
        failed: AltpropError | None = None
        try:
            yield
        except AltpropError as error:
            if self.group is None:
                raise
            failed = error
        faults = self.gather(None if failed is None else (type(failed), str(failed)))
        for rank, fault in enumerate(faults):
            if fault is not None:
                kind, text = fault
                raise kind(f"rank {rank}: {text}" if rank else text) from failed


def full(tensor: Tensor) -> Tensor:
    """Return a tensor whole that may lie in shards; then every rank must ask for it."""
    return cast(Any, tensor).full_tensor() if _is_sharded(tensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a whole tensor of the `other`'s type and device, in shards if that is."""
    if not _is_sharded(other):
        return tensor.to(other)
    from torch.distributed.tensor import distribute_tensor

    o = cast(Any, other)
    mine = tensor.to(o.to_local())
    return distribute_tensor(mine, o.device_mesh, o.placements, src_data_rank=None)


def _is_sharded(thing: nn.Module | Tensor) -> bool:
    """Tell whether a module or tensor lies in shards; these modules take seconds to import."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return False
    return isinstance(thing, fsdp.FSDPModule | sys.modules["torch.distributed.tensor"].DTensor)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that this one was started among, and leave them at the end.

    **Raises:** `ConfigError` if there can be no group of them; `ProcessError` instead of what torch
    raises where another process ends or does not answer.
    """
    size = asked()
    if size == 1:
        yield Ranks()
        return
    own = not distributed.is_initialized()  # else a script's, which is its to end
    if own:
        _start(size)
    ranks = Ranks(distributed.group.WORLD)
    try:
        yield ranks
    except RuntimeError as error:
        if not isinstance(error, AltpropError) and _is_lost(error):
            # the group is broken: nobody could be told goodbye, and the process ends anyway
            raise ProcessError(
                f"another of the {size} processes has ended or does not answer "
                f"({in_a_line(error, 120)}): start all of them again, with --resume"
            ) from error
        if own:
            _leave(ranks, error)
        raise
    except BaseException as error:
        if own:
            _leave(ranks, error)
        raise
    if own:
        _leave(ranks, None)


def _start(size: int) -> None:
    names = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE is {size}, without {listed(missing)}: start all processes by "
            f"{LAUNCH} {size} -m altprop train ..., or unset WORLD_SIZE"
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        distributed.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"no group of {size} processes ({in_a_line(error, 200)}): start all of them by "
            f"{LAUNCH} {size} -m altprop train ..., or unset WORLD_SIZE"
        ) from error


def _is_lost(error: BaseException) -> bool:
    """Tell what torch raises where a rank is gone: gloo has no class of its own for it."""
    said = str(error)
    return isinstance(error, distributed.DistError) or any(
        words in said for words in ("gloo/", "Connection closed", "Connection reset", "Timed out")
    )


def _leave(ranks: Ranks, error: BaseException | None) -> None:
    """End the group, after what hangs on it.

    A `DistributedDataParallel` that outlives its group waits for ever in its destructor: it holds
    the interpreter's lock while it joins a thread that waits for that.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    ranks._parallel = None
    gc.collect()
    distributed.destroy_process_group()

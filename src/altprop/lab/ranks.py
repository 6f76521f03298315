"""A run in many processes: all that a run knows of them. With one process there is nothing to do.

Started by `torchrun`, every process ("rank") runs the same program on its share of each batch. What
one rank alone can know is decided together here, so that all take the same way; the first rank
alone writes and shows.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from altprop import AltpropError, ConfigError, ProcessError
from altprop.errors import in_a_line, listed

T = TypeVar("T")
PATIENCE = timedelta(seconds=45)  # for an answer of another process, until a run ends
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


class Ranks:
    """The processes of a run, of which this is one.

    **Arguments:** `group`, over which they speak to each other; `None` for a process alone.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank: int = 0 if group is None else group.rank()
        self.size: int = 1 if group is None else group.size()

    @property
    def leads(self) -> bool:
        """Whether this is the first rank, which alone writes and shows."""
        return self.rank == 0

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

    def first(self, act: Callable[[], T]) -> T:
        """Let the first rank act, and return on all what that returned.

        **Raises:** on all ranks what it raised.
        """
        with self.together():
            value = act() if self.leads else None
        if self.group is None:
            return value  # type: ignore[return-value]
        found = [value]
        distributed.broadcast_object_list(found, src=0, group=self.group)
        return found[0]  # type: ignore[return-value]

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
    try:
        yield Ranks(distributed.group.WORLD)
    except RuntimeError as error:
        if not isinstance(error, AltpropError) and _is_lost(error):
            # the group is broken: nobody could be told goodbye, and the process ends anyway
            raise ProcessError(
                f"another of the {size} processes has ended or does not answer "
                f"({in_a_line(error, 120)}): start all of them again, with --resume"
            ) from error
        if own:
            _leave(error)
        raise
    except BaseException as error:
        if own:
            _leave(error)
        raise
    if own:
        _leave(None)


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


def _leave(error: BaseException | None) -> None:
    """End the group, after what hangs on it.

    A `DistributedDataParallel` that outlives its group waits for ever in its destructor: it holds
    the interpreter's lock while it joins a thread that waits for that.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()
    distributed.destroy_process_group()

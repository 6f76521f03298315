"""A step's gradient: the joint batch's, made in one pass, or in several on several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from altprop import Certificate, Equilibrium, Part, equilibria, seeing
from altprop.lab.ranks import Ranks
from altprop.lab.settings import TrainConfig
from altprop.lab.state import Batch, State

HALF = {"bf16": torch.bfloat16}


class Made(NamedTuple):
    """A pass: which part of the joint batch it saw (`None`: all of it), and its certificates."""

    part: Part | None
    seen: list[tuple[Equilibrium, Certificate]]

    @property
    def certificates(self) -> list[Certificate]:
        return [certificate for _, certificate in self.seen]


def made(model: nn.Module, part: Part | None = None) -> Made:
    """Return what the equilibria of `model` measured in their last call."""
    blocks = [block for _, block in equilibria(model)]
    return Made(part, [(b, b.certificate) for b in blocks if b.certificate is not None])


def gradient(
    config: TrainConfig, state: State, batch: Batch, ranks: Ranks
) -> tuple[float, list[Made]]:
    """Write the gradient of a joint batch's mean loss; return that loss and the passes.

    **Arguments:** `batch`, tensors of a row a sample, on the CPU, the same on every rank.
    """
    model = state.model
    device = next(model.parameters()).device
    total, passes = 0.0, []
    for part, rows in parts(batch, config.accumulate, ranks):
        whole = part is None or part.last
        with (
            ranks.syncing(model, whole),
            nullcontext() if part is None else seeing(part),
            drawing(config.seed, state.progress.step, device),
        ):
            with autocast(config, device):
                loss = state.loss(ranks.called(model), tuple(t.to(device) for t in rows))
            (loss / config.accumulate if config.accumulate > 1 else loss).backward()
        total += float(loss.detach()) / config.accumulate
        passes.append(made(model, part))
    return ranks.mean(total), passes


def parts(batch: Batch, accumulate: int, ranks: Ranks) -> Iterator[tuple[Part | None, Batch]]:
    """Yield the parts of a joint batch that this process sees, one a pass, and their rows.

    The ranks' shares lie one after the other, and in each those of its passes.
    """
    if accumulate == 1 and ranks.group is None:
        yield None, batch
        return
    total = len(batch[0])
    count = total // (ranks.size * accumulate)
    sums: dict[str, torch.Tensor] = {}
    for number in range(accumulate):
        before = (ranks.rank * accumulate + number) * count
        first, last = number == 0, number == accumulate - 1
        part = Part(before, count, total, first, last, ranks.group, sums)
        yield part, tuple(t[part.rows] for t in batch)


@contextmanager
def drawing(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Draw what a model draws, as dropout does, from the seed and the step, and from nothing else.

    So a resumed run draws what it would have, and so does one beside others in a process.
    """
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else ()):
        number = (seed + 1) * 1_000_003 + step
        torch.default_generator.manual_seed(number)
        if on_gpu:
            torch.cuda.manual_seed(number)
        yield


def autocast(config: TrainConfig, device: torch.device) -> Any:
    """Return what lets forward passes compute in the precision that the run asks for."""
    dtype = HALF.get(config.dtype)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def push(
    config: TrainConfig,
    state: Any,
    model: nn.Module,
    step: int,
    urgent: bool,
    passes: Sequence[Made],
    ranks: Ranks,
) -> dict[str, float]:
    """Let the stabiliser add the joint batch's gradient of its own; return what it measured.

    **Arguments:** `state`, its state; `urgent`, whether the step's gradient was refused.
    """
    stabiliser = config.stabiliser
    assert stabiliser is not None
    if passes[0].part is None:
        return stabiliser.apply(model, state, step, urgent=urgent)
    found = []
    with ranks.added(model):
        for one in passes:
            assert one.part is not None
            for block, certificate in one.seen:
                block.certificate = certificate
            with seeing(one.part):
                found.append(stabiliser.apply(model, state, step, urgent=urgent))
    return ranks.worst(found)

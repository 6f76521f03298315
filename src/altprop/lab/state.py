"""What a run goes on from: model, optimiser, batches, random draws, and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from altprop.lab import checkpoint
from altprop.lab.building import count_parameters

Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], Tensor]


class Stream(Protocol):
    """What gives a run its batches, one after the other, drawn by a generator of its own."""

    generator: torch.Generator

    def draw(self) -> Batch: ...


class Stateful(Protocol):
    """What can be saved as tensors by name, and restored."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass
class Progress:
    """How far a run has come; `recently` holds the last refused steps, counted from 1."""

    step: int = 0
    refused: int = 0
    loss: float = math.inf
    best_loss: float = math.inf
    recently: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, notes: Mapping[str, Any]) -> Progress:
        """Return what a checkpoint holds of it; it raises `TypeError` for anything else."""
        progress = cls(**notes)
        counts = [progress.step, progress.refused, *progress.recently]
        losses = [progress.loss, progress.best_loss]
        if not all(type(n) is int and n >= 0 for n in counts) or not all(
            isinstance(loss, (int, float)) for loss in losses
        ):
            raise TypeError(f"the progress {dict(notes)} is none")
        return progress

    def in_a_row(self) -> int:
        """Return how many steps in a row were refused, up to the last that was made."""
        return sum(at == self.step - back for back, at in enumerate(reversed(self.recently)))


@dataclass
class State:
    """Everything that a run goes on from.

    **Arguments:** `loss`, of the model on a batch; `stabiliser`, its own state; `average`, the
    averaged weights, if it keeps any.
    """

    model: nn.Module
    loss: Loss
    optimiser: torch.optim.Optimizer
    batches: Stream
    stabiliser: Stateful | None = None
    average: AveragedModel | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def judged(self) -> nn.Module:
        """The model that is evaluated, kept as best and sampled from: the average, if any."""
        return self.model if self.average is None else self.average.module

    def drawn(self) -> dict[str, Tensor]:
        """Return what random draws go on from, and the stabiliser's state, as tensors by name."""
        extra = {"batches": self.batches.generator.get_state()}
        if self.stabiliser is not None:
            extra |= {f"stabiliser.{k}": v for k, v in self.stabiliser.state_dict().items()}
        return extra

    def draw_again(self, extra: Mapping[str, Tensor]) -> None:
        """Take back what `drawn` returned."""
        self.batches.generator.set_state(extra["batches"])
        prefix = "stabiliser."
        kept = {k[len(prefix) :]: v for k, v in extra.items() if k.startswith(prefix)}
        if self.stabiliser is not None:
            self.stabiliser.load_state_dict(kept)

    def parameters(self) -> int:
        """Return how many numbers of the model learn."""
        return count_parameters(self.model)

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors, of which this process has collected these."""
        return tensors

    def restore(self, saved: checkpoint.Checkpoint, path: Path) -> None:
        """Take everything back to a checkpoint.

        **Raises:** `CheckpointError`, or what a part raises that is given another's state.
        """
        checkpoint.restore_model(self.judged, saved, path)
        if self.average is not None:
            checkpoint.restore_model(self.model, replace(saved, model=saved.training), path)
            self.average.n_averaged.copy_(saved.extra["averaged"])
        checkpoint.restore_optimiser(self.model, self.optimiser, saved, path)
        self.draw_again(saved.extra)
        self.progress = Progress.of(saved.notes["progress"])

"""A run's folder: what it was configured with, its metrics, and checkpoints to go on from."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from altprop import CheckpointError, ConvergenceError
from altprop.files import write_whole
from altprop.lab import checkpoint
from altprop.lab.choices import types_of
from altprop.lab.corpus import keep
from altprop.lab.folder import LOCK, PREVIOUS, clean, empty, is_free, is_run, new_folder
from altprop.lab.identity import Identity, options_of
from altprop.lab.lock import Lock
from altprop.lab.metrics import Metrics
from altprop.lab.moved import written
from altprop.lab.record import Record
from altprop.lab.settings import TrainConfig
from altprop.lm.text import Corpus

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


class Run:
    """A run's folder: what it was configured with, its metrics and its checkpoints.

    It belongs to this process until the end of the `with` block. `said` holds what a person should
    know of how it was opened.
    """

    def __init__(self, folder: Path, config: TrainConfig, corpus: Corpus, lock: Lock) -> None:
        self.folder, self.config = folder, config
        self.said: list[str] = []
        self._lock, self._tokenizer = lock, corpus.tokenizer
        self._identity = Identity.of(config, corpus)
        self._metrics = Metrics(folder / "metrics.jsonl")
        self._record: Record | None = None
        self._saved: tuple[Path, checkpoint.Checkpoint] | None = None  # what to go on from
        self._last_is_whole = True
        self._step, self._kept = 0, -1  # the last step that was logged, and that was saved
        self._seconds = 0.0  # of the sessions before
        self._began = self._saved_at = time.monotonic()

    @classmethod
    def open(cls, config: TrainConfig, corpus: Corpus) -> Run:
        """Make the folder, or find the one to go on in; refuse to mix two runs.

        **Raises:** `CheckpointError` for a run that is in the way, in use or not to be resumed.
        """
        options_of(config)  # refuses what no file can hold, before there is a folder
        try:
            folder = config.out or new_folder(config.data, config.method)
            there = is_run(folder)
            if config.resume and not there:
                raise CheckpointError(f"{folder} holds no run to resume: leave out --resume")
            if there and not (config.resume or config.overwrite):
                raise CheckpointError(
                    f"{folder} already holds a run: add --resume to go on with it, --overwrite to "
                    "replace it, or name another folder with --out"
                )
            # a config.yaml alone may be anybody's: --overwrite must not replace what is not ours
            if not there and not is_free(folder):
                raise CheckpointError(f"{folder} is no run folder: name a new folder with --out")
            folder.mkdir(parents=True, exist_ok=folder.exists())
            lock = Lock(folder / LOCK)
            try:
                run = cls(folder, config, corpus, lock)
                if not lock.held:
                    run.said.append(f"{folder} cannot be locked: start no second process on it")
                if config.resume:
                    run._check_same()
                else:
                    run._start()
                clean(folder)
            except BaseException:
                lock.close()
                raise
        except OSError as error:
            where = config.out or "runs"
            raise CheckpointError(f"{where}: cannot be written ({error.strerror})") from None
        return run

    def _start(self) -> None:
        """Make an empty run of the folder: a crash from here on leaves one to be overwritten."""
        empty(self.folder)
        self._write_config()
        keep(self._tokenizer, self.folder)
        self._metrics.start()
        self._record = Record(self.folder / "run.json", [])

    def _write_config(self) -> None:
        write_whole(self.folder / "config.yaml", written(self.folder, self._identity.options))

    def _check_same(self) -> None:
        """Find what to go on from, and refuse a run that was started with something else.

        The checkpoint alone says what that was: a `config.yaml` may have been lost or changed.
        """
        path, saved = self._find()
        now, then = self._identity, Identity.read(saved, path)
        if changed := now.changed(then):
            raise CheckpointError(
                f"{self.folder} was started with other values of {', '.join(changed)}: write "
                f"{self.resume_options()}, or start a new run"
            )
        if (now.vocabulary, now.text) != (then.vocabulary, then.text):
            what = "another text" if now.vocabulary == then.vocabulary else "another vocabulary"
            raise CheckpointError(
                f"{self.folder} was started with {what} than {self.config.data} has now: "
                "give the text of that time, or start a new run"
            )
        self._saved = path, saved

    def _find(self) -> tuple[Path, checkpoint.Checkpoint]:
        """Return the last checkpoint that is whole, and say which were skipped and why."""
        skipped: list[str] = []
        for path in (self.folder / f"{name}.safetensors" for name in ("last", PREVIOUS)):
            try:
                saved = checkpoint.load(path)
                Identity.read(saved, path)
                if not saved.notes.get("resumable"):
                    raise CheckpointError(
                        f"{path}: without the optimiser's state: nothing to go on from"
                    )
            except CheckpointError as error:
                if path.exists():
                    skipped.append(str(error).partition("; ")[0])
                continue
            self._last_is_whole = not skipped
            if skipped or path.stem == PREVIOUS:
                why = "; ".join(skipped) or "there is no last.safetensors"
                self.said.append(f"going on from {path}, the checkpoint before: {why}")
            return path, saved
        again = "write --overwrite instead of --resume to start it again"
        if skipped:
            raise CheckpointError(f"{'; '.join(skipped)}: {again}")
        raise CheckpointError(f"{self.folder} has no checkpoint yet to go on from: {again}")

    def resume_options(self) -> str:
        """Return the options that go on with this run, ready for a shell."""
        imports = "".join(f"--import {module} " for module in sorted(homes(self.config)))
        return f"{imports}--config {shlex.quote(str(self.folder / 'config.yaml'))} --resume"

    def begin(self, state: State, device: torch.device) -> None:
        """Take the state back to the last checkpoint, if there is one, and start the session.

        **Raises:** `CheckpointError` for a checkpoint that this run cannot go on from; then
        nothing in the folder has changed.
        """
        if self._saved is not None:
            path, saved = self._saved
            self._saved = None  # its tensors need not stay in memory
            try:
                state.restore(saved, path)
                made = state.progress.step
                written, self._seconds = dict(saved.notes["metrics"]), float(saved.notes["seconds"])
            except CheckpointError:
                raise
            except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                why = " ".join(str(error).split())
                raise CheckpointError(f"{path}: does not fit this run ({why})") from error
            if made > self.config.steps:
                raise CheckpointError(
                    f"{self.folder} has made {made} steps, more than {self.config.steps}: write "
                    f"--steps {made}, or more to go on"
                )
            self._go_on(made, written)
        assert self._record is not None
        self._say(self._record.start(self._step, device, self._identity.text))
        self._began = self._saved_at = time.monotonic()

    def _go_on(self, made: int, written: dict[str, Any]) -> None:
        """Take the files back to the step of the checkpoint."""
        self._step = self._kept = made
        try:
            self._say(self._metrics.go_on(made, written))
            # steps and the like may have changed, and the next --resume must not take them back
            self._write_config()
            keep(self._tokenizer, self.folder)
            self._record = Record.go_on(self.folder / "run.json")
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be written ({error.strerror})") from None
        best = self.folder / "best.safetensors"
        try:
            if best.exists():
                checkpoint.load(best)
        except CheckpointError as error:
            self._say(f"{str(error).partition('; ')[0]}: it is lost until a better evaluation")

    def _say(self, text: str) -> None:
        if text:
            self.said.append(text)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._record is not None:
                self._record.end(self._step, self._worked())
        except CheckpointError:
            if kind is None:  # else the disk that is full has been named already
                raise
        finally:
            self._metrics.close()
            self._lock.close()

    def _worked(self) -> float:
        return self._seconds + time.monotonic() - self._began

    def follow(self, records: Iterator[dict[str, Any]], state: State) -> Iterator[dict[str, Any]]:
        """Pass on the records of a run's steps; save first what a failed step leaves behind.

        **Raises:** what a step raises, with how to go on.
        """
        while True:
            before = state.drawn()
            try:
                record = next(records)
            except StopIteration:
                return
            except ConvergenceError as error:
                state.draw_again(before)  # the weights are those before the step already
                self.save("last", state, resumable=True)
                raise ConvergenceError(
                    f"{error}; the steps before are saved: altprop train {self.resume_options()} "
                    "--on_failure skip"
                ) from error
            yield record

    def log(self, record: dict[str, Any]) -> None:
        """Append one JSON object to `metrics.jsonl`, at once; what is not finite becomes null.

        **Raises:** `CheckpointError` if it cannot be written.
        """
        try:
            self._metrics.append(record)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{self._way_on()}") from error
        self._step = record["step"]

    def due(self) -> bool:
        """Tell whether the last checkpoint is `save_every` seconds old."""
        return time.monotonic() - self._saved_at >= self.config.save_every

    def save(self, name: str, state: State, *, resumable: bool) -> None:
        """Write `<name>.safetensors`: the judged model, and if `resumable` what to go on from.

        What is resumable is written once a step, and keeps its predecessor beside it.

        **Raises:** `CheckpointError` if it cannot be written.
        """
        if resumable and state.progress.step == self._kept:
            return
        path = self.folder / f"{name}.safetensors"
        try:
            notes = {
                "progress": vars(state.progress),
                "resumable": resumable,
                "identity": vars(self._identity),
                "metrics": self._metrics.mark(),
                "seconds": self._worked(),
            }
            if not resumable:
                checkpoint.save(path, state.judged, None, state.drawn(), notes)
                return
            extra, average = state.drawn(), None
            if state.average is not None:
                extra["averaged"], average = state.average.n_averaged, state.judged
            before = self.folder / f"{PREVIOUS}.safetensors" if self._last_is_whole else None
            checkpoint.save(path, state.model, state.optimiser, extra, notes, average, before)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{self._way_on()}") from error
        self._last_is_whole, self._kept = True, state.progress.step
        self._saved_at = time.monotonic()

    def _way_on(self) -> str:
        kept = any((self.folder / f"{n}.safetensors").exists() for n in ("last", PREVIOUS))
        how = (
            self.resume_options() if kept else f"--out {shlex.quote(str(self.folder))} --overwrite"
        )
        return f": free some space, then altprop train {how}"


def homes(value: Any) -> set[str]:
    """Return the modules of the classes in a value that are not altprop's: those to `--import`."""
    own = set()
    if is_dataclass(value):
        own = {type(value).__module__}
        value = {name: getattr(value, name) for name in types_of(type(value))}
    inside = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (tuple, list, Mapping)):
        own = own.union(*map(homes, inside))
    return {module for module in own if module.partition(".")[0] != "altprop"}

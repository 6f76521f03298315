"""A run's folder: what it was configured with, its metrics, and checkpoints to go on from."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altprop import CheckpointError, ConvergenceError
from altprop.files import write_whole
from altprop.lab import checkpoint
from altprop.lab.corpus import keep
from altprop.lab.folder import (
    LOCK,
    PREVIOUS,
    check_files,
    check_place,
    clean,
    empty,
    is_free,
    is_run,
    new_folder,
)
from altprop.lab.identity import Identity, options_of
from altprop.lab.lock import Lock
from altprop.lab.metrics import Metrics
from altprop.lab.moved import written
from altprop.lab.ranks import Ranks
from altprop.lab.record import Record
from altprop.lab.settings import TrainConfig
from altprop.lab.state import State
from altprop.lab.values import homes
from altprop.lm.text import Corpus

# what a part of a run raises that is given another's state
_MISFITS = (KeyError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError)


class Run:
    """A run's folder: what it was configured with, its metrics and its checkpoints.

    It belongs to this process until the end of the `with` block, or to the first of many, which
    alone reads and writes. `said` holds what a person should know of how it was opened.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, corpus: Corpus, lock: Lock | None, ranks: Ranks
    ) -> None:
        self.folder, self.config = folder, config
        self.said: list[str] = []
        self._lock, self._tokenizer, self._ranks = lock, corpus.tokenizer, ranks
        self._identity = Identity.of(config, corpus)
        self._metrics = Metrics(folder / "metrics.jsonl")
        self._record: Record | None = None
        self._saved: tuple[Path, checkpoint.Checkpoint] | None = None  # what to go on from
        self._last_is_whole = True
        self._step, self._kept = 0, -1  # the last step that was logged, and that was saved
        self._seconds = 0.0  # of the sessions before
        self._began = self._saved_at = time.monotonic()

    @classmethod
    def open(cls, config: TrainConfig, corpus: Corpus, ranks: Ranks | None = None) -> Run:
        """Make the folder, or find the one to go on in; refuse to mix two runs.

        **Raises:** `CheckpointError` for a run that is in the way, in use or not to be resumed;
        `ConfigError` for processes that were given different things.
        """
        ranks = ranks or Ranks()
        ranks.check_same(vars(Identity.of(config, corpus)), "options or texts")
        opened: list[Run] = []

        def here() -> tuple[Path, Any]:
            opened.append(cls._open(config, corpus, ranks))
            return opened[0].folder, opened[0]._saved

        folder, saved = ranks.first(here)
        if not opened:  # another rank's
            opened.append(cls(folder, config, corpus, None, ranks))
            opened[0]._saved = saved
        return opened[0]

    @classmethod
    def _open(cls, config: TrainConfig, corpus: Corpus, ranks: Ranks) -> Run:
        options_of(config)  # refuses what no file can hold, before there is a folder
        try:
            folder = config.out or new_folder(config.data, config.method)
            there = is_run(folder)
            # a config.yaml alone may be anybody's: --overwrite must not replace what is not ours
            free = is_free(folder)
            check_place("run", folder, there, free, config.resume, config.overwrite)
            check_files(folder)
            folder.mkdir(parents=True, exist_ok=folder.exists())
            lock = Lock(folder / LOCK)
            try:
                run = cls(folder, config, corpus, lock, ranks)
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
            if not any(name in then.options for name in changed):
                raise CheckpointError(
                    f"{self.folder} was started by a version of altprop without "
                    f"{', '.join(changed)}: go on with it by that version, or start a new run"
                )
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
            except _MISFITS as error:
                why = " ".join(str(error).split())
                raise CheckpointError(f"{path}: does not fit this run ({why})") from error
            if made > self.config.steps:
                raise CheckpointError(
                    f"{self.folder} has made {made} steps, more than {self.config.steps}: write "
                    f"--steps {made}, or more to go on"
                )
            self._step = self._kept = made
            self._ranks.first(lambda: self._go_on(made, written))
        if self._record is not None:
            self._say(self._record.start(self._step, device, self._identity.text, self._ranks.size))
        self._began = self._saved_at = time.monotonic()

    def _go_on(self, made: int, written: dict[str, Any]) -> None:
        """Take the files back to the step of the checkpoint."""
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
            if self._lock is not None:
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
            if self._ranks.leads:
                self._metrics.append(record)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{self._way_on()}") from error
        self._step = record["step"]

    def due(self) -> bool:
        """Tell whether the last checkpoint is `save_every` seconds old, by this rank's clock."""
        return time.monotonic() - self._saved_at >= self.config.save_every

    def save(self, name: str, state: State, *, resumable: bool) -> None:
        """Write `<name>.safetensors`: the judged model, and if `resumable` what to go on from.

        What is resumable is written once a step, and keeps its predecessor beside it.

        **Raises:** `CheckpointError` if it cannot be written.
        """
        if resumable and state.progress.step == self._kept:
            return
        extra, average, optimiser = state.drawn(), None, state.optimiser if resumable else None
        for key in extra:
            if key.startswith("stabiliser.probe."):
                extra[key] = self._ranks.rows(extra[key])
        model = state.model if resumable else state.judged
        if resumable and state.average is not None:
            extra["averaged"], average = state.average.n_averaged, state.judged
        whole = state.whole(checkpoint.collect(model, optimiser, extra, average))
        with self._ranks.together():
            if self._ranks.leads:
                self._write(name, whole, vars(state.progress), resumable)
        if resumable:
            self._last_is_whole, self._kept = True, state.progress.step
            self._saved_at = time.monotonic()

    def _write(
        self, name: str, whole: Mapping[str, Tensor], progress: Mapping[str, Any], resumable: bool
    ) -> None:
        path = self.folder / f"{name}.safetensors"
        try:
            notes = {
                "progress": progress,
                "resumable": resumable,
                "identity": vars(self._identity),
                "metrics": self._metrics.mark(),
                "seconds": self._worked(),
            }
            keep = resumable and self._last_is_whole
            before = self.folder / f"{PREVIOUS}.safetensors" if keep else None
            checkpoint.write(path, whole, notes, before)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{self._way_on()}") from error

    def _way_on(self) -> str:
        kept = any((self.folder / f"{n}.safetensors").exists() for n in ("last", PREVIOUS))
        how = (
            self.resume_options() if kept else f"--out {shlex.quote(str(self.folder))} --overwrite"
        )
        return f": free some space, then altprop train {how}"

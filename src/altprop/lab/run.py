"""A run's folder: what it was configured with, its metrics, and checkpoints to go on from."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from altprop import CheckpointError
from altprop.files import write_whole
from altprop.lab import checkpoint
from altprop.lab.choices import types_of
from altprop.lab.config import read_config, write_config
from altprop.lab.settings import TrainConfig, is_run
from altprop.lm.text import CharTokenizer, Corpus, describe, names_corpus

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


class Run:
    """A run's folder: what it was configured with, its metrics and its checkpoints."""

    # what a resumed run may change without becoming another run; of the data, the place alone
    _FREE = {
        *("out", "resume", "overwrite", "steps", "eval_every", "device", "sample"),
        *("on_failure", "refused_in_a_row", "final_windows"),
    }

    def __init__(self, folder: Path, config: TrainConfig, text: dict[str, str]) -> None:
        self.folder, self.config = folder, config
        self._text = text  # its digests
        self._saved: checkpoint.Checkpoint | None = None  # what to go on from
        self._metrics: TextIO | None = None

    @classmethod
    def open(cls, config: TrainConfig, corpus: Corpus) -> Run:
        """Make the folder, or find the one to go on in; refuse to mix two runs.

        **Raises:** `CheckpointError` for a run that is in the way or cannot be resumed.
        """
        facts = describe(corpus)
        text = {name: facts[name] for name in ("train_sha256", "validation_sha256")}
        try:
            folder = config.out or _new_folder(config)
            run = cls(folder, config, text)
            there = is_run(folder)
            if config.resume:
                run._check_same(there, corpus)
            elif there and not config.overwrite:
                raise CheckpointError(
                    f"{folder} already holds a run: add --resume to go on with it, --overwrite to "
                    "replace it, or name another folder with --out"
                )
            # a config.yaml alone may be anybody's: --overwrite must not replace what is not ours
            elif folder.exists() and not there and (not folder.is_dir() or any(folder.iterdir())):
                raise CheckpointError(f"{folder} is no run folder: name a new folder with --out")
            else:
                folder.mkdir(parents=True, exist_ok=folder.exists())
                for old in ("metrics.jsonl", "best.safetensors", "last.safetensors", "curves.png"):
                    (folder / old).unlink(missing_ok=True)
                corpus.tokenizer.to_json(folder / "vocab.json")
                write_config(folder / "config.yaml", _stored(config), config.foreign)
        except OSError as error:
            where = config.out or "runs"
            raise CheckpointError(f"{where}: cannot be written ({error.strerror})") from None
        return run

    def _check_same(self, there: bool, corpus: Corpus) -> None:
        if not there:
            raise CheckpointError(f"{self.folder} holds no run to resume: leave out --resume")
        path = self.folder / "last.safetensors"
        if not path.exists():
            raise CheckpointError(
                f"{self.folder} has no checkpoint yet to go on from: write --overwrite instead of "
                "--resume to start it again"
            )
        before = read_config(self.folder / "config.yaml", TrainConfig)
        same_tokens = CharTokenizer.from_json(self.folder / "vocab.json") == corpus.tokenizer
        self._saved = checkpoint.load(path)
        same_text = same_tokens and self._saved.notes.get("text", self._text) == self._text
        now, then = _stored(self.config), _stored(before)
        changed = [
            f.name
            for f in fields(TrainConfig)
            if f.name not in self._FREE and getattr(now, f.name) != getattr(then, f.name)
        ]
        if same_text and "text" in self._saved.notes:
            changed = [name for name in changed if name != "data"]  # the same text, elsewhere
        if changed:
            raise CheckpointError(
                f"{self.folder} was started with other values of {', '.join(changed)}: write "
                f"{self.resume_options()}, or start a new run"
            )
        if not same_text:
            what = "another text" if same_tokens else "other characters"
            raise CheckpointError(
                f"{self.folder} was started with {what} than {self.config.data} has now: "
                "give the text of that time, or start a new run"
            )

    def resume_options(self) -> str:
        """Return the options that go on with this run, ready for a shell."""
        imports = "".join(f"--import {module} " for module in sorted(_homes(self.config)))
        return f"{imports}--config {shlex.quote(str(self.folder / 'config.yaml'))} --resume"

    def restore(self, state: State) -> None:
        """Take everything back to the last checkpoint, the metrics too.

        **Raises:** `CheckpointError` for a checkpoint that this run cannot go on from.
        """
        path, saved = self.folder / "last.safetensors", self._saved
        self._saved = None  # its tensors need not stay in memory
        assert saved is not None, "restore belongs to a run that was opened to be resumed"
        if not saved.notes.get("resumable"):
            raise CheckpointError(f"{path}: without the optimiser's state: nothing to go on from")
        checkpoint.restore_model(state.judged, saved, path)
        if state.average is not None:
            checkpoint.restore_model(state.model, replace(saved, model=saved.training), path)
            state.average.n_averaged.copy_(saved.extra["averaged"])
        checkpoint.restore_optimiser(state.model, state.optimiser, saved)
        state.batches.generator.set_state(saved.extra["batches"])
        prefix = "stabiliser."
        kept = {k[len(prefix) :]: v for k, v in saved.extra.items() if k.startswith(prefix)}
        if state.stabiliser is not None:
            state.stabiliser.load_state_dict(kept)
        state.progress = Progress(**saved.notes["progress"])
        if state.progress.step > self.config.steps:
            raise CheckpointError(
                f"{self.folder} has made {state.progress.step} steps, more than "
                f"{self.config.steps}: write --steps {state.progress.step}, or more to go on"
            )
        self._trim_metrics(state.progress.step)
        # steps and the like may have changed, and the next --resume must not take them back
        write_config(self.folder / "config.yaml", _stored(self.config), self.config.foreign)

    def _trim_metrics(self, step: int) -> None:
        """Drop the lines past `step`, the figure of the end, and a line that a crash cut off."""
        metrics = self.folder / "metrics.jsonl"
        kept = []
        for line in metrics.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                if record["step"] > step:
                    break
            except ValueError:
                break
            if "final_validation_loss" not in record:  # the end is another one now
                kept.append(f"{line}\n")
        write_whole(metrics, "".join(kept))

    def __enter__(self) -> Run:
        self._metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._metrics is not None:
            self._metrics.close()

    def log(self, record: dict[str, Any]) -> None:
        """Append one JSON object to `metrics.jsonl`, at once; what is not finite becomes null."""
        assert self._metrics is not None, "log belongs inside the run's with block"
        plain = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        self._metrics.write(json.dumps(plain, allow_nan=False) + "\n")
        self._metrics.flush()

    def save(self, name: str, state: State, *, resumable: bool) -> None:
        """Write `<name>.safetensors`: the judged model, and if `resumable` what to go on from."""
        extra = {"batches": state.batches.generator.get_state()}
        if state.stabiliser is not None:
            extra |= {f"stabiliser.{k}": v for k, v in state.stabiliser.state_dict().items()}
        notes = {"progress": vars(state.progress), "resumable": resumable, "text": self._text}
        path = self.folder / f"{name}.safetensors"
        if not resumable:
            checkpoint.save(path, state.judged, None, extra, notes)
        elif state.average is None:
            checkpoint.save(path, state.model, state.optimiser, extra, notes)
        else:
            extra["averaged"] = state.average.n_averaged
            checkpoint.save(path, state.model, state.optimiser, extra, notes, average=state.judged)


def _new_folder(config: TrainConfig) -> Path:
    """Make a folder below runs/ that nobody else has, not even a run of the same second."""
    parent = Path("runs")
    parent.mkdir(exist_ok=True)
    text = Path(os.path.abspath(config.data)).stem  # of `.` too
    name = f"{text}-{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def _stored(config: TrainConfig) -> TrainConfig:
    """Return the configuration as a run keeps it: it means the same wherever it is read from.

    The folder is that of the file, so the file does not name it; a text is found from any other.
    """
    data = config.data
    if not names_corpus(data):
        data = str(Path(data).expanduser().absolute())
    return replace(config, data=data, out=None, resume=False, overwrite=False)


def _homes(value: Any) -> set[str]:
    """Return the modules of the classes in a value that are not altprop's: those to `--import`."""
    own = set()
    if is_dataclass(value):
        own = {type(value).__module__}
        value = {name: getattr(value, name) for name in types_of(type(value))}
    inside = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (tuple, list, Mapping)):
        own = own.union(*map(_homes, inside))
    return {module for module in own if module.partition(".")[0] != "altprop"}

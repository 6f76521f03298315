"""What a training run depends on: one frozen dataclass, for Python and the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from altprop import (
    AbstractEstimator,
    AbstractRule,
    AbstractSolver,
    AbstractStabiliser,
    ConfigError,
)
from altprop.errors import unknown
from altprop.lab.choices import defaults_of
from altprop.lab.config import WRITES, refuse
from altprop.lab.folder import TRACKERS, check_ways, is_run
from altprop.lab.memory import FLOAT, check_memory, training, weights
from altprop.lab.moved import KEY, found_from
from altprop.lab.seal import has_seal
from altprop.lm.blocks import ESTIMATOR, SOLVER, STABILISER, ModelConfig


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on.

    Args:
        data: a built-in corpus (`plays`), a text file or a folder of them,
            `hf:NAME[:config][:column]` of Hugging Face's datasets, or a folder of tokens.
        validation: a text to validate on, not `data`'s end.
        pattern: which files of a folder are its texts, such as `*.py`; `*.txt` and `*.md` unless
            given.
        tokenizer: `char`, `bpe:4096`, a tokenizer.json, or `ids:50257` of tokens alone; null for
            the data's own, or `char`.
        out: the run's folder; a new one below runs/ unless given. The config.yaml of a run means
            the folder that it lies in.
        resume: go on from the run's last checkpoint.
        overwrite: replace the run in the folder.
        model: `equilibrium`, or `gpt` of ordinary blocks.
        block: of the equilibrium, its dynamics: `gated`, `damped`, or `thick` (which needs
            `--solver Anderson`).
        layers: the number of blocks; null for 4 of the gpt and 1 of the equilibrium.
        stacking: of the equilibrium of several layers, `joint` (one, with feedback from the last
            block) or `separate` (one each).
        dropout: the share of numbers that training drops.
        tie_head: tie the gpt's head to its embedding.
        rule: of the gpt, the learning rule of every linear map or block; null for backprop.
        rules: of the gpt, rules by name pattern, such as `blocks.*.attn.*`, instead of `rule`.
        freeze: name patterns of parameters that do not learn, such as `blocks.*`.
        d_model: the width.
        heads: attention heads; must divide the width.
        context: the length of a window, in tokens.
        estimator: of the equilibrium, how a cotangent becomes a gradient.
        solver: of the equilibrium, how it is solved, in training, evaluation and generation.
        stabiliser: what keeps the fixed point while it learns; null for nothing.
        batch: windows per step.
        steps: optimiser steps.
        lr: the peak learning rate of AdamW.
        warmup: steps of linear warm-up.
        final_lr: where the cosine ends, as a fraction of the peak.
        weight_decay: of matrices; vectors have none.
        beta1: AdamW's decay of the mean.
        beta2: AdamW's decay of the square.
        clip: the largest gradient norm.
        ema: the decay of averaged weights, which are then judged, kept as best and sampled from; 0
            for none.
        seed: of everything random in the run.
        eval_every: steps between evaluations.
        save_every: seconds between checkpoints; 0 for every step.
        eval_windows: fixed windows that an evaluation covers.
        final_windows: windows without overlap that the figure at the end covers; evenly spaced ones
            where the validation part has more.
        free_limit: the largest free residual of a step that may be applied; a solve of a fixed
            number of steps (tol 0) has no limit.
        adjoint_limit: the same of the adjoint residual.
        error_limit: the same of `state_error`, that one amplified.
        on_failure: what to do with a step past these limits, or with a loss or gradient that is not
            finite: `skip` drops its gradient (the stabiliser still acts) and counts it, `stop` ends
            the run.
        refused_in_a_row: refused steps in a row that end the run.
        device: `auto`, `cpu`, `cuda`, or any other that torch knows.
        dtype: of training's forward passes.
        compile: compile the model, or its dynamics.
        accumulate: passes that make a batch's gradient.
        checkpointing: of the gpt, recompute its blocks.
        threads: of each process; null for torch's own.
        parallel: of processes by torchrun: `ddp`, `fsdp` (shards), or `pipeline` (of blocks, by
            direct feedback).
        microbatches: of a pipeline, the parts of a batch that follow one another; null for about
            four a process.
        sample: tokens of text to write at the end.
        log: trackers to tell of every step: trackio, tensorboard, wandb (offline).
        quiet: show the figure at the end alone.
    """

    data: str = "plays"
    validation: str | None = None
    pattern: tuple[str, ...] = ()
    tokenizer: str | None = None
    out: Path | None = None
    resume: bool = False
    overwrite: bool = False
    model: str = "equilibrium"
    block: str = "gated"
    layers: int | None = None
    stacking: str = "joint"
    dropout: float = 0.0
    tie_head: bool = False
    rule: AbstractRule | None = None
    rules: dict[str, AbstractRule] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    d_model: int = 128
    heads: int = 4
    context: int = 64
    estimator: AbstractEstimator = ESTIMATOR
    solver: AbstractSolver = SOLVER
    stabiliser: AbstractStabiliser | None = STABILISER
    batch: int = 16
    steps: int = 1000
    lr: float = 3e-3
    warmup: int = 100
    final_lr: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    clip: float = 1.0
    ema: float = 0.0
    seed: int = 0
    eval_every: int = 250
    save_every: float = 60.0
    eval_windows: int = 320
    final_windows: int = 2048
    free_limit: float = 2e-2
    adjoint_limit: float = 0.1
    error_limit: float = 0.1
    on_failure: Literal["skip", "stop"] = "skip"
    refused_in_a_row: int = 20
    device: str = "auto"
    dtype: Literal["float32", "bf16"] = "float32"
    compile: bool = False
    accumulate: int = 1
    checkpointing: bool = False
    threads: int | None = None
    parallel: Literal["ddp", "fsdp", "pipeline"] = "ddp"
    microbatches: int | None = None
    sample: int = 400
    log: tuple[str, ...] = ()
    quiet: bool = False

    def __post_init__(self) -> None:
        counts = ("batch", "steps", "eval_every", "eval_windows", "final_windows")
        for name in (*counts, "refused_in_a_row", "accumulate"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "clip", "free_limit", "adjoint_limit", "error_limit"):
            value = getattr(self, name)
            _require(name, value, math.isfinite(value) and value > 0, "a number > 0")
        for name in ("warmup", "weight_decay", "sample", "final_lr", "save_every"):
            value = getattr(self, name)
            _require(name, value, math.isfinite(value) and value >= 0, "a number ≥ 0")
        for name in ("beta1", "beta2", "ema"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        _require("on_failure", self.on_failure, self.on_failure in ("skip", "stop"), "skip or stop")
        _require("seed", self.seed, 0 <= self.seed < 2**63, "in [0, 2^63)")  # torch takes no other
        for name in self.log:
            if name not in TRACKERS:
                raise unknown("tracker", name, TRACKERS)
        if self.threads is not None:
            _require("threads", self.threads, self.threads >= 1, "at least 1")
        for name, known in (("dtype", ("float32", "bf16")), ("parallel", _PARALLEL)):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        if self.microbatches is not None:
            if self.parallel != "pipeline":
                raise ConfigError(
                    "microbatches is for --parallel pipeline: write --microbatches null"
                )
            divides = self.microbatches >= 1 and self.batch % self.microbatches == 0
            _require("microbatches", self.microbatches, divides, f"a divisor of batch {self.batch}")
        if self.batch % self.accumulate:
            raise ConfigError(
                f"batch is {self.batch}, which {self.accumulate} passes cannot share alike: write "
                f"--batch {_multiple(self.batch, self.accumulate)}"
            )
        check_ways("run", self.out, self.resume, self.overwrite)
        if self.model not in _OWN:
            raise unknown("model", self.model, _OWN)
        default = defaults_of(type(self))
        for other, names in _OWN.items():
            given = [name for name in names if getattr(self, name) != default[name]]
            if other != self.model and given:
                raise ConfigError(
                    f"model {self.model} has no {', '.join(given)}: leave that out, or write "
                    f"--model {other}"
                )
        if self.rule is not None and self.rules:
            raise ConfigError("rule and rules exclude each other: put the rule under '*' in rules")
        shape = self.shape(vocabulary=1)  # refuses a shape that no model can have
        check_memory(
            FLOAT * weights(shape, self.model), _sized(self, "d_model", "layers", "context")
        )

    @classmethod
    def of_file(cls, data: dict[str, Any], file: Path) -> dict[str, Any]:
        """Return the options that a file holds: a run is the folder that its config lies in."""
        refuse(name for name in WRITES if data.pop(name, None))
        places = data.pop(KEY, None)
        for place in (file, file.resolve()):
            if place.name == "config.yaml" and is_run(place.parent):
                if not has_seal(place):
                    raise ConfigError(
                        "not as altprop wrote it (cut off, edited, or of an older version): leave "
                        f"out --config and give the run's own options, with --out {place.parent}"
                    )
                return {**found_from(place.parent, data, places), "out": str(place.parent)}
        return data

    @property
    def foreign(self) -> tuple[str, ...]:
        """The options that only other models have."""
        return tuple(name for other, own in _OWN.items() if other != self.model for name in own)

    @property
    def method(self) -> str:
        """What the run trains by, in a word."""
        if self.model == "equilibrium":
            return type(self.estimator).__name__
        return "rules" if self.rules else type(self.rule).__name__ if self.rule else "backprop"

    def check_training(self, vocabulary: int) -> None:
        """Refuse to train, on the CPU, what needs more memory than there is.

        **Raises:** `ConfigError`.
        """
        shape, average = self.shape(vocabulary), self.ema > 0
        needed = training(shape, self.model, self.batch, self.eval_windows, average)
        names = ("d_model", "layers", "context", "batch", "eval_windows")
        check_memory(needed, _sized(self, *names))

    def check_ranks(self, size: int) -> None:
        """Refuse what so many processes cannot do.

        **Raises:** `ConfigError`.
        """
        if self.parallel != "ddp" and size == 1:
            raise ConfigError(
                f"parallel is {self.parallel}, and there is one process: start several by torchrun "
                "--nproc-per-node 2 -m altprop train ..., or write --parallel ddp"
            )
        if self.parallel != "pipeline" and self.batch % (size * self.accumulate):
            passes = f" of {self.accumulate} passes" if self.accumulate > 1 else ""
            raise ConfigError(
                f"batch is {self.batch}, which {size} processes{passes} cannot share alike: write "
                f"--batch {_multiple(self.batch, size * self.accumulate)}"
            )

    def shape(self, vocabulary: int) -> ModelConfig:
        """Return the model's shape for a vocabulary of so many tokens."""
        return ModelConfig(
            vocabulary,
            self.context,
            self.d_model,
            self.heads,
            self.block,
            self.layers,
            self.tie_head,
            self.stacking,
            self.dropout,
        )


_PARALLEL = ("ddp", "fsdp", "pipeline")
# what only one of the models has, so that an option of the other is refused and not ignored
_OWN = {
    "equilibrium": (
        "block",
        "stacking",
        "estimator",
        "solver",
        "stabiliser",
        "free_limit",
        "adjoint_limit",
        "error_limit",
    ),
    "gpt": ("tie_head", "rule", "rules", "checkpointing"),
}


def _multiple(batch: int, of: int) -> int:
    """Return the next batch that so many passes can share."""
    return -(-batch // of) * of


def _sized(config: object, *names: str) -> str:
    return ", ".join(f"{name} is {getattr(config, name)}" for name in names)


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value}, expected {expected}")

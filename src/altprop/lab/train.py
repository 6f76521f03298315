"""The one training loop, `steps`: it reads from top to bottom and knows no rule by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from altprop import CheckpointError, ConfigError, ConvergenceError, Part, seeing
from altprop.lab.building import (
    averaged,
    drawn,
    gathered_alone,
    make_optimiser,
)
from altprop.lab.callbacks import Begin, Callback, Callbacks
from altprop.lab.corpus import corpus_of
from altprop.lab.display import Display, counting
from altprop.lab.evaluation import count_tiles, evaluate, tiles
from altprop.lab.gradient import autocast, gradient
from altprop.lab.guard import Guard
from altprop.lab.identity import options_of
from altprop.lab.pipeline import begin_stage
from altprop.lab.ranks import Ranks, full, joined, own_device
from altprop.lab.reporting.picture import plot_run
from altprop.lab.run import Run
from altprop.lab.settings import TrainConfig
from altprop.lab.signals import Stopped, interruptible
from altprop.lab.speed import compile_parts, threads
from altprop.lab.state import Batch, Loss, State, Stream
from altprop.lab.trackers import trackers
from altprop.lm.model import LanguageModel, generate
from altprop.lm.text import Corpus, check_context, windows


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with; losses are validation cross-entropies in nats per token.

    `loss` and `best_loss` (infinite if no evaluation was settled) are over the fixed windows of the
    way, `final_loss` over the validation part without overlap; `settled` says whether all states of
    that last figure were within `free_limit`.
    """

    folder: Path
    loss: float
    best_loss: float
    final_loss: float
    settled: bool
    refused: int
    sample: str


def train(config: TrainConfig, callbacks: Sequence[Callback] = ()) -> TrainResult:
    """Train a language model, keep the run in a folder, and return what came of it.

    Writes into the run's folder `config.yaml`, `vocab.json` (or `tokenizer.json`), `metrics.jsonl`,
    `best.safetensors`, `last.safetensors` and `curves.png`.

    **Arguments:** `callbacks`, told of every step and evaluation, before the trackers of
    `config.log`; what one raises ends the run, after saving.

    **Raises:** `DataError`, `ConfigError`, `CheckpointError` before anything is written;
    `ConvergenceError` if a step fails under `on_failure="stop"`, or after saving if too many were
    refused (`refused_in_a_row`, or all of them); `ProcessError` if another process of the run is
    lost; `KeyboardInterrupt` after saving.
    """
    listening = [*callbacks, *trackers(config.log)]
    with threads(config.threads), joined() as ranks:
        with ranks.together():
            config.check_ranks(ranks.size)
            corpus = corpus_of(config)
            check_context(corpus, config.context)
            device = pick_device(config.device)
            state, guard = _BEGIN[config.parallel](config, corpus, ranks)
        held_out = windows(corpus.validation, config.eval_windows, config.context, seed=0)
        with ranks.together():
            rehearse(config, state, ranks.sharing(config.parallel), held_out)
        compile_parts(state.model, config)

        with Run.open(config, corpus, ranks) as run:
            run.begin(state, device)
            with Callbacks(
                listening, lambda: run.save("last", state, resumable=True), ranks
            ) as told:
                told.begin(Begin(run.folder, options_of(config), state.progress.step))
                return _learn(config, corpus, state, guard, held_out, run, ranks, told)


def _learn(
    config: TrainConfig,
    corpus: Corpus,
    state: State,
    guard: Guard,
    held_out: tuple[Tensor, Tensor],
    run: Run,
    ranks: Ranks,
    told: Callbacks,
) -> TrainResult:
    """Make a run's steps and its figure at the end, in its open folder; see `train`."""
    progress, device = state.progress, next(state.model.parameters()).device
    with (
        Display(config.steps, progress.step, quiet=config.quiet) as display,
        interruptible(ranks.size > 1) as asked,
    ):
        display.note(
            f"{corpus.description}: {len(corpus.train):,} tokens, vocabulary of "
            f"{len(corpus.tokenizer)}\n"
            f"{state.parameters():,} parameters; run folder {run.folder}"
        )
        for said in run.said:
            display.note(said)
        stop = 0
        for record in run.follow(
            steps(config, state, guard, ranks.sharing(config.parallel)), state
        ):
            run.log(record)
            display.step(record)
            evaluation = None
            if progress.step % config.eval_every == 0 or progress.step == config.steps:
                seen = evaluate(state.judged, held_out, config.batch, device, config.free_limit)
                seen = ranks.same(seen)  # its last digits may be the machine's
                progress.loss = seen.loss
                evaluation = {"step": progress.step, **seen.record("validation")}
                run.log(evaluation)
                display.evaluation(progress.step, seen)
                if seen.settled and seen.loss < progress.best_loss:
                    progress.best_loss = seen.loss
                    run.save("best", state, resumable=False)
                run.save("last", state, resumable=True)
            stop, due = ranks.agree(asked(), run.due())
            if due:
                run.save("last", state, resumable=True)
            told.step(record)  # of a step that a resumed run need not make again
            if evaluation is not None:
                told.evaluation(evaluation)
            if stop:
                break
        run.save("last", state, resumable=True)

    if ranks.leads:
        draw_curves(run.folder, display)
    if guard.lost(progress):
        raise guard.error(progress, run.resume_options())
    if stop:
        display.note(
            f"stopped after step {progress.step} of {config.steps}; go on with\n"
            f"  altprop train {run.resume_options()}"
        )
        raise Stopped(stop)
    parts = tiles(corpus.validation, config.final_windows, config.context)
    used, there = len(parts[0]), count_tiles(corpus.validation, config.context)
    with counting(-(-used // config.batch), "final validation", config.quiet) as count:
        final = evaluate(state.judged, parts, config.batch, device, config.free_limit, count)
        coverage = {"final_windows": used, "validation_windows": there}
        ending = {"step": progress.step, **final.record("final_validation"), **coverage}
        run.log(ending)
        told.final(ending)
    model = cast(LanguageModel, state.judged.eval())
    with ranks.whole(model):
        text = write_sample(model, corpus, config, device, display)
    display.sample(text)
    display.finish(progress, final, (used, there), run.folder)
    return TrainResult(
        folder=run.folder,
        loss=progress.loss,
        best_loss=progress.best_loss,
        final_loss=final.loss,
        settled=final.settled,
        refused=progress.refused,
        sample=text,
    )


def begin(config: TrainConfig, corpus: Corpus, ranks: Ranks | None = None) -> tuple[State, Guard]:
    """Return what a run starts from, all of it drawn from its seed, and the guard of its steps.

    **Raises:** as `build_model` and `pick_device`.
    """
    if pick_device(config.device).type == "cpu":
        config.check_training(len(corpus.tokenizer))
    model, batches = drawn(config, corpus)
    model = model.to(pick_device(config.device))
    return begin_with(config, model, predicted, batches, ranks)


def begin_with(
    config: TrainConfig,
    model: nn.Module,
    loss: Loss,
    batches: Stream,
    ranks: Ranks | None = None,
) -> tuple[State, Guard]:
    """Return what a run of any model, loss and batches starts from, and the guard of its steps."""
    ranks = ranks or Ranks()
    average = averaged(model, config)
    if config.parallel == "fsdp":
        for one in [model] if average is None else [model, average.module]:
            ranks.shard(one, gathered_alone(config, one))
    else:
        ranks.share(model)
    guard = Guard(config, torch.Generator().manual_seed(config.seed + 1), ranks)
    optimiser = make_optimiser(model, config)
    return State(model, loss, optimiser, batches, guard.state, average), guard


_BEGIN: dict[str, Callable[[TrainConfig, Corpus, Ranks], tuple[State, Guard]]] = {
    "ddp": begin,
    "fsdp": begin,
    "pipeline": begin_stage,
}


def predicted(model: nn.Module, batch: Batch) -> Tensor:
    """Return a language model's loss: its mean cross-entropy on ids and the ids that follow."""
    return model(*batch)[1]


def steps(
    config: TrainConfig, state: State, guard: Guard, ranks: Ranks | None = None
) -> Iterator[dict[str, Any]]:
    """Make the steps that are left, and yield after each what was measured of it.

    Whoever asks for the next step may look at the state, save it, or ask for no more. A run that
    the guard gives up ends before `config.steps`. With `ranks` each makes its share of every batch.

    **Raises:** `ConvergenceError` if a step fails under `on_failure="stop"`.
    """
    model, optimiser, progress = state.model, state.optimiser, state.progress
    ranks = ranks or Ranks()
    while progress.step < config.steps and not guard.lost(progress):
        clock = time.perf_counter()
        rate = learning_rate(config, progress.step)
        for group in optimiser.param_groups:
            group["lr"] = rate
        batch = state.batches.draw()
        optimiser.zero_grad(set_to_none=True)
        loss, passes = gradient(config, state, batch, ranks)
        measured = guard.check(model, optimiser, loss, progress, passes)
        norm = guard.norm(model)
        nn.utils.clip_grads_with_norm_(model.parameters(), config.clip, norm)
        optimiser.step()

        progress.step += 1
        if state.average is not None and not progress.in_a_row():  # of applied steps alone
            state.average.update_parameters(model)
        seconds = max(time.perf_counter() - clock, 1e-9)  # a coarse clock may stand still
        yield {
            "step": progress.step,
            "loss": loss,
            "lr": rate,
            "gradient_norm": float(full(norm)),
            **measured,
            "refused": progress.refused,
            "tokens_per_second": batch[-1].numel() / seconds,
        }


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of step 0, 1, …: linear warm-up, then a cosine to `final_lr` of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def rehearse(
    config: TrainConfig,
    state: State,
    ranks: Ranks,
    held_out: tuple[Tensor, Tensor],
) -> None:
    """Make one gradient and drop it: an estimator that cannot work with the solver says so now.

    **Raises:** `RuleError`, before the run's folder is made.
    """
    model = state.model
    ids, targets = (t[:1].to(next(model.parameters()).device) for t in held_out)
    with autocast(config, ids.device):
        loss = state.loss(model, (ids, targets))
    loss.backward()
    if config.stabiliser and ranks.size * config.accumulate > 1:  # as on a part of a batch
        with ranks.added(model), seeing(Part(0, 1, 2)):
            own = config.stabiliser.init(torch.Generator().manual_seed(0))
            config.stabiliser.apply(model, own, 0)
    model.zero_grad(set_to_none=True)


def pick_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is the accelerator if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(own_device(name))
        float(torch.zeros((), device=device))  # which a device without values cannot give
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here ({reason}): try cpu") from None
    return device


def draw_curves(folder: Path, display: Display) -> None:
    """Draw the run's curves, or say why not: a run without a picture is a whole run."""
    try:
        plot_run(folder)
    except (ConfigError, CheckpointError, OSError) as error:
        display.note(f"no curves: {error}")


def write_sample(
    model: LanguageModel,
    corpus: Corpus,
    config: TrainConfig,
    device: torch.device,
    display: Display,
) -> str:
    """Return text that the model writes after the tokenizer's `opening`."""
    if not config.sample:
        return ""
    tokenizer = corpus.tokenizer
    ids = torch.as_tensor(tokenizer.opening().astype("int64")).unsqueeze(0).to(device)
    generator = torch.Generator().manual_seed(config.seed)
    try:
        out = generate(model, ids, config.sample, temperature=0.8, generator=generator)
    except ConvergenceError as error:
        display.note(f"no sample: {error}")
        return ""
    return tokenizer.decode(out[0, ids.shape[1] :].cpu().numpy())

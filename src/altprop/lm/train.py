"""The training loop: one function that reads from top to bottom and knows no rule by name."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from altprop import (
    Certificate,
    ConfigError,
    ConvergenceError,
    Result,
    convert,
    equilibria,
)
from altprop.errors import suggest
from altprop.lm.display import Display
from altprop.lm.model import GPT, EquilibriumLM, LanguageModel, generate
from altprop.lm.report import plot_run
from altprop.lm.run import Progress, Run
from altprop.lm.settings import TrainConfig
from altprop.lm.text import Batches, CharTokenizer, Corpus, check_context, load_corpus, windows


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with; losses are validation cross-entropies in nats per token."""

    folder: Path
    loss: float
    best_loss: float
    refused: int
    sample: str


def train(config: TrainConfig) -> TrainResult:
    """Train a language model, keep the run in a folder, and return what came of it.

    Writes into the run's folder `config.yaml`, `vocab.json`, `metrics.jsonl`, `best.safetensors`,
    `last.safetensors` and `curves.png`.

    **Raises:** `DataError`, `ConfigError`, `CheckpointError` before anything is written;
    `ConvergenceError` if a step fails under `on_failure="stop"`; `KeyboardInterrupt` after saving.
    """
    corpus = load_corpus(config.data)
    check_context(corpus, config.context)
    device = pick_device(config.device)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = build_model(config, len(corpus.tokenizer)).to(device)
    optimiser = make_optimiser(model, config)
    batches = Batches(
        corpus.train, config.batch, config.context, torch.Generator().manual_seed(config.seed)
    )
    held_out = windows(corpus.validation, config.eval_windows, config.context, seed=0)
    guard = Guard(config, torch.Generator().manual_seed(config.seed + 1))
    rehearse(model, held_out, device)

    run = Run.open(config, corpus)
    progress = run.restore(model, optimiser, batches, guard.state) if config.resume else Progress()
    with run, Display(config.steps, progress.step) as display, interruptible() as interrupted:
        display.note(
            f"{corpus.description}: {len(corpus.train):,} tokens, vocabulary of "
            f"{len(corpus.tokenizer)}\n"
            f"{count_parameters(model):,} parameters; run folder {run.folder}"
        )
        while progress.step < config.steps and not interrupted():
            clock = time.perf_counter()
            rate = learning_rate(config, progress.step)
            for group in optimiser.param_groups:
                group["lr"] = rate
            ids, targets = (t.to(device) for t in batches.draw())
            optimiser.zero_grad(set_to_none=True)
            _, loss = model(ids, targets)
            loss.backward()
            measured = guard.check(model, optimiser, float(loss.detach()), progress)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimiser.step()

            progress.step += 1
            seconds = time.perf_counter() - clock
            record = {
                "step": progress.step,
                "loss": float(loss.detach()),
                "lr": rate,
                "gradient_norm": float(norm),
                **measured,
                "refused": progress.refused,
                "tokens_per_second": ids.numel() / seconds,
            }
            run.log(record)
            display.step(record)
            if progress.step % config.eval_every == 0 or progress.step == config.steps:
                progress.loss, residual = evaluate(model, held_out, config.batch, device)
                run.log(
                    {
                        "step": progress.step,
                        "validation_loss": progress.loss,
                        "validation_free_residual": residual,
                    }
                )
                display.evaluation(progress.step, progress.loss)
                if progress.loss < progress.best_loss:
                    progress.best_loss = progress.loss
                    run.save("best", model, None, batches, guard.state, progress)
                run.save("last", model, optimiser, batches, guard.state, progress)
        if progress.step < config.steps:
            run.save("last", model, optimiser, batches, guard.state, progress)

    draw_curves(run.folder, display)
    if progress.step < config.steps:
        display.note(
            f"stopped after step {progress.step} of {config.steps}; go on with\n"
            f"  altprop train {run.resume_options()}"
        )
        raise KeyboardInterrupt
    text = write_sample(model, corpus, config, device, display)
    display.finish(progress.loss, progress.best_loss, progress.refused, text, run.folder)
    return TrainResult(run.folder, progress.loss, progress.best_loss, progress.refused, text)


def build_model(config: TrainConfig, vocabulary: int) -> LanguageModel:
    """Return the untrained model of a run, its learning rules in place and frozen what is frozen.

    **Raises:** `RuleError` for rules that do not fit the model, `ConfigError` for a pattern that
    freezes nothing and for patterns that leave nothing to learn.
    """
    model = _BUILD[config.model](config, vocabulary)
    for pattern in config.freeze:
        frozen = [p for name, p in model.named_parameters() if fnmatchcase(name, pattern)]
        if not frozen:
            names = [name for name, _ in model.named_parameters()]
            raise ConfigError(
                f"freeze: no parameter is named {pattern!r}: {suggest(pattern, names)}"
            )
        for parameter in frozen:
            parameter.requires_grad_(False)
    if count_parameters(model) == 0:
        raise ConfigError(
            f"freeze: {', '.join(map(repr, config.freeze))} leaves no parameter to learn: freeze a "
            "part of the model, such as 'block.*' or 'head.*'"
        )
    return model


def _equilibrium(config: TrainConfig, vocabulary: int) -> EquilibriumLM:
    # the guard of the loop judges failed solves
    return EquilibriumLM(config.shape(vocabulary), config.solver, config.estimator, "accept")


def _gpt(config: TrainConfig, vocabulary: int) -> GPT:
    model = GPT(config.shape(vocabulary))
    rules = config.rules or config.rule
    return convert(model, rules, output="head", seed=config.seed, batch_axis=0) if rules else model


_BUILD: dict[str, Callable[[TrainConfig, int], LanguageModel]] = {
    "equilibrium": _equilibrium,
    "gpt": _gpt,
}


def make_optimiser(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices, learned feedback too, and none on vectors."""
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learning if p.dim() > 1]
    vectors = [p for p in learning if p.dim() <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of step 0, 1, …: linear warm-up, then a cosine to `final_lr` of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def rehearse(model: LanguageModel, held_out: tuple[Tensor, Tensor], device: torch.device) -> None:
    """Make one gradient and drop it: an estimator that cannot work with the solver says so now.

    **Raises:** `RuleError`, before the run's folder is made.
    """
    ids, targets = (t[:1].to(device) for t in held_out)
    model(ids, targets)[1].backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def evaluate(
    model: LanguageModel, held_out: tuple[Tensor, Tensor], batch: int, device: torch.device
) -> tuple[float, float]:
    """Return the mean cross-entropy over fixed windows, and their worst free residual."""
    total, worst = 0.0, 0.0
    ids, targets = held_out
    for x, y in zip(ids.split(batch), targets.split(batch), strict=True):
        _, loss = model(x.to(device), y.to(device))
        total += float(loss) * len(x)
        worst = max([worst, *(float(c.free_residual.max()) for c in certificates(model))])
    return total / len(ids), worst


def certificates(model: nn.Module) -> list[Certificate]:
    """Return what the equilibria of `model` measured in their last call."""
    return [block.certificate for _, block in equilibria(model) if block.certificate is not None]


class Guard:
    """Judges every step's gradient before it is applied, and lets the stabiliser act."""

    def __init__(self, config: TrainConfig, generator: torch.Generator) -> None:
        self._config = config
        self.state = config.stabiliser.init(generator) if config.stabiliser else None

    def check(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, loss: float, progress: Progress
    ) -> dict[str, float]:
        """Refuse a gradient of a state that is none, and return what was measured of this step."""
        seen = certificates(model)
        measured = summary(seen)
        config = self._config
        finite = math.isfinite(loss)
        good = finite and all(self._settled(c) for c in seen)
        if not good:
            self._refuse(
                f"the loss is {loss:.4g}, the free residual "
                f"{measured.get('free_residual', 0.0):.1e} (limit {config.free_limit:.0e}), "
                f"the adjoint residual {measured.get('adjoint_residual', 0.0):.1e} (limit "
                f"{config.adjoint_limit:.0e})",
                optimiser,
                progress,
            )
        if config.stabiliser and finite:
            measured |= config.stabiliser.apply(model, self.state, progress.step, urgent=not good)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            if good:
                self._refuse(f"the gradient's norm is {float(norm)}", optimiser, progress)
            optimiser.zero_grad(set_to_none=True)
        return measured

    def _settled(self, seen: Certificate) -> bool:
        """Tell whether a state and its adjoint are within the limits.

        Who asks for a fixed number of steps asks for no residual: there is none to fall short of.
        """
        limits = self._config.free_limit, self._config.adjoint_limit
        return all(
            residual is None or result is Result.FIXED_TIME or float(residual.max()) <= limit
            for result, residual, limit in (
                (seen.result, seen.free_residual, limits[0]),
                (seen.adjoint_result, seen.adjoint_residual, limits[1]),
            )
        )

    def _refuse(self, why: str, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
        if self._config.on_failure == "stop":
            raise ConvergenceError(
                f"step {progress.step + 1}: {why}; lower lr, stabilise, or write --on_failure skip"
            )
        progress.refused += 1
        optimiser.zero_grad(set_to_none=True)


def summary(seen: list[Certificate]) -> dict[str, float]:
    """Return the worst residuals and the sums of evaluations over a model's certificates."""
    if not seen:
        return {}
    out = {
        "free_residual": max(float(c.free_residual.max()) for c in seen),
        "free_evaluations": float(sum(c.free_evaluations for c in seen)),
        "adjoint_evaluations": float(sum(c.adjoint_evaluations for c in seen)),
    }
    for name in ("adjoint_residual", "nudged_residuals", "antisymmetry", "response", "beta"):
        values = [getattr(c, name) for c in seen if getattr(c, name) is not None]
        if values:
            out[name] = max(float(v.max()) for v in values)
    return out


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def pick_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is the accelerator if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        float(torch.zeros((), device=device))  # which a device without values cannot give
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here ({reason}): try cpu") from None
    return device


def draw_curves(folder: Path, display: Display) -> None:
    """Draw the run's curves, or say why not: a run without matplotlib is a whole run."""
    try:
        plot_run(folder)
    except ConfigError as error:
        display.note(f"no curves: {error}")


def opening(tokenizer: CharTokenizer) -> str:
    """Return what a text may start after: a line break, or else a space, or else any character."""
    return next((mark for mark in "\n " if mark in tokenizer.vocab), tokenizer.vocab[0])


def write_sample(
    model: LanguageModel,
    corpus: Corpus,
    config: TrainConfig,
    device: torch.device,
    display: Display,
) -> str:
    """Return text that the model writes after the `opening` of its vocabulary."""
    if not config.sample:
        return ""
    tokenizer = corpus.tokenizer
    ids = torch.as_tensor(tokenizer.encode(opening(tokenizer)).astype("int64"))
    ids = ids.unsqueeze(0).to(device)
    generator = torch.Generator().manual_seed(config.seed)
    try:
        out = generate(model, ids, config.sample, temperature=0.8, generator=generator)
    except ConvergenceError as error:
        display.note(f"no sample: {error}")
        return ""
    return tokenizer.decode(out[0, 1:].cpu().numpy())


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C ask for a stop after the current step; a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)

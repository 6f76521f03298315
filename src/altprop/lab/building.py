"""What a configuration builds: the model with its rules, its average, and the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from altprop import ConfigError, Equilibrium, convert
from altprop.errors import suggest
from altprop.lab.settings import TrainConfig
from altprop.lm.model import GPT, Block, EquilibriumLM, LanguageModel
from altprop.lm.text import Batches, Corpus


def drawn(config: TrainConfig, corpus: Corpus) -> tuple[LanguageModel, Batches]:
    """Return what a run's seed draws: its untrained model, on the CPU, and its batches to come.

    **Raises:** as `build_model`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = build_model(config, len(corpus.tokenizer))
    generator = torch.Generator().manual_seed(config.seed)
    return model, Batches(corpus.train, config.batch, config.context, generator)


def build_model(config: TrainConfig, vocabulary: int) -> LanguageModel:
    """Return the untrained model of a run, its learning rules in place and frozen what is frozen.

    **Raises:** `RuleError` for rules that do not fit the model, `ConfigError` for a pattern that
    freezes nothing and for patterns that leave nothing to learn.
    """
    model = _BUILD[config.model](config, vocabulary)
    freeze(model, config.freeze)
    return model


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let the parameters that name patterns match learn nothing.

    **Raises:** `ConfigError` for a pattern that matches none, and if nothing is left to learn.
    """
    for pattern in patterns:
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
            f"freeze: {', '.join(map(repr, patterns))} leaves no parameter to learn: freeze a "
            "part of the model, such as 'block.*' or 'head.*'"
        )


def _equilibrium(config: TrainConfig, vocabulary: int) -> EquilibriumLM:
    # the guard of the loop judges failed solves
    return EquilibriumLM(config.shape(vocabulary), config.solver, config.estimator, "accept")


def _gpt(config: TrainConfig, vocabulary: int) -> GPT:
    model = GPT(config.shape(vocabulary), config.checkpointing)
    rules = config.rules or config.rule
    if not rules:
        return model
    axis = 0 if _broadcasts(config) else None
    return convert(model, rules, output="head", seed=config.seed, batch_axis=axis)


def _broadcasts(config: TrainConfig) -> bool:
    """Tell whether some rule sends the error straight to a place inside the model."""
    listed = [config.rule, *config.rules.values()]
    return any(rule is not None and rule.seam == "broadcast" for rule in listed)


def gathered_alone(config: TrainConfig, model: nn.Module) -> list[nn.Module]:
    """Return the parts of a sharded model whose weights are gathered when they are called.

    A block is gathered again when its output's gradient arrives, before which an error that is
    broadcast has reached it: then all weights are gathered with the model's.
    """
    if _broadcasts(config):
        return []
    return [m for m in model.modules() if isinstance(m, Block | Equilibrium)]


_BUILD: dict[str, Callable[[TrainConfig, int], LanguageModel]] = {
    "equilibrium": _equilibrium,
    "gpt": _gpt,
}


def averaged(model: nn.Module, config: TrainConfig) -> AveragedModel | None:
    """Return the average of a run's weights, a copy of the model that learns nothing by itself."""
    if config.ema == 0:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))


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


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)

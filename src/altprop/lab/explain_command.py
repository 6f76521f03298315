"""Show which signal reaches every parameter of a configured model."""

from __future__ import annotations

from rich.console import Console

from altprop import ConfigError, explain
from altprop.lab.building import build_model
from altprop.lab.corpus import corpus_of
from altprop.lab.settings import TrainConfig
from altprop.terminal import printable


def explain_run(config: TrainConfig) -> None:
    """Print, for every parameter, the rule and the signal that reaches it, without training.

    **Raises:** `ConfigError` for a GPT without a rule: everything in it is backprop's.
    """
    if config.model == "gpt" and not (config.rule or config.rules):
        raise ConfigError(
            "nothing to explain: no rule was given, for example --model gpt --rule SignSymmetry"
        )
    model = build_model(config, len(corpus_of(config).tokenizer))
    table = printable(str(explain(model)), keep="\n")
    Console(highlight=False).print(table, markup=False, emoji=False, soft_wrap=True)

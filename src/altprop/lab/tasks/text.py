"""Text: a GPT, or an equilibrium, that predicts the next token of a corpus."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from altprop import Implicit
from altprop.lab.building import build_model
from altprop.lab.corpus import corpus_of
from altprop.lab.evaluation import evaluate
from altprop.lab.settings import TrainConfig
from altprop.lab.state import Batch, Stream
from altprop.lab.tasks.task import AbstractTask, Part
from altprop.lab.train import predicted
from altprop.lm.text import Batches, Corpus, check_length, windows
from altprop.lm.text.token_file import Tokens


@dataclass(frozen=True)
class Text(AbstractTask):
    """Predict the next token of a text; the score is the cross-entropy of held-out windows.

    Rates are searched on the first half of what is held out, and results are of the other. It is
    trained by the recipe of `altprop train`, its schedule and its stabiliser.

    **Arguments:** `data`, a corpus as `altprop train` takes it; `kind`, the model; `layers`,
    `d_model`, `heads`, `context`, `batch`, `tokenizer`: as in `TrainConfig`.
    """

    data: str = "plays"
    kind: Literal["gpt", "equilibrium"] = "gpt"
    layers: int | None = None
    d_model: int = 128
    heads: int = 4
    context: int = 64
    batch: int = 16
    tokenizer: str | None = None

    name: ClassVar[str] = "text"
    score_name: ClassVar[str] = "cross-entropy"
    unit: ClassVar[str] = "nats"
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    output: ClassVar[str | None] = "head"

    def __post_init__(self) -> None:
        self.recipe.shape(vocabulary=1)  # refuses a shape that no model can have

    @property
    def hidden(self) -> tuple[str, ...]:  # type: ignore[override]
        """The blocks, or the equilibrium."""
        return ("blocks.*",) if self.kind == "gpt" else ("block.*",)

    @property
    def source(self) -> str:
        return self.corpus.description

    @property
    def chance(self) -> float | None:
        return math.log(len(self.corpus.tokenizer))

    @property
    def recipe(self) -> TrainConfig:
        # exact, so that what stands beside the estimators is none of them
        exact: dict[str, Any] = (
            {"estimator": Implicit(tol=1e-4)} if self.kind == "equilibrium" else {}
        )
        return TrainConfig(
            data=self.data, model=self.kind, layers=self.layers, d_model=self.d_model,
            heads=self.heads, context=self.context, batch=self.batch, tokenizer=self.tokenizer,
            device="cpu", **exact,
        )  # fmt: skip

    @cached_property
    def corpus(self) -> Corpus:
        """The text, tokenised."""
        corpus = corpus_of(self.recipe)
        half = len(corpus.validation) // 2
        check_length(f"half of the held-out part of {corpus.name}", half, self.context)
        return corpus

    def network(self) -> nn.Module:
        return build_model(self.recipe, len(self.corpus.tokenizer))

    def batches(self, seed: int) -> Stream:
        drawn = torch.Generator().manual_seed(seed)
        return Batches(self.corpus.train, self.batch, self.context, drawn)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return predicted(model, batch)

    def held(self, part: Part) -> Tokens:
        """Return the tokens that a part's windows are of."""
        tokens = self.corpus.validation
        half = len(tokens) // 2
        return tokens[:half] if part == "validation" else tokens[half:]

    def score(self, model: nn.Module, part: Part) -> float:
        held = windows(self.held(part), self.recipe.eval_windows, self.context, seed=0)
        return evaluate(model, held, self.batch, torch.device("cpu")).loss

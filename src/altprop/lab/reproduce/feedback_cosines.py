"""Feedback alignment inside a language model: where its gradient points the right way."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import islice
from statistics import fmean

import torch

from altprop import FeedbackAlignment, Installed, Trial, audit_trials
from altprop.lab.reproduce.figure import Figure, known
from altprop.lab.settings import TrainConfig
from altprop.lab.train import begin, steps
from altprop.lm.text import Batches, load_corpus

STEPS = 300
PARTS = {
    "Q, K, V": ("q_proj", "k_proj", "v_proj"),
    "feed-forward": ("up_proj", "down_proj"),
    "next to the loss": ("head.",),
}


def measure(seed: int) -> Mapping[str, float]:
    """Return the mean cosine of each kind of weight after `STEPS` steps by feedback alignment."""
    config = TrainConfig(
        model="gpt", layers=1, rule=FeedbackAlignment(), steps=STEPS, seed=seed, device="cpu"
    )
    corpus = load_corpus(config.data)
    state, guard = begin(config, corpus)
    for _ in islice(steps(config, state, guard), STEPS):
        pass
    generator = torch.Generator().manual_seed(seed + 1)
    batch = Batches(corpus.train, 64, config.context, generator).draw()
    model = copy.deepcopy(state.model)
    trial = Trial(model, lambda: model(*batch)[1], "a batch")
    exact = Installed(exact=True, name="backprop")
    (row,) = audit_trials([trial], [Installed(name="rule")], exact, repeats=0).rows
    return {
        part: fmean(
            known(found.figures["cosine"].mean)
            for name, found in row.parameters.items()
            if name.endswith("weight") and any(key in name for key in keys)
        )
        for part, keys in PARTS.items()
    }


FIGURE = Figure(
    title="The cosines of feedback alignment inside a transformer block",
    source="Lab notes on feedback alignment in a language model's block",
    setting=f"A GPT of one block (C = 128, T = 64) on the plays, {STEPS} steps by feedback "
    "alignment in every linear map; cosine to backprop at the weights reached, over 64 windows",
    unit="cosine",
    published={"Q, K, V": 0.25, "feed-forward": -0.01, "next to the loss": 1.0},
    measure=measure,
    differs="The width, the text and the step at which the notes measured are not known",
    seeds=5,
)

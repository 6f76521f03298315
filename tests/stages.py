"""One process of a pipeline: `python stages.py INDEX FOLDER`, which `test_pipeline.py` starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed

import altprop as ap
from altprop.lab import pipeline
from altprop.lab.checkpoint import Checkpoint, collect
from altprop.lab.evaluation import evaluate
from altprop.lab.pipeline import begin_stage
from altprop.lab.ranks import Ranks
from altprop.lab.settings import TrainConfig
from altprop.lab.state import State
from altprop.lab.train import begin, steps, train
from altprop.lm.model import generate
from altprop.lm.text import load_corpus, windows
from lm_runs import small

COUNT = 4  # processes; the runs of two stages take the first two
CASES: dict[str, dict[str, Any]] = {
    "2 block": {"layers": 2, "rule": ap.DirectFeedback("block"), "batch": 8},
    "2 sublayer": {
        "layers": 3,
        "rule": ap.DirectFeedback("sublayer", error="head_input", feedback="independent"),
        "ema": 0.9,
        "clip": 0.1,
        "freeze": ("blocks.2.*", "norm.*"),
    },
    "4 block": {"layers": 5, "rule": ap.DirectFeedback("block", init="orthogonal"), "clip": 0.1},
    "4 frozen": {"layers": 4, "rule": ap.DirectFeedback("block"), "freeze": ("blocks.1.*",)},
}
WAIT = timedelta(seconds=60)


def config(folder: Path, name: str) -> TrainConfig:
    return small(folder / "run", model="gpt", steps=10, **CASES[name])


def run(out: Path) -> TrainConfig:
    """Return a run of the command, of eight steps."""
    rule = ap.DirectFeedback("block")
    return small(out, model="gpt", layers=3, rule=rule, warmup=8, sample=20, ema=0.5)


@contextmanager
def float64() -> Iterator[None]:
    """Make models of float64; an optimiser's step counts stay float32."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def group(index: int, count: int, store: Path) -> Iterator[None]:
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=index, world_size=count, timeout=WAIT
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


def held(state: State) -> Checkpoint:
    """Return what a run's checkpoint has of the model's state; of stages only the first has it."""
    extra, average = state.drawn(), None
    if state.average is not None:
        extra["averaged"], average = state.average.n_averaged, state.judged
    groups: dict[str, Any] = {name: {} for name in ("model", "training", "optimiser", "extra")}
    for name, tensor in state.whole(collect(state.model, state.optimiser, extra, average)).items():
        group, _, key = name.partition(".")
        groups[group][key] = tensor
    return Checkpoint(**groups, notes={"progress": dict(vars(state.progress))})


def equal(folder: Path, name: str) -> dict[str, Any]:
    """Run a case in stages and in one process, the halves of a run of either by the other too."""
    own = config(folder, name)
    corpus, ranks = load_corpus(own.data), Ranks(distributed.group.WORLD)
    with float64():
        state, guard = begin_stage(own, corpus, ranks)
        alone, alone_guard = begin(own, corpus)
        other, other_guard = begin(own, corpus)
    wanted, made = steps(own, alone, alone_guard), steps(own, state, guard)
    found = {"wanted records": [next(wanted) for _ in range(5)]}
    middle = held(alone)
    found["wanted records"] += wanted
    found |= {"wanted": held(alone), "records": [next(made) for _ in range(5)]}
    half = held(state)
    found["records"] += made
    found["found"] = held(state)
    found["parameters"] = state.parameters()
    held_out = windows(corpus.validation, 6, own.context, seed=0)
    found["evaluations"], found["texts"] = [], []
    for one in (state, alone):
        judged = one.judged
        seen = evaluate(judged, held_out, 4, torch.device("cpu"))
        found["evaluations"].append(seen.loss)
        start, draw = torch.zeros(2, 3, dtype=torch.long), torch.Generator().manual_seed(0)
        found["texts"].append(generate(judged.eval(), start, 2 * own.context, generator=draw))
        judged.train()
    if ranks.leads:
        other.restore(half, folder)
        found["resumed records"] = list(steps(own, other, other_guard))
        found["resumed"] = held(other)
    state.restore(middle, folder)
    list(steps(own, state, guard))
    return found | {"back": held(state)}


def messages(folder: Path, name: str) -> list[tuple[str, int, int]]:
    """Return what this stage sends in a step: how, to or from whom, and how many bytes."""
    own = config(folder, name)
    seen: list[tuple[str, int, int]] = []

    def isend(tensor: Tensor, to: int, **kwargs: Any) -> Any:
        seen.append(("sent", to, tensor.nbytes))
        return distributed.isend(tensor, to, **kwargs)

    def broadcast(tensor: Tensor, src: int, **kwargs: Any) -> Any:
        seen.append(("broadcast", src, tensor.nbytes))
        return distributed.broadcast(tensor, src, **kwargs)

    state, _ = begin_stage(own, load_corpus(own.data), Ranks(distributed.group.WORLD))
    counting = SimpleNamespace(isend=isend, irecv=distributed.irecv, broadcast=broadcast)
    with mock.patch.object(pipeline, "distributed", counting):
        state.loss(state.model, state.batches.draw())
    return seen


def independent(folder: Path) -> bool:
    """Let the last stage's backward pass wait until the first stage has ended its own."""
    own = config(folder, "2 block")
    state, _ = begin_stage(own, load_corpus(own.data), Ranks(distributed.group.WORLD))
    state.loss = pipeline.Pipeline(1)
    store = distributed.FileStore(str(folder / "done"), 2)
    first = distributed.get_rank() == 0
    last_made = state.model.tokens.weight if first else next(state.model.blocks.parameters())
    act = (lambda _: store.set("done", "")) if first else (lambda _: store.wait(["done"], WAIT))
    last_made.register_post_accumulate_grad_hook(act)
    state.loss(state.model, state.batches.draw())
    return True


def main(index: int, folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with group(index, COUNT, folder / "four"):
        for name in ("4 block", "4 frozen"):
            found[name] = equal(folder, name)
        found["messages"] = messages(folder, "4 block")
    if index < 2:
        with group(index, 2, folder / "two"):
            for name in ("2 block", "2 sublayer"):
                found[name] = equal(folder, name)
            found["independent"] = independent(folder)
            os.environ |= {"WORLD_SIZE": "2", "RANK": str(index)}
            for name, more in (("staged", {"steps": 4}), ("taken", {"resume": True})):
                train(replace(run(folder / name), parallel="pipeline", **more))
    torch.save(found, folder / f"{index}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

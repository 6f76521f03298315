"""Training throughput: `altprop train` against a bare loop, and a whole equilibrium step's parts.

    python benchmarks/throughput.py --data tinyshakespeare.txt

**The loop.** Every step of `altprop train` is followed by a step of a hand-written loop on the same
model (rate, batch, forward, backward, stabiliser, clipping, AdamW and nothing else), in one
process; a ratio is the median over these pairs. What `altprop train` adds is the guard, metrics and
display. With one thread a time is the process's own, as in the other benchmarks.

**A whole step.** The language model of one equilibrium block, warmed by a short run, against a GPT
of one ordinary block by backprop: interleaved, every arm once a round in random order.

**Start-up.** Seconds of `altprop --help`, and from the command to the first step of `altprop
train`, each in a process of its own.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import altprop as ap
from altprop.lab.building import build_model, make_optimiser
from altprop.lab.run import Run
from altprop.lab.sample_command import load_run
from altprop.lab.settings import TrainConfig
from altprop.lab.timing import now
from altprop.lab.train import learning_rate, train
from altprop.lm.blocks import STABILISER
from altprop.lm.model import LanguageModel, generate
from altprop.lm.text import Batches, Corpus, load_corpus
from common import markdown, write

GPT = {"model": "gpt"}
LOOPS: dict[str, dict[str, Any]] = {
    "gpt, backprop": GPT,
    "gpt, feedback alignment": {**GPT, "rule": ap.FeedbackAlignment()},
    "gpt, sign symmetry": {**GPT, "rule": ap.SignSymmetry()},
    "gpt, DFA every matrix": {**GPT, "rule": ap.DirectFeedback()},
    "gpt, DFA blocks": {**GPT, "rule": ap.DirectFeedback(granularity="block")},
    "equilibrium, AEP": {},
    "equilibrium, Implicit": {"estimator": ap.Implicit()},
}
STEPS: dict[str, dict[str, Any]] = {
    "AEP with stabiliser": {},
    "AEP, stabiliser every fourth step": {"stabiliser": replace(STABILISER, every=4)},
    "AEP without stabiliser": {"stabiliser": None},
    "Implicit with stabiliser": {"estimator": ap.Implicit()},
    "OneStep with stabiliser": {"estimator": ap.OneStep()},
    "AEP with stabiliser, as before": {
        "estimator": ap.AEP(),
        "solver": ap.Anderson(),
        "stabiliser": ap.JacobianHinge(0.3, None, weight=1.0, power=0, per="batch"),
    },
}


class Loop:
    """A hand-written training loop; a call makes one step of it."""

    def __init__(self, model: LanguageModel, config: TrainConfig, corpus: Corpus) -> None:
        self.model, self.config, self.step = model, config, 0
        self.optimiser = make_optimiser(model, config)
        generator = torch.Generator().manual_seed(config.seed)
        self.batches = Batches(corpus.train, config.batch, config.context, generator)
        own = torch.Generator().manual_seed(1)
        self.state = config.stabiliser.init(own) if config.stabiliser else None

    def __call__(self) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        ids, targets = self.batches.draw()
        self.optimiser.zero_grad(set_to_none=True)
        _, loss = self.model(ids, targets)
        loss.backward()
        if self.config.stabiliser is not None:
            self.config.stabiliser.apply(self.model, self.state, self.step)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimiser.step()
        self.step += 1


def seconds(work: Callable[[], object]) -> float:
    start = now("cpu")
    work()
    return now("cpu") - start


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def loop(name: str, data: str, steps: int) -> dict[str, Any]:
    """Return an arm's tokens per second in `altprop train` and in the bare loop, and their ratio.

    The first five pairs warm up and are not counted. The bare step is made inside the call that
    logs a step, so a step of `altprop train` lasts from the end of one to the next.
    """
    corpus = load_corpus(data)
    own: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            data=data, steps=steps, eval_every=steps, eval_windows=1, final_windows=1,
            sample=0, out=Path(folder) / "run", **LOOPS[name],
        )  # fmt: skip
        torch.manual_seed(config.seed)
        beside = Loop(build_model(config, len(corpus.tokenizer)), config, corpus)
        mark = 0.0
        log = Run.log

        def timed(run: Run, record: dict[str, Any]) -> None:
            nonlocal mark
            log(run, record)
            if "loss" not in record:
                return
            own.append(now("cpu") - mark)
            bare.append(seconds(beside))
            mark = now("cpu")

        with mock.patch.object(Run, "log", timed):
            train(config)
    own, bare = own[5:], bare[5:]
    low, ratio, high = quartiles([a / b for a, b in zip(own, bare, strict=True)])
    tokens = config.batch * config.context
    return {
        "tokens_per_second": tokens / statistics.median(own),
        "bare": tokens / statistics.median(bare),
        "ratio": ratio,
        "quartiles": [low, high],
    }


def warm(data: str, steps: int) -> tuple[LanguageModel, Corpus]:
    """Return the default model after a short run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train(
            TrainConfig(
                data=data, steps=steps, eval_every=steps, final_windows=1, sample=0, out=out
            )
        )
        model, _ = load_run(out, "last", "cpu")
    return model.train(), load_corpus(data)


def whole_step(
    model: LanguageModel, corpus: Corpus, rounds: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return each arm's milliseconds and ratio to the GPT's step, and tokens generated a second."""
    base = TrainConfig(lr=1e-6)  # so that the weights stay warm
    shape = replace(base, model="gpt", layers=1)
    vocabulary = len(corpus.tokenizer)
    ordinary = build_model(shape, vocabulary)
    arms: dict[str, Callable[[], None]] = {"GPT of one block": Loop(ordinary, shape, corpus)}
    loops = {}
    for name, options in STEPS.items():
        config = replace(base, **options)
        own = build_model(config, vocabulary)
        own.load_state_dict(model.state_dict())
        arms[name] = loops[name] = Loop(own, config, corpus)
    every = 4  # whole periods of the stabiliser, which acts every second or fourth step

    def period(step: Callable[[], None]) -> Callable[[], None]:
        return lambda: [step() for _ in range(every)] and None

    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name in random.sample(list(arms), len(arms)):
            spent = seconds(period(arms[name])) / every
            if number:
                times[name].append(spent)
    unit = times["GPT of one block"]
    rows: dict[str, Any] = {}
    for name, own in times.items():
        low, ratio, high = quartiles([a / b for a, b in zip(own, unit, strict=True)])
        rows[name] = {"ms": 1e3 * statistics.median(own), "ratio": ratio, "quartiles": [low, high]}
        if name in loops:
            (_, block), *_ = ap.equilibria(loops[name].model)
            seen = block.certificate
            assert seen is not None
            rows[name]["evaluations"] = [seen.free_evaluations, seen.adjoint_evaluations]
    generated = {}
    for name, network in {"gpt of one block": ordinary, "equilibrium": model}.items():
        prompt = torch.zeros(1, 1, dtype=torch.long)
        write_on = partial(generate, network.eval(), prompt, 60)
        spent = [seconds(write_on) for _ in range(9)]
        generated[name] = 60 / statistics.median(spent)
    return rows, generated


def startup(data: str, rounds: int) -> dict[str, float]:
    """Return the median seconds of `altprop --help`, and to the end of `altprop train`'s step 1."""
    altprop = [sys.executable, "-m", "altprop"]
    helps, firsts = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run([*altprop, "--help"], check=True, capture_output=True)
        helps.append(time.perf_counter() - start)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [*altprop, "train", "--data", data, "--out", str(out), "--steps", "1000"]
            start = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
                metrics = out / "metrics.jsonl"
                while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
                    time.sleep(0.01)
                firsts.append(time.perf_counter() - start)
                process.terminate()
    return {"help": statistics.median(helps), "first step": statistics.median(firsts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="plays", help="a corpus or a text file")
    parser.add_argument("--steps", type=int, default=45, help="of each training loop")
    parser.add_argument("--warm", type=int, default=300, help="steps that warm the weights")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loops = {name: loop(name, options.data, options.steps) for name in LOOPS}
    model, corpus = warm(options.data, options.warm)
    steps, generated = whole_step(model, corpus, options.rounds)
    starts = startup(options.data, 5)
    parts = [
        "A step of `altprop train` in units of a bare loop's step (target: at most 1.05).",
        markdown(
            ["model", "tokens/s", "bare loop", "ratio", "quartiles"],
            [
                [
                    name,
                    f"{row['tokens_per_second']:.0f}",
                    f"{row['bare']:.0f}",
                    f"{row['ratio']:.3f}",
                    "–".join(f"{q:.3f}" for q in row["quartiles"]),
                ]
                for name, row in loops.items()
            ],
        ),
        f"A whole training step (16 × 64 tokens, C = 128) from weights of {options.warm} steps, in "
        "units of a GPT of one block by backprop (target of AEP with stabiliser: at most 4).",
        markdown(
            ["step", "ms", "ratio", "quartiles", "evaluations, free + adjoint"],
            [
                [
                    name,
                    f"{row['ms']:.1f}",
                    f"{row['ratio']:.2f}",
                    "–".join(f"{q:.2f}" for q in row["quartiles"]),
                    " + ".join(map(str, row.get("evaluations", ["–"]))),
                ]
                for name, row in steps.items()
            ],
        ),
        "Generation, tokens per second with the exact cache: "
        + ", ".join(f"{name} {speed:.0f}" for name, speed in generated.items())
        + ".",
        f"`altprop --help` {starts['help']:.2f} s (target 0.5); first training step "
        f"{starts['first step']:.1f} s after the command (target 10).",
    ]
    data = {"loops": loops, "steps": steps, "generation": generated, "start": starts}
    write("throughput", "Training throughput", parts, data)


if __name__ == "__main__":
    main()

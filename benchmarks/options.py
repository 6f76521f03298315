"""What the options of speed and memory cost: a step with each, beside one without.

    python benchmarks/options.py --data tinyshakespeare.txt

Every arm makes steps of the loop of `altprop train` from the same start, interleaved in random
order in one process; a ratio is the median over rounds of pairs. With one thread a time is the
process's own. Memory is the peak of live tensors during a step. With `--threads`
one and two threads are timed by the wall clock, where nothing else runs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from altprop.auditing.memory import peak_live_bytes
from altprop.lab.settings import TrainConfig
from altprop.lab.speed import compile_parts
from altprop.lab.timing import now
from altprop.lab.train import begin, steps
from altprop.lm.text import Corpus, load_corpus
from common import markdown, write

MODELS: dict[str, dict[str, Any]] = {"gpt": {"model": "gpt"}, "equilibrium": {}}
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "--dtype bf16": {"dtype": "bf16"},
    "--accumulate 4": {"accumulate": 4},
    "--checkpointing": {"checkpointing": True},
    "--compile": {"compile": True},
}


def arm(corpus: Corpus, data: str, options: dict[str, Any]) -> Iterator[Any]:
    """Return what makes a step of a run with these options, each time it is asked."""
    config = TrainConfig(data=data, steps=10_000, device="cpu", **options)
    state, guard = begin(config, corpus)
    compile_parts(state.model, config)
    return steps(config, state, guard)


def measured(corpus: Corpus, data: str, model: str, rounds: int) -> dict[str, Any]:
    """Return each arm's milliseconds, ratio to the plain run, and megabytes."""
    options = {n: o for n, o in ARMS.items() if model == "gpt" or "checkpointing" not in o}
    runs = {n: arm(corpus, data, {**MODELS[model], **o}) for n, o in options.items()}
    first = {}
    for name, run in runs.items():  # compilation, and the stabiliser's first steps
        start = time.perf_counter()
        next(run)
        first[name] = time.perf_counter() - start
        for _ in range(3):
            next(run)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            start = now("cpu")
            next(runs[name]), next(runs[name])  # the hinge acts on every second step
            times[name].append((now("cpu") - start) / 2)
    return {
        name: {
            "ms": 1e3 * statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, times["none"], strict=True)),
            "mib": peak_live_bytes(_two(runs[name])) / 2**20,
            "first": first[name],
        }
        for name, own in times.items()
    }


def _two(run: Iterator[Any]) -> Callable[[], None]:
    return lambda: [next(run), next(run)] and None


def threaded(corpus: Corpus, data: str, rounds: int) -> dict[int, float]:
    """Return the median milliseconds of a GPT's step by one and two threads, on the wall clock."""
    run, found = arm(corpus, data, MODELS["gpt"]), {}
    for count in (1, 2):
        torch.set_num_threads(count)
        own = []
        for _ in range(rounds + 2):
            start = time.perf_counter()
            next(run)
            own.append(1e3 * (time.perf_counter() - start))
        found[count] = statistics.median(own[2:])
    torch.set_num_threads(1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="plays", help="a corpus or a text file")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", action="store_true", help="time two threads as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpus = load_corpus(options.data)
    found = {name: measured(corpus, options.data, name, options.rounds) for name in MODELS}
    threads = threaded(corpus, options.data, options.rounds) if options.threads else {}
    rows = [
        [
            f"{model}, {name}",
            f"{row['ms']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['mib']:.0f}",
            f"{row['first']:.1f}",
        ]
        for model, arms in found.items()
        for name, row in arms.items()
    ]
    head = ["run, option", "ms", "ratio", "MiB", "seconds of the first step"]
    parts = [
        "A step of 16 × 64 tokens, C = 128; a GPT of four blocks and one equilibrium by AEP.",
        markdown(head, rows),
    ]
    if threads:
        both = " and ".join(f"{ms:.0f}" for ms in threads.values())
        parts.append(f"A GPT's step by one and two threads: {both} ms.")
    write("options", "Options of speed and memory", parts, {"steps": found, "threads": threads})


if __name__ == "__main__":
    main()

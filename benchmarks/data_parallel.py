"""Efficiency of DDP: a step of two processes against one of one process, with one thread each.

    python benchmarks/data_parallel.py            about two minutes on an idle machine
    python benchmarks/data_parallel.py --quick    a look

Both make the same step of the same joint batch, as `altprop train` does: forward, backward,
stabiliser, clipping, AdamW; the two processes half of the batch each. Every round makes one step of
either; a ratio is the median over rounds, with the quartiles.

**Efficiency** is `t₁ / (2 t₂)` of the times of a step, of one process and of two. By the clock it
holds on a machine whose cores are free; **by the processor's time**, `c₁ / c₂` with the time of all
threads of either or both processes, it says what the exchange and the smaller batches cost whatever
else the machine does, but not what the processes wait for each other.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from altprop.lab.ranks import Ranks
from altprop.lab.settings import TrainConfig
from altprop.lab.timing import Times, ratio
from altprop.lab.train import begin, steps
from altprop.lm.text import load_corpus
from common import markdown, write

CONFIGS: dict[str, TrainConfig] = {
    "GPT of four blocks, backprop": TrainConfig(model="gpt", batch=32),
    "equilibrium, AEP with its hinge": TrainConfig(batch=32),
}
WARM_UP = 3


def timed(made: Iterator[Any] | None) -> tuple[float, float]:
    """Return the seconds of a step by the clock, and those of the processors of both ranks."""
    distributed.barrier()
    start, spent = time.perf_counter(), time.process_time()
    if made is not None:
        next(made)
    spent = time.process_time() - spent
    distributed.barrier()
    found = torch.tensor([time.perf_counter() - start, spent], dtype=torch.float64)
    all_of = found[1:].clone()
    distributed.all_reduce(all_of)
    return float(found[0]), float(all_of)


def rank(index: int, store: str, name: str, rounds: int) -> None:
    """Be one of the two processes; the first one also makes the steps alone."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=2)
    config = replace(CONFIGS[name], steps=10_000, warmup=100)
    corpus, ranks = load_corpus(config.data), Ranks(distributed.group.WORLD)
    state, guard = begin(config, corpus, ranks)
    alone, alone_guard = begin(config, corpus)
    arms = {
        "two": steps(config, state, guard, ranks),
        "one": steps(config, alone, alone_guard) if index == 0 else None,
    }
    clock: Times = {arm: [] for arm in arms}
    spent: Times = {arm: [] for arm in arms}
    for number in range(rounds + WARM_UP):
        for arm, made in arms.items():
            seconds, processors = timed(made)
            if number >= WARM_UP:
                clock[arm].append(seconds)
                spent[arm].append(processors)
    if index == 0:
        both = {"clock": clock, "processor": spent}
        Path(f"{store}.json").write_text(json.dumps(both), encoding="utf-8")
    ranks._parallel = None
    del arms, state, guard, alone, made  # what holds the group must go before it
    gc.collect()
    distributed.destroy_process_group()


def measure(name: str, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        spawn(rank, args=(store, name, rounds), nprocs=2)
        both = json.loads(Path(f"{store}.json").read_text(encoding="utf-8"))
    found = {}
    for kind, share in (("clock", 2), ("processor", 1)):
        each = ratio(both[kind], "one", "two")
        found[kind] = [each.median / share, each.low / share, each.high / share]
    return {**found, "times": both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three rounds")
    rounds = 3 if parser.parse_args().quick else 11
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    data = {name: measure(name, rounds) for name in CONFIGS}
    rows = [
        [name, *(f"{m:.2f} ({low:.2f}–{high:.2f})" for m, low, high in map(one.get, KINDS))]
        for name, one in data.items()
    ]
    table = markdown(["model", "efficiency by the clock", "by the processor's time"], rows)
    said = (
        f"Batch 32, context 64, C = 128; {rounds} rounds. {load:.1f} programs ran or waited for "
        f"the {cores} cores as it began."
    )
    data |= {"load": load, "cores": cores}
    write("data_parallel", "Two processes that share a batch", [table, said], data)


KINDS = ("clock", "processor")

if __name__ == "__main__":
    main()

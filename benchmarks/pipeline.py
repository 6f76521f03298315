"""Layer-parallel direct feedback beside a backprop pipeline of the same stages, 2 and 4 processes.

    python benchmarks/pipeline.py            a few minutes
    python benchmarks/pipeline.py --quick    a look

A GPT of four blocks in stages, a gloo process with one thread for each. Direct feedback runs as by
`altprop train --parallel pipeline`, backprop by `torch.distributed.pipelining`, as 1F1B and GPipe.
Every round makes one batch's gradient by every arm, in random order; optimisers are left out.

**Idle** is the share of a batch's time, from the common start to the end of the last stage, in
which a stage does not compute. It is measured of **simulated** stages, which are small and sleep,
20 ms in a forward pass of a micro-batch and 40 ms in a backward pass: they are all busy at once
even where there are fewer cores than processes. What they sleep, and the processor time of their
thread, counts as computing.

**Real** stages are larger and do not sleep. Of them the processor time is told, which does not
depend on what else the machine does.

**Bytes** are counted where they are handed to torch.distributed: a broadcast once, and as arriving
once for each process that it reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.multiprocessing.spawn import spawn

import altprop as ap
from altprop.lab import pipeline
from altprop.lab.pipeline import Pipeline, Stage, placed
from altprop.lm.model import GPT, ModelConfig, cross_entropy, embed
from common import markdown, write

REAL = ModelConfig(vocabulary=65, context=128, d_model=128, heads=4, layers=4)
SMALL = ModelConfig(vocabulary=65, context=32, d_model=32, heads=2, layers=4)
BATCH = 16
STAGES = {"simulated": ((2, 4), (2, 8), (4, 4), (4, 16)), "real": ((2, 8), (4, 16))}
FORWARD, BACKWARD = 0.020, 0.040  # seconds that a simulated stage sleeps for a micro-batch
DIRECT: dict[str, ap.DirectFeedback] = {
    "direct feedback, error at the logits": ap.DirectFeedback("block"),
    "direct feedback, error at the head's input": ap.DirectFeedback("block", error="head_input"),
}
SIZES, SENT = (4, 1 << 20), 100  # bytes of the messages that time a link, and how many
BACKPROP = {"backprop, 1F1B": Schedule1F1B, "backprop, GPipe": ScheduleGPipe}
slept = 0.0  # seconds, in this process


def sleep(seconds: float) -> None:
    global slept
    start = time.perf_counter()
    time.sleep(seconds)
    slept += time.perf_counter() - start


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        sleep(FORWARD)
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        sleep(BACKWARD)
        return g


class Slow(nn.Module):
    """A block that also sleeps, in either pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, h: Tensor) -> Tensor:
        return _Sleep.apply(self.block(h))


class Plain(nn.Module):
    """The stage that backprop trains."""

    def __init__(self, model: GPT, index: int, count: int) -> None:
        super().__init__()
        self.config, self.dropout = model.config, model.dropout
        self.first, self.last = index == 0, index == count - 1
        if self.first:
            self.tokens, self.positions = model.tokens, model.positions
        layers = len(model.blocks)
        self.blocks = nn.Sequential(*(model.blocks[i] for i in placed(layers, index, count)))
        if self.last:
            self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(embed(self, x) if self.first else x)
        return self.head(self.norm(h)) if self.last else h


def gpt(count: int, simulated: bool) -> GPT:
    """Return the model; of a simulated one the first block of every stage sleeps."""
    torch.manual_seed(0)
    model = GPT(SMALL if simulated else REAL)
    for index in range(count if simulated else 0):
        first = placed(len(model.blocks), index, count)[0]
        model.blocks[first] = Slow(model.blocks[first])
    return model


def arms(count: int, parts: int, simulated: bool) -> dict[str, Callable[[], object]]:
    """Return what makes a batch's gradient by either pipeline, in this process."""
    rank = distributed.get_rank()
    shape = SMALL if simulated else REAL
    draw = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(65, (2, BATCH, shape.context), generator=draw)
    made: dict[str, Callable[[], object]] = {}
    for name, rule in DIRECT.items():
        stage = Stage(gpt(count, simulated), rule, 0, rank, count)
        step = Pipeline(parts)
        made[name] = lambda step=step, stage=stage: step(stage, (ids, targets))
    for name, kind in BACKPROP.items():
        plain = Plain(gpt(count, simulated), rank, count)
        place = PipelineStage(plain, rank, count, torch.device("cpu"))
        schedule = kind(place, parts, loss_fn=cross_entropy)
        given = [ids] * (rank == 0)
        wanted = {"target": targets} if rank == count - 1 else {}
        made[name] = lambda s=schedule, g=given, w=wanted: s.step(*g, **w)
    return made


def counted(act: Callable[[], object], count: int) -> dict[str, int]:
    """Return the bytes that all processes send while they act."""
    sent = {"sent": 0, "broadcast": 0}
    made = distributed.P2POp

    def isend(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent["sent"] += tensor.nbytes
        return distributed.isend(tensor, *args, **kwargs)

    def broadcast(tensor: Tensor, src: int, **kwargs: Any) -> Any:
        sent["broadcast"] += tensor.nbytes * (src == distributed.get_rank())
        return distributed.broadcast(tensor, src, **kwargs)

    def operation(op: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent["sent"] += tensor.nbytes * (op is distributed.isend)
        return made(op, tensor, *args, **kwargs)

    seen = SimpleNamespace(isend=isend, irecv=distributed.irecv, broadcast=broadcast)
    backprop = mock.patch.object(distributed, "P2POp", operation)
    with backprop, mock.patch.object(pipeline, "distributed", seen):
        act()
    total = torch.tensor(list(sent.values()))
    distributed.all_reduce(total)
    p2p, once = total.tolist()
    return {"sent": p2p, "broadcast": once, "arriving": p2p + once * (count - 1)}


def timed(act: Callable[[], object], count: int) -> tuple[float, list[float]]:
    """Return the seconds of a batch, and of each stage those in which it computes."""
    distributed.barrier()
    start, busy = time.perf_counter(), time.thread_time() + slept
    act()
    own = [time.perf_counter() - start, time.thread_time() + slept - busy]
    found = [torch.empty(2, dtype=torch.float64) for _ in range(count)]
    distributed.all_gather(found, torch.tensor(own, dtype=torch.float64))
    return max(float(each[0]) for each in found), [float(each[1]) for each in found]


def rank(index: int, store: str, count: int, parts: int, rounds: int, simulated: bool) -> None:
    """Be one of the processes; the first one writes what was measured beside the store."""
    torch.set_num_threads(1)
    place = f"file://{store}"
    distributed.init_process_group("gloo", init_method=place, rank=index, world_size=count)
    own = arms(count, parts, simulated)
    order, found = random.Random(0), {name: Measured() for name in own}
    for number in range(rounds + 1):
        for name in order.sample(list(own), len(own)):
            seconds, busy = timed(own[name], count)
            if number:  # the first warms up
                found[name].seconds.append(seconds)
                found[name].busy.append(busy)
    for name, act in own.items():
        found[name].bytes = counted(act, count)
    if index == 0:
        record = {name: one.record() for name, one in found.items()}
        Path(f"{store}.json").write_text(json.dumps(record), encoding="utf-8")
    own.clear()  # what holds the group must go before it
    distributed.destroy_process_group()


@dataclass
class Measured:
    """An arm's rounds: seconds of a batch, and of each stage those in which it computed."""

    seconds: list[float] = field(default_factory=list)
    busy: list[list[float]] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return the medians over rounds: idle shares of a stage, of all of them their mean."""
        shares = [
            [1 - one / seconds for one in busy]
            for seconds, busy in zip(self.seconds, self.busy, strict=True)
        ]
        idle = [statistics.median(stage) for stage in zip(*shares, strict=True)]
        busy = [statistics.median(stage) for stage in zip(*self.busy, strict=True)]
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return {
            "seconds": middle, "quartiles": [low, high], "idle": statistics.mean(idle),
            "idle of each stage": idle, "computing of each stage": busy, **self.bytes,
        }  # fmt: skip


def measure(count: int, parts: int, rounds: int, simulated: bool) -> dict[str, dict[str, Any]]:
    """Return every arm's record from `count` fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        spawn(rank, args=(store, count, parts, rounds, simulated), nprocs=count)
        return json.loads(Path(f"{store}.json").read_text(encoding="utf-8"))


def linked(index: int, store: str) -> None:
    """Be one of two processes that send messages to and fro; the first one writes the times."""
    torch.set_num_threads(1)
    place = f"file://{store}"
    distributed.init_process_group("gloo", init_method=place, rank=index, world_size=2)
    times = {}
    for size in SIZES:
        message, each = torch.zeros(size // 4), []
        for _ in range(SENT):
            distributed.barrier()
            start = time.perf_counter()
            if index == 0:
                distributed.send(message, 1)
                distributed.recv(message, 1)
            else:
                distributed.recv(message, 0)
                distributed.send(message, 0)
            each.append((time.perf_counter() - start) / 2)
        times[size] = min(each)  # of those that no other program came between
    if index == 0:
        Path(f"{store}.json").write_text(json.dumps(times), encoding="utf-8")
    distributed.destroy_process_group()


def link() -> dict[str, float]:
    """Return seconds of a message of next to nothing between two processes, and bytes a second."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        spawn(linked, args=(store,), nprocs=2)
        short, long = json.loads(Path(f"{store}.json").read_text(encoding="utf-8")).values()
    return {"latency": short, "bandwidth": (SIZES[1] - SIZES[0]) / (long - short)}


def passes(windows: int, rounds: int) -> dict[str, float]:
    """Return the processor seconds of a block's forward and backward pass of a micro-batch."""
    torch.set_num_threads(1)
    block = GPT(REAL).blocks[1]
    h, g = torch.randn(2, windows, REAL.context, REAL.d_model)
    made: list[Tensor] = []
    forward = lambda: made.append(block(h))  # noqa: E731
    spent: dict[str, list[float]] = {"forward": [], "backward": []}
    for _ in range(10 * rounds):
        for name, act in (("forward", forward), ("backward", lambda: made.pop().backward(g))):
            start = time.process_time()
            act()
            spent[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in spent.items()}


def expected(direct: bool, count: int, parts: int) -> float:
    """Return the idle share of a simulated stage if messages and real computing took no time."""
    work = parts * (FORWARD + BACKWARD)
    filling = (count - 1) * (FORWARD if direct else FORWARD + BACKWARD)
    return filling / (filling + work)


def simulated_table(found: dict[str, dict[str, Any]], count: int, micro: int) -> str:
    head = ["arm", "ms of a batch (quartiles)", "idle", "idle if messages took no time"]
    rows = []
    for name, one in found.items():
        low, high = one["quartiles"]
        spread = f"{1e3 * one['seconds']:.0f} ({1e3 * low:.0f}–{1e3 * high:.0f})"
        least = expected(name in DIRECT, count, micro)
        rows.append([name, spread, f"{100 * one['idle']:.0f} %", f"{100 * least:.0f} %"])
    return markdown(head, rows)


def real_table(found: dict[str, dict[str, Any]]) -> str:
    head = ["arm", "ms computing, first to last stage", "KiB sent", "KiB broadcast", "KiB arriving"]
    rows = []
    for name, one in found.items():
        busy = ", ".join(f"{1e3 * each:.0f}" for each in one["computing of each stage"])
        sizes = (f"{one[key] / 1024:.0f}" for key in ("sent", "broadcast", "arriving"))
        rows.append([name, busy, *sizes])
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds")
    rounds = 2 if parser.parse_args().quick else 5
    cores = len(os.sched_getaffinity(0))
    parts: list[str] = []
    data: dict[str, Any] = {
        "cores": cores, "load": os.getloadavg()[0], "link": link(), "block": passes(4, rounds),
    }  # fmt: skip
    for simulated in (True, False):
        kind = "simulated" if simulated else "real"
        for count, micro in STAGES[kind]:
            found = measure(count, micro, rounds, simulated)
            data[f"{kind}, {count} stages, {micro} micro-batches"] = found
            table = simulated_table(found, count, micro) if simulated else real_table(found)
            parts += [f"{kind.capitalize()}, {count} stages, {micro} micro-batches:", table]
    for kind, shape in (("Simulated", SMALL), ("Real", REAL)):
        sizes = f"C = {shape.d_model}, T = {shape.context}, V = {shape.vocabulary}"
        parts.append(f"{kind}: a GPT of {shape.layers} blocks, {sizes}, batch {BATCH}.")
    block, way = data["block"], data["link"]
    parts.append(
        f"{rounds} rounds; {data['load']:.1f} programs ran or waited for the {cores} cores as it "
        f"began. A block of the real one takes {1e3 * block['forward']:.1f} ms of its core for a "
        f"forward pass of 4 windows and {1e3 * block['backward']:.1f} ms for a backward pass. The "
        f"quickest message takes {1e6 * way['latency']:.0f} µs, and a second for each "
        f"{way['bandwidth'] / 1e9:.2f} GB."
    )
    write("pipeline", "Pipelines of direct feedback and of backprop", parts, data)


if __name__ == "__main__":
    main()

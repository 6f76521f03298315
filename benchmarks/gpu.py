"""What only a GPU has: lower precisions, a compiled force, CUDA graphs, the share of its peak.

The relaxation itself is float32 whatever is asked for (a nudge is as small as bf16's round-off), so
bf16 is for backprop's arms alone, and TF32, which rounds inside the products, for all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import altprop as ap
from altprop.lab.timing import now
from arms import UNIT, UNROLL, Arm, by_library, ordinary, unrolled
from common import markdown
from problems import Gradients, Problem

UNROLLED = f"backprop, {UNROLL}-step unroll"
PEAK_SIZE = 8192


class Graphed(ap.AbstractDynamics):
    """A dynamics whose force is replayed from a CUDA graph wherever it is not recorded.

    A graph writes every result into the same memory, and a solver keeps earlier forces, so each is
    copied out. The one recorded evaluation is the inner dynamics' own: what it keeps for its
    backward pass must outlive the phases between the two.
    """

    def __init__(self, inner: ap.AbstractDynamics) -> None:
        super().__init__()
        self.inner, self.step = inner, inner.step
        self._compiled = torch.compile(inner.forward, mode="reduce-overhead")

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.inner(z, x)
        torch.compiler.cudagraph_mark_step_begin()
        return self._compiled(z, x).clone()

    def evaluate(self, z: Tensor, x: Tensor) -> ap.AbstractEvaluation | None:
        return self.inner.evaluate(z, x)


def arms(problem: Problem) -> dict[str, Arm]:
    """Return the arms that a GPU adds; those without a name of a precision are in float32."""
    compiled = replace(problem, dynamics=copy.deepcopy(problem.dynamics))
    compiled.dynamics.compile()
    graphed = replace(problem, dynamics=Graphed(copy.deepcopy(problem.dynamics)))
    out = {}
    for name, estimator in (("AEP", ap.AEP()), ("Implicit", ap.Implicit())):
        out[f"{name}, TF32"] = inside(tf32, by_library(problem, estimator))
        out[f"{name}, compiled force"] = by_library(compiled, estimator)
        out[f"{name}, CUDA graphs"] = renamed(by_library(graphed, estimator))
    half = partial(torch.autocast, problem.x.device.type, dtype=torch.bfloat16)
    for name, make in ((UNIT, ordinary), (UNROLLED, unrolled)):
        out[f"{name}, TF32"] = inside(tf32, make(problem))
        out[f"{name}, bf16"] = inside(half, make(problem))
    return out


@contextmanager
def tf32() -> Iterator[None]:
    """Let float32 products round their factors to TF32 for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def inside(setting: Callable[[], AbstractContextManager[object]], arm: Arm) -> Arm:
    """Return the arm, run under a setting."""

    def run() -> Gradients:
        with setting():
            return arm.run()

    return replace(arm, run=run)


def renamed(arm: Arm) -> Arm:
    """Return the arm of a wrapped dynamics, its gradients under the names of the inner one's."""
    return replace(arm, run=lambda: {k.removeprefix("inner."): g for k, g in arm.run().items()})


def shares(arms: Mapping[str, Arm], seconds: Mapping[str, float], device: torch.device) -> str:
    """Return a table: each arm's rate of floating-point operations beside the measured peak.

    Only operations that torch's counter knows are counted, the matrix products and fused
    attention; a compiled arm is counted as its plain namesake.
    """
    peaks = {name: peak_rate(name, device) for name in ("float32", "TF32", "bf16")}
    rows = []
    for name, arm in arms.items():
        kind = name.rpartition(", ")[2]
        plain = arms.get(name.rpartition(", ")[0])
        counted = plain if kind in ("compiled force", "CUDA graphs") and plain else arm
        with FlopCounterMode(display=False) as counter:
            counted.run()
        rate = counter.get_total_flops() / seconds[name]
        peak = peaks.get(kind, peaks["float32"])
        rows.append([name, f"{rate / 1e12:.2f}", f"{peak / 1e12:.0f}", f"{rate / peak:.1%}"])
    head = ["method", "TFLOP/s", f"peak of a {PEAK_SIZE}³ product", "share"]
    return markdown(head, rows)


def peak_rate(precision: str, device: torch.device, repeats: int = 10) -> float:
    """Return the measured floating-point operations per second of a large matrix product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, device=device, dtype=dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")
    try:
        best = float("inf")
        for _ in range(repeats):
            start = now(device)
            torch.mm(a, b)
            best = min(best, now(device) - start)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * PEAK_SIZE**3 / best

"""What an equilibrium's gradient costs: every estimator beside backprop and other libraries.

    python benchmarks/gradient.py            the tables, some minutes each
    python benchmarks/gradient.py --quick    a minute; exits with 1 if a ratio is behind its floor
    python benchmarks/gradient.py --problems gated-128    one of them anew; the others are kept

What is timed is one forward and backward pass of the block alone, from a fixed input and under a
fixed loss head, to the gradients of the block's parameters and of its input, the same for every
arm. A run of fewer than nine rounds is printed and not written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

import altprop as ap
import floors
import gpu
from altprop.auditing.memory import peak_live_bytes
from altprop.lab.reference import Sizes
from altprop.lab.timing import Ratio, Times, paired, ratio
from altprop.lab.train import pick_device
from arms import (
    CHUNKED,
    LOOSEST,
    PUBLISHED,
    UNIT,
    UNROLL,
    Accuracy,
    Arm,
    Seen,
    accuracy,
    build,
    by_library,
    missing,
    ordinary,
    unrolled,
)
from common import markdown, results, write
from problems import Gradients, Problem, gated, reference
from published import EVALUATIONS, published_aep

ROUNDS = 9
PROBLEMS = ("reference", "gated-128", "gated-256")


@dataclass(frozen=True)
class Row:
    """All that was measured of one arm. `accuracy` is None for what has another gradient."""

    name: str
    note: str
    seconds: float
    units: Ratio
    accuracy: Accuracy | None
    seen: Seen
    peak_bytes: int

    def cells(self) -> list[str]:
        mark = "" if self.seen.settled else " †"
        near = ["—"] * 3
        if self.accuracy is not None:
            a = self.accuracy
            near = [f"{a.worst:.7f}", f"{a.mean:.7f}", f"{a.norm_ratio:.4f}"]
        return [
            self.name + (f" ({self.note})" if self.note else "") + mark,
            f"{1e3 * self.seconds:.1f}",
            str(self.units),
            *near,
            f"{self.seen.free} + {self.seen.adjoint}",
            f"{self.peak_bytes / 2**20:.1f}",
        ]


HEADINGS = [
    "method", "ms", "× backprop (quartiles)", "worst cosine", "mean cosine", "norm ratio",
    "evaluations", "peak MiB",
]  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A target: the cost of `over` in units of `under`'s is at most (or at least) `bound`."""

    text: str
    over: str
    under: str
    bound: float
    at_least: bool = False
    of: str = "time"


CLAIMS = (
    Claim("AEP as published / AEP", PUBLISHED, "AEP", 20, at_least=True),
    Claim("AEP as published / AEP, loosest", PUBLISHED, f"AEP{LOOSEST}", 20, at_least=True),
    Claim("AEP / Implicit", "AEP", "Implicit", 1.25),
    Claim("AEP / Implicit, at equal accuracy", f"AEP{LOOSEST}", f"Implicit{LOOSEST}", 1.25),
    Claim("Implicit / torchdeq, at equal accuracy", f"Implicit{LOOSEST}", "torchdeq", 0.6),
    Claim("Implicit / backprop", "Implicit", UNIT, 6),
    Claim("Implicit / backprop, loosest", f"Implicit{LOOSEST}", UNIT, 6),
    Claim("AEP / backprop", "AEP", UNIT, 8),
    Claim("AEP / backprop, loosest", f"AEP{LOOSEST}", UNIT, 8),
    Claim("OneStep(1) / backprop", "OneStep(1)", UNIT, 4),
    Claim("OneStep(1) / backprop, loosest", f"OneStep(1){LOOSEST}", UNIT, 4),
    Claim("OneStep / backprop, at equal accuracy", f"OneStep{LOOSEST}", UNIT, 4),
    Claim("peak memory, AEP / backprop", "AEP", UNIT, 2, of="memory"),
    Claim("peak memory, Implicit / backprop", "Implicit", UNIT, 2, of="memory"),
    Claim(f"peak memory, AEP{CHUNKED} / backprop", f"AEP{CHUNKED}", UNIT, 2, of="memory"),
    Claim(f"peak memory, Implicit{CHUNKED} / backprop", f"Implicit{CHUNKED}", UNIT, 2, of="memory"),
)  # fmt: skip


def measure(
    problem: Problem, arms: dict[str, Arm], exact: Gradients, rounds: int
) -> tuple[list[Row], Times]:
    """Run every arm once for what it does and once for its memory, then time all of them."""
    device = problem.x.device
    found = {}
    for name, arm in arms.items():
        own = None if name == UNIT else accuracy(arm.run(), exact)
        peak = peak_live_bytes(arm.run, device)
        found[name] = (own, arm.seen(), peak)
    times = paired({name: arm.run for name, arm in arms.items()}, rounds, device)
    rows = [
        Row(name, arms[name].note, median(times[name]), ratio(times, name, UNIT), *found[name])
        for name in arms
    ]
    return rows, times


def verdicts(rows: list[Row], times: Times) -> Iterator[list[str]]:
    """Yield a line per target: what, the target, the figure, and whether it was met."""
    by_name = {row.name: row for row in rows}
    # the fastest of torchdeq's solvers stands for it
    peers = [r for r in rows if r.name.startswith("torchdeq") and r.name.endswith(LOOSEST)]
    if peers:
        best = min(peers, key=lambda row: row.seconds)
        by_name["torchdeq"], times = best, times | {"torchdeq": times[best.name]}
    for claim in CLAIMS:
        sign = "≥" if claim.at_least else "≤"
        target = f"{sign} {claim.bound:g}"
        if claim.over not in by_name or claim.under not in by_name:
            yield [claim.text, target, "—", "not measured"]
            continue
        if claim.of == "memory":
            figure = by_name[claim.over].peak_bytes / by_name[claim.under].peak_bytes
            shown = f"{figure:.2f}"
        else:
            found = ratio(times, claim.over, claim.under)
            figure, shown = found.median, str(found)
        met = figure >= claim.bound if claim.at_least else figure <= claim.bound
        yield [claim.text, target, shown, "met" if met else "**missed**"]


def report(problem: Problem, rounds: int) -> dict[str, Any]:
    """Return the data of one problem, with its paragraphs as `text`."""
    exact = problem.exact()
    arms = build(problem, exact)
    if problem.x.is_cuda:
        arms |= gpu.arms(problem)
    rows, times = measure(problem, arms, exact, rounds)
    lines = list(verdicts(rows, times))
    parts = [
        f"## {problem.name[0].upper()}{problem.name[1:]}",
        markdown(HEADINGS, [row.cells() for row in rows]),
        *missing(arms),
        markdown(["figure", "target", "measured (quartiles)", "verdict"], lines),
    ]
    if problem.x.is_cuda:
        parts.append(gpu.shares(arms, {row.name: row.seconds for row in rows}, problem.x.device))
    data = {"problem": problem.name, "rows": [asdict(row) for row in rows], "times": times}
    return {**data, "text": parts}


def explain(rounds: int, device: torch.device) -> list[str]:
    """Return what the tables mean."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor"
    return [
        "Forward and backward of the block alone, from a fixed input under a fixed loss head, in "
        f"float32 on {where}: medians of {rounds} rounds, each of which ran every arm once in "
        "random order; in one thread of a processor, the process's own time. × backprop: the "
        "median over rounds of the ratio to one ordinary feed-forward block of the same size by "
        "backprop in the same round. Cosines, over each parameter and the input, and the ratio of "
        "norms are to the exact gradient: the adjoint equation in float64, both solves to 1e-9. "
        "Evaluations: of the force in the free phase, and forces, products and linearisations in "
        "the backward pass (for other libraries: calls of the fixed-point map, and products with "
        "its transposed Jacobian). Peak: the most bytes of tensors alive at once above what was "
        "there before. †: a solve missed its tolerance.",
        f"{LOOSEST[2:].capitalize()}: of a grid of tolerances of both passes, the pair of fewest "
        "evaluations that keeps every cosine at 0.9999 or more; comparisons at equal accuracy are "
        "between these. OneStep(1), whose gradient is never exact, loosest: the loosest free phase "
        "that takes at most 1e-4 from its worst cosine. AEP as published is written from scratch "
        "(ε = 0.1, T1 = 120, T2 = 20, β = 0.02, clipped, `Jv` by double backward). The paper has "
        "no gated block: its procedure is run there for its time, and its cosines say what the "
        "gradient is worth.",
    ]


def quick(data: str, device: torch.device) -> int:
    """Time few arms on a small problem and return 1 if a ratio is behind its floor."""
    problem = reference(data, device, Sizes(batch=4, context=32, d_model=64))
    arms = {
        UNIT: ordinary(problem),
        f"backprop, {UNROLL}-step unroll": unrolled(problem),
        PUBLISHED: Arm(lambda: published_aep(problem), lambda: Seen(*EVALUATIONS)),
        "AEP": by_library(problem, ap.AEP()),
        "Implicit": by_library(problem, ap.Implicit()),
    }
    rows, times = measure(problem, arms, problem.exact(), rounds=21)
    print(markdown(HEADINGS, [row.cells() for row in rows]))
    wanted = floors.load()
    found = {(f.over, f.under): ratio(times, f.over, f.under) for f in wanted}
    for floor in wanted:
        print(f"{floor.over} / {floor.under}: {found[floor.over, floor.under]}, "
              f"{floor.better} is better than {floor.bound:g}")  # fmt: skip
    complaints = floors.behind(wanted, found)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return int(bool(complaints))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute: only compare with floors")
    parser.add_argument("--data", default="plays", help="a corpus, a text file or a folder")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--train-steps", type=int, default=300, help="of the gated blocks")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    if options.quick:
        return quick(options.data, device)
    file = "gradient" if device.type == "cpu" else f"gradient_{device.type}"
    found = {} if options.rounds < ROUNDS else {each["key"]: each for each in results(file)}
    for name in options.problems:
        if name == "reference":
            problem = reference(options.data, device)
        else:
            width, context = {"gated-128": (128, 64), "gated-256": (256, 128)}[name]
            problem = gated(options.data, device, width, context, options.train_steps)
        found[name] = {"key": name, **report(problem, options.rounds)}
        print("\n\n".join(found[name]["text"]), flush=True)
    if options.rounds >= ROUNDS:
        data = [found[name] for name in PROBLEMS if name in found]
        parts = [part for each in data for part in each["text"]]
        title = "What an equilibrium's gradient costs"
        write(file, title, [*explain(options.rounds, device), *parts], data)
    return 0


if __name__ == "__main__":
    sys.exit(main())

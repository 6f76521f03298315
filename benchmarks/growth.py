"""How the cost of an equilibrium's gradient grows with the context, the width and the batch.

    python benchmarks/growth.py

One size is swept at a time, the others stay at a small base. Every round times every size of every
arm once, in random order; an exponent is the slope of the least-squares line through the medians,
both axes logarithmic. Then the peak memory against the number of relaxation steps.

Shapes: `B` windows, `T` tokens, `C` channels, `H` heads.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from statistics import linear_regression, median
from typing import Any

import torch

import altprop as ap
from altprop.auditing.memory import peak_live_bytes
from altprop.lab.timing import paired
from altprop.lab.train import pick_device
from arms import UNIT, Arm, by_library, ordinary
from common import markdown, write
from problems import Head, Problem

BASE = {"T": 64, "C": 64, "B": 4}
SWEEPS = {"T": (64, 128, 256, 512, 1024), "C": (64, 128, 256, 512), "B": (4, 8, 16, 32, 64)}
STEPS = (20, 50, 100, 200)
HEADS, VOCABULARY, MARGIN = 4, 65, 0.1
ROUNDS = 9


def problem(T: int, C: int, B: int, device: torch.device) -> Problem:
    """Return a seeded gated block whose feedback is about as strong at every size."""
    torch.manual_seed(0)
    dynamics = ap.GatedBlock(C, HEADS, init_std=0.5 * C**-0.5)
    torch.nn.init.uniform_(dynamics.alpha, -0.5, 0.5)
    head = Head(C**-0.5 * torch.randn(VOCABULARY, C), torch.randint(VOCABULARY, (B * T,)))
    x = torch.randn(B, T, C)
    name = f"T = {T}, C = {C}, B = {B}"
    return Problem(name, dynamics.to(device), x.to(device), head.to(device))


def arms(of: Problem) -> dict[str, Arm]:
    return {
        UNIT: ordinary(of),
        "AEP": by_library(of, ap.AEP()),
        "Implicit": by_library(of, ap.Implicit()),
    }


def exponent(sizes: Sequence[int], figures: Sequence[float]) -> float:
    """Return `p` of the line `figure ∝ sizeᵖ` nearest to the points on logarithmic axes."""
    return linear_regression([math.log(s) for s in sizes], [math.log(f) for f in figures]).slope


def sweep(letter: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """Return the times and evaluations of every arm at every size, and the exponents."""
    sizes = SWEEPS[letter]
    made = {size: arms(problem(**(BASE | {letter: size}), device=device)) for size in sizes}
    each = {(name, size): arm for size in sizes for name, arm in made[size].items()}
    peaks = {key: peak_live_bytes(arm.run, device) for key, arm in each.items()}
    times = paired({repr(key): arm.run for key, arm in each.items()}, rounds, device)
    out: dict[str, Any] = {"swept": letter, "sizes": sizes, "arms": {}}
    for name in made[sizes[0]]:
        seconds = [median(times[repr((name, size))]) for size in sizes]
        seen = [made[size][name].seen() for size in sizes]
        out["arms"][name] = {
            "seconds": seconds,
            "evaluations": [s.free + s.adjoint for s in seen],
            "peak_bytes": [peaks[name, size] for size in sizes],
            "exponent": exponent(sizes, seconds),
            "per_evaluation": exponent(
                sizes, [t / (s.free + s.adjoint) for t, s in zip(seconds, seen, strict=True)]
            ),
        }
    return out


def present(found: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs of one sweep."""
    letter, sizes = found["swept"], found["sizes"]
    base = found["arms"][UNIT]["exponent"]
    rows = []
    for name, arm in found["arms"].items():
        cells = [
            f"{1e3 * t:.1f} ms, {n}, {b / 2**20:.1f} MiB"
            for t, n, b in zip(arm["seconds"], arm["evaluations"], arm["peak_bytes"], strict=True)
        ]
        above = arm["exponent"] - base
        verdict = "—" if name == UNIT else "met" if above <= MARGIN else "**missed**"
        rows.append(
            [name, *cells, f"{arm['exponent']:.2f}", f"{above:+.2f}",
             f"{arm['per_evaluation'] - base:+.2f}", verdict]
        )  # fmt: skip
    head = ["method", *(f"{letter} = {size}" for size in sizes), "exponent", "above backprop's"]
    others = ", ".join(f"{key} = {value}" for key, value in BASE.items() if key != letter)
    return [
        f"## {letter}, with {others}",
        markdown([*head, "per evaluation", f"target ≤ +{MARGIN:g}"], rows),
    ]


def memory(device: torch.device) -> tuple[list[str], dict[str, list[int]]]:
    """Return the peak memory against the number of Euler steps of the free phase."""
    of = problem(**BASE, device=device)
    found: dict[str, list[int]] = {}
    for name, estimator in (("BPTT", ap.BPTT()), ("AEP", ap.AEP()), ("Implicit", ap.Implicit())):
        relaxations = [ap.Euler(step=0.1, max_steps=n) for n in STEPS]
        found[name] = [
            peak_live_bytes(by_library(of, estimator, solver).run, device) for solver in relaxations
        ]
    rows = [[name, *(f"{b / 2**20:.1f}" for b in peaks)] for name, peaks in found.items()]
    text = (
        "Peak MiB of one forward and backward pass after so many Euler steps of 0.1 "
        f"({', '.join(f'{key} = {value}' for key, value in BASE.items())})."
    )
    head = ["method", *(f"{n} steps" for n in STEPS)]
    return ["## Memory and relaxation steps", text, markdown(head, rows)], found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    found = [sweep(letter, options.rounds, device) for letter in options.sweeps]
    lines, peaks = memory(device)
    parts = [
        "Forward and backward of a gated block (seeded weights N(0, 1/4C), α uniform in ±0.5) "
        f"beside the ordinary block of the same size: median of {options.rounds} interleaved "
        "rounds, evaluations of the force and products in both passes, peak memory. Above "
        "backprop's: the exponent less that of the ordinary block; per evaluation: the same of "
        "the time divided by the evaluations, which tells a dearer evaluation from more of them."
    ]
    for one in found:
        parts += present(one)
    parts += lines
    if options.rounds < ROUNDS:
        print("\n\n".join(parts))
    else:
        data = {"sweeps": found, "memory": {"steps": STEPS, "peak_bytes": peaks}}
        write("growth" if device.type == "cpu" else f"growth_{device.type}",
              "How the cost of a gradient grows", parts, data)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The arms of the benchmark of gradients: every way to the same gradient, and the unit.

An arm's `run` makes one forward and backward pass. What is not the library's is written in
`published.py` or comes from the libraries in `peers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import altprop as ap
import peers
from problems import Gradients, Problem
from published import EVALUATIONS, published_aep

UNIT = "backprop, ordinary block"
PUBLISHED = "AEP as published"
UNROLL = 12
EXACT_ENOUGH = 0.9999  # the least cosine of a parameter for a comparison at equal accuracy
XITORCH = "xitorch, Anderson + bicgstab"
LOOSEST = ", loosest"
CHUNK = 4
CHUNKED = f", {CHUNK} samples at a time"
ITERATED = "Implicit, plain iteration"  # the solver of torchdeq's plainest arm
# Tight to loose, and loose to tight: the search goes down one as it goes up the other.
FREE_TOLERANCES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1)
TOLERANCES = (5e-1, 2e-1, 1e-1, 5e-2, 2e-2, 1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4)
NO_WORSE = 1e-4  # what a looser free phase may take from the worst cosine of a gradient never exact
TERMS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
LIBRARY: dict[str, ap.AbstractEstimator] = {
    "AEP": ap.AEP(),
    'AEP(start="zero")': ap.AEP(start="zero"),
    'AEP(linearise="tracking")': ap.AEP(linearise="tracking"),
    "EP": ap.EP(),
    "DyadicEP": ap.DyadicEP(),
    "Implicit": ap.Implicit(),
    "OneStep(1)": ap.OneStep(1),
    "OneStep(4)": ap.OneStep(4),
}


@dataclass(frozen=True)
class Seen:
    """What the last run of an arm did: evaluations of the force and products, and whether every
    solve met its tolerance."""

    free: int
    adjoint: int
    settled: bool = True


@dataclass(frozen=True)
class Arm:
    """One way to the gradient. `seen` tells of the last run; `note` stands beside the name."""

    run: Callable[[], Gradients]
    seen: Callable[[], Seen]
    note: str = ""


@dataclass(frozen=True)
class Accuracy:
    """How near a gradient is to the exact one: cosines over the parameters and the input, and the
    ratio of the norms of the whole."""

    worst: float
    mean: float
    norm_ratio: float


def accuracy(gradients: Gradients, exact: Gradients) -> Accuracy:
    """Compare with the exact gradient; a gradient that is missing, zero or not finite counts 0."""
    cosines = []
    for name, reference in exact.items():
        own = gradients.get(name)
        found = None if own is None else ap.compare(own, reference).cosine
        cosines.append(0.0 if found is None else found)
    size, wanted = (
        math.sqrt(sum(float(g.double().square().sum()) for g in each.values()))
        for each in (gradients, exact)
    )
    return Accuracy(min(cosines), fmean(cosines), size / wanted)


def build(problem: Problem, exact: Gradients) -> dict[str, Arm]:
    """Return every arm by name, the loosest of equal accuracy found by search."""
    arms = {UNIT: ordinary(problem), f"backprop, {UNROLL}-step unroll": unrolled(problem)}
    arms[PUBLISHED] = Arm(lambda: published_aep(problem), lambda: Seen(*EVALUATIONS))
    bptt = ap.Euler(step=0.1, max_steps=120)
    arms["BPTT, 120 Euler steps"] = by_library(problem, ap.BPTT(), bptt)
    arms |= {name: by_library(problem, estimator) for name, estimator in LIBRARY.items()}
    for name in ("AEP", "Implicit"):
        arms[name + CHUNKED] = by_library(problem, LIBRARY[name], part=CHUNK)

    def aep(free: float, tol: float) -> Arm:
        note = f"tol {free:g}, {tol:g}"
        return by_library(problem, ap.AEP(tol=tol), ap.Anderson(tol=free), note)

    def implicit(free: float, tol: float) -> Arm:
        note = f"tol {free:g}, {tol:g}"
        return by_library(problem, ap.Implicit(tol=tol), ap.Anderson(tol=free), note)

    def iterated(free: float, tol: float) -> Arm:
        plain = ap.Euler(step=problem.dynamics.step, max_steps=peers.LIMIT, tol=free)
        return by_library(problem, ap.Implicit(tol=tol), plain, f"tol {free:g}, {tol:g}")

    def one_step(free: float, k: int) -> Arm:
        return by_library(problem, ap.OneStep(k), ap.Anderson(tol=free), f"k = {k}, tol {free:g}")

    arms |= named(f"AEP{LOOSEST}", loosest(aep, TOLERANCES, exact))
    arms |= named(f"Implicit{LOOSEST}", loosest(implicit, TOLERANCES, exact))
    arms |= named(f"{ITERATED}{LOOSEST}", loosest(iterated, TOLERANCES, exact))
    arms |= named(f"OneStep{LOOSEST}", loosest(one_step, TERMS, exact))
    arms[f"OneStep(1){LOOSEST}"] = as_good([one_step(tol, 1) for tol in FREE_TOLERANCES], exact)
    return arms | other_libraries(problem, exact)


def other_libraries(problem: Problem, exact: Gradients) -> dict[str, Arm]:
    """Return the arms of the libraries that are installed."""
    arms: dict[str, Arm] = {}
    for label, solver in peers.TORCHDEQ.items():
        default = by_peer(peers.torchdeq_gradient(problem, solver))
        if default is None:
            break
        arms[f"torchdeq, {label}"] = default

        def loose(free: float, tol: float, solver: str = solver) -> Arm:
            made = peers.torchdeq_gradient(problem, solver, (free, tol))
            arm = by_peer(made, f"tol {free:g}, {tol:g}")
            assert arm is not None
            return arm

        arms |= named(f"torchdeq, {label}{LOOSEST}", loosest(loose, TOLERANCES, exact))
    xitorch = by_peer(peers.xitorch_gradient(problem))
    if xitorch is not None:
        arms[XITORCH] = xitorch

        def iterated(free: float, tol: float) -> Arm:
            arm = by_peer(peers.xitorch_gradient(problem, (free, tol)), f"tol {free:g}, {tol:g}")
            assert arm is not None
            return arm

        arms |= named(f"{XITORCH}{LOOSEST}", loosest(iterated, TOLERANCES, exact))
    return arms


def as_good(arms: Sequence[Arm], exact: Gradients) -> Arm:
    """Return the last of the arms, dear to cheap, that is as near the exact gradient as the first.

    For a gradient that no tolerance makes exact: it may lose `NO_WORSE` of its worst cosine.
    """
    near = [accuracy(arm.run(), exact).worst for arm in arms]
    return [arm for arm, own in zip(arms, near, strict=True) if own >= near[0] - NO_WORSE][-1]


def missing(arms: dict[str, Arm]) -> list[str]:
    """Return the rows that are not there, and why, for the text."""
    out = [f"{peer} was not installed." for peer in ("torchdeq", "xitorch")
           if not any(name.startswith(peer) for name in arms)]  # fmt: skip
    searched = ["AEP", "Implicit", ITERATED, "OneStep"]
    peer_names = [*(f"torchdeq, {label}" for label in peers.TORCHDEQ), XITORCH]
    searched += [name for name in peer_names if name in arms]
    for name in searched:
        if f"{name}{LOOSEST}" not in arms:
            out.append(f"{name}: no tolerance of the search kept every cosine ≥ {EXACT_ENOUGH}.")
    return out


def named(name: str, arm: Arm | None) -> dict[str, Arm]:
    return {} if arm is None else {name: arm}


def by_library(
    problem: Problem,
    estimator: ap.AbstractEstimator,
    solver: ap.AbstractSolver | None = None,
    note: str = "",
    part: int | None = None,
) -> Arm:
    """Return the arm of an estimator, with its default solver unless one is given.

    **Arguments:** `part`, how many samples are solved at a time (None: all).
    """
    block = problem.block(estimator, solver)

    def seen() -> Seen:
        certificate = block.certificate
        assert certificate is not None
        settled = all(
            r is None or bool(r) for r in (certificate.result, certificate.adjoint_result)
        )
        return Seen(certificate.free_evaluations, certificate.adjoint_evaluations, settled)

    def forward(x: Tensor) -> Tensor:
        return block(x) if part is None else torch.cat([block(own) for own in x.split(part)])

    return Arm(lambda: problem.differentiate(forward, problem.dynamics), seen, note)


def by_peer(
    made: tuple[Callable[[], Gradients], peers.Counted] | None, note: str = ""
) -> Arm | None:
    if made is None:
        return None
    run, step = made
    return Arm(run, lambda: Seen(step.evaluations, step.products, step.settled), note)


def ordinary(problem: Problem) -> Arm:
    """Return the unit: backprop through an ordinary block of the same size."""
    block = problem.ordinary()
    return Arm(lambda: problem.differentiate(block, block), lambda: Seen(1, 1))


def unrolled(problem: Problem) -> Arm:
    """Return backprop through a few steps of `z ← z + εF(z)` from the input."""
    dynamics = problem.dynamics

    def forward(x: Tensor) -> Tensor:
        z = x
        for _ in range(UNROLL):
            z = z + dynamics.step * dynamics(z, x)
        return z

    return Arm(lambda: problem.differentiate(forward, dynamics), lambda: Seen(UNROLL, UNROLL))


def loosest(
    make: Callable[[float, Any], Arm], settings: Sequence[float], exact: Gradients
) -> Arm | None:
    """Return the arm of fewest evaluations whose every cosine is at least `EXACT_ENOUGH`.

    **Arguments:** `make`, from the tolerance of the free phase and a setting of the backward pass
    to an arm; `settings`, cheap to dear. A looser free phase never allows a cheaper setting, so one
    walk along the edge of what is exact enough finds every candidate.
    """
    best, fewest, at = None, math.inf, 0
    for free in FREE_TOLERANCES:
        while at < len(settings):
            arm = make(free, settings[at])
            if accuracy(arm.run(), exact).worst >= EXACT_ENOUGH:
                seen = arm.seen()
                if seen.free + seen.adjoint <= fewest:  # as many: the looser of the two
                    best, fewest = arm, seen.free + seen.adjoint
                break
            at += 1
    return best

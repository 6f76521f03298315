"""What an audit found, as numbers: an arm's gradients beside the reference, and their cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from altprop.auditing.agreement import FIGURES, Agreement, Agreements, Summary, summarise


@dataclass(frozen=True)
class Words:
    """An arm in words: its `name` in tables, its `rule`, its `solver` (`None`: the model's)."""

    name: str
    rule: str
    solver: str | None


@dataclass(frozen=True)
class Measured:
    """What the certificates of one gradient say; `None` where the rule solves for nothing.

    `evaluations`: of the force, its JVPs and VJPs, free phase and backward pass together.
    `free_residual`: the worst `‖F‖/‖z‖`. `adjoint_residual`: the worst, relative to the nudge.
    `beta`: the mean nudge. `response`: the largest `‖z^β − z*‖/‖z*‖`.
    `nudged_residual`: the worst of any nudged phase. `antisymmetry`: the largest `‖Jv − Jᵀv‖/‖Jv‖`.
    `failures`: in words.
    """

    evaluations: int | None = None
    free_residual: float | None = None
    adjoint_residual: float | None = None
    beta: float | None = None
    response: float | None = None
    nudged_residual: float | None = None
    antisymmetry: float | None = None
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """One arm on one trial: per parameter, as a whole, and what its gradient took."""

    parameters: Mapping[str, Agreement]
    whole: Agreement
    measured: Measured


@dataclass(frozen=True)
class Cost:
    """`milliseconds`, the median of the repeats; `peak_bytes`, the most held at once."""

    milliseconds: float | None
    peak_bytes: int


@dataclass(frozen=True)
class Reference:
    """The arm that the others are compared with; `norms`, of its gradient, mean over trials."""

    arm: Words
    norms: Mapping[str, float]
    measured: Sequence[Measured]
    cost: Cost

    def as_dict(self) -> dict[str, Any]:
        """Return the reference as plain data."""
        return {
            **dataclasses.asdict(self.arm),
            "norms": dict(self.norms),
            **_cost_dict(self.measured, self.cost),
        }


@dataclass(frozen=True)
class Row:
    """One arm over all trials; every mean leaves out what has no figure, and `flags` says so."""

    arm: Words
    outcomes: Sequence[Outcome]
    cost: Cost
    parameters: Mapping[str, Agreements] = field(init=False)
    whole: Agreements = field(init=False)

    def __post_init__(self) -> None:
        names = self.outcomes[0].parameters
        found = {n: Agreements([o.parameters[n] for o in self.outcomes]) for n in names}
        object.__setattr__(self, "parameters", found)
        object.__setattr__(self, "whole", Agreements([o.whole for o in self.outcomes]))

    def per_trial(self, figure: str) -> list[float | None]:
        """Return one of the `FIGURES` for each trial, averaged over the parameters."""
        means = []
        for outcome in self.outcomes:
            values = [getattr(a, figure) for a in outcome.parameters.values()]
            known = [v for v in values if v is not None]
            means.append(math.fsum(known) / len(known) if known else None)
        return means

    def mean(self, figure: str) -> Summary:
        """Return a figure over parameters and trials; its interval is that of the trials."""
        return summarise(figure, self.per_trial(figure))

    def worst(self, figure: str) -> float | None:
        """Return the worst value of a figure over parameters and trials."""
        values = [a.figures[figure].worst for a in self.parameters.values()]
        return summarise(figure, values).worst

    @property
    def spread(self) -> float | None:
        """The largest norm ratio of a parameter over the smallest: does the scale hold?"""
        ratios = [a.figures["norm_ratio"].mean for a in self.parameters.values()]
        known = [r for r in ratios if r is not None]
        return max(known) / min(known) if known and min(known) > 0 else None

    @property
    def flags(self) -> dict[str, dict[str, int]]:
        """Parameters with missing figures: why, and in how many trials."""
        every = {name: a.flags for name, a in self.parameters.items()}
        return {n: {f.value: k for f, k in flags.items()} for n, flags in every.items() if flags}

    @property
    def failures(self) -> list[str]:
        """The solves that missed their tolerance, in words."""
        return list(dict.fromkeys(f for o in self.outcomes for f in o.measured.failures))

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return {
            "estimator": self.arm.name,
            "rule": self.arm.rule,
            "solver": self.arm.solver,
            "parameters": {name: _agreements_dict(a) for name, a in self.parameters.items()},
            "whole": _agreements_dict(self.whole),
            **_cost_dict([o.measured for o in self.outcomes], self.cost),
            "mean": {
                **{figure: self.mean(figure).mean for figure in FIGURES},
                **_spreads_dict({figure: self.mean(figure) for figure in FIGURES}),
            },
            "per_trial": {figure: self.per_trial(figure) for figure in FIGURES},
            "norm_ratio_spread": self.spread,
            "flags": self.flags,
        }


def _agreements_dict(agreements: Agreements) -> dict[str, Any]:
    means = {figure: summary.mean for figure, summary in agreements.figures.items()}
    return {
        **means,
        "descends": agreements.descends,
        **_spreads_dict(agreements.figures),
        "flags": {flag.value: count for flag, count in agreements.flags.items()},
    }


def _spreads_dict(summaries: Mapping[str, Summary]) -> dict[str, Any]:
    return {
        "half_width_95": {figure: s.half_width for figure, s in summaries.items()},
        "worst": {figure: s.worst for figure, s in summaries.items()},
        "count": {figure: s.count for figure, s in summaries.items()},
    }


def _cost_dict(measured: Sequence[Measured], cost: Cost) -> dict[str, Any]:
    def known(name: str) -> list[float]:
        return [getattr(m, name) for m in measured if getattr(m, name) is not None]

    def average(name: str) -> float | None:
        values = known(name)
        return math.fsum(values) / len(values) if values else None

    return {
        "evaluations": average("evaluations"),
        "milliseconds": cost.milliseconds,
        "peak_bytes": cost.peak_bytes,
        "residuals": {
            "free": max(known("free_residual"), default=None),
            "adjoint": max(known("adjoint_residual"), default=None),
            "nudged": max(known("nudged_residual"), default=None),
        },
        "antisymmetry": max(known("antisymmetry"), default=None),
        "beta": average("beta"),
        "response": max(known("response"), default=None),
        "failures": list(dict.fromkeys(f for m in measured for f in m.failures)),
    }

"""What an audit found: numbers for a program, tables for a terminal, bars for the eye."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from altprop.auditing.agreement import FIGURES, Agreement, Agreements, Summary, summarise
from altprop.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

WIDE = 6  # more parameters than this make no columns of a terminal, but a digest


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


@dataclass(frozen=True)
class AuditReport:
    """The rows of an audit, its reference and the names of its trials.

    `extra` is what the caller adds to the JSON form: where the problem came from, versions.
    """

    reference: Reference
    rows: Sequence[Row]
    trials: Sequence[str]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data; an undefined or infinite figure is `None`."""
        content = {
            "reference": self.reference.as_dict(),
            "rows": [row.as_dict() for row in self.rows],
            "trials": list(self.trials),
            **self.extra,
        }
        return _finite(content)

    def to_json(self) -> str:
        """Return the report as JSON; per-parameter figures are means over the trials."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def write_json(self, path: str | Path) -> Path:
        """Write `to_json` to a file, whole or not at all; return its path."""
        text = self.to_json() + "\n"
        return _write(path, lambda file: file.write(text.encode()))

    def plot(self, path: str | Path) -> Path:
        """Draw cosine and norm ratio per parameter, arm by arm, as a PNG; return its path.

        **Raises:** `ConfigError` without matplotlib; `DataError` where the file cannot be written.
        """
        self.check_target(path, plot=True)
        from altprop.auditing.plot import draw

        figure = draw(self)
        return _write(path, lambda file: figure.savefig(file, format="png", dpi=150))

    @staticmethod
    def check_target(path: str | Path, *, plot: bool = False) -> None:
        """Make sure that a report can be written to `path`, and leave nothing there.

        **Arguments:** `plot`, whether it is the picture that will be written.

        **Raises:** `DataError` where the file cannot be written; `ConfigError` without matplotlib.
        """
        if plot and importlib.util.find_spec("matplotlib") is None:
            raise ConfigError('plots need matplotlib: pip install "altprop[plots]"')
        _check_target(path)

    def table(self) -> Group:
        """Return rich tables for a terminal of 100 columns: direction, size, and cost."""
        from rich.console import Group

        notes = self._notes()
        return Group(self._directions(), self._sizes(), self._costs(), *notes)

    def __rich__(self) -> Group:
        return self.table()

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=100).print(self.table())
        return out.getvalue()

    def _columns(self) -> list[str]:
        names = list(self.rows[0].parameters)
        return names if len(names) <= WIDE else []

    def _directions(self) -> Table:
        columns = self._columns()
        digest = [] if columns else ["parameters", "worst at"]
        title = f"Cosine to {self.reference.arm.name} ({len(self.trials)} trials)"
        table = _table(title, *columns, *digest, "mean ± 95 %", "worst")
        for row in self.rows:
            figures = {n: a.figures["cosine"] for n, a in row.parameters.items()}
            cells = [self._cell(row, name, "cosine", 5) for name in columns]
            if digest:
                known = {n: s.worst for n, s in figures.items() if s.worst is not None}
                cells = [str(len(known)), min(known, key=lambda n: known[n]) if known else "–"]
            mean = row.mean("cosine")
            interval = "" if mean.half_width is None else f" ± {mean.half_width:.4f}"
            cells += [f"{cut(mean.mean, 5)}{interval}", cut(row.worst("cosine"), 5)]
            table.add_row(row.arm.name, *cells)
        return table

    def _sizes(self) -> Table:
        columns = self._columns()
        title = "Norm ratio; relative error, equal signs and descent over all parameters"
        digest = [] if columns else ["mean ratio", "worst ratio"]
        table = _table(title, *columns, *digest, "error", "signs", "descends")
        for row in self.rows:
            cells = [self._cell(row, name, "norm_ratio", 4) for name in columns]
            if digest:
                ratio = row.mean("norm_ratio").mean, row.worst("norm_ratio")
                cells = [cut(r, 4) for r in ratio]
            whole = row.whole.figures
            error = whole["relative_error"].mean
            cells += ["–" if error is None else f"{error:.3g}"]
            cells += [cut(whole["sign_agreement"].mean, 4)]
            descends = row.whole.descends
            table.add_row(row.arm.name, *cells, "–" if descends is None else f"{descends:.0%}")
        return table

    def _costs(self) -> Table:
        heads = ["evaluations", "ms", "MiB", "free", "adjoint", "response"]
        table = _table("Cost; worst residuals of the free phase and the adjoint", *heads)
        table.add_row(self.reference.arm.name, *_cost_cells(self.reference.as_dict()), style="dim")
        for row in self.rows:
            table.add_row(row.arm.name, *_cost_cells(row.as_dict()))
        return table

    @staticmethod
    def _cell(row: Row, name: str, figure: str, digits: int) -> str:
        agreements = row.parameters[name]
        mark = "†" if agreements.flags else ""
        return cut(agreements.figures[figure].mean, digits) + mark

    def _notes(self) -> list[str]:
        notes = []
        for row in self.rows:
            for name, flags in row.flags.items():
                why = "; ".join(f"{flag} in {n} of {len(self.trials)}" for flag, n in flags.items())
                notes.append(f"† {row.arm.name}, {name}: {why}; left out of the means")
            notes += [f"! {row.arm.name}: {failure}" for failure in row.failures]
        return notes


def _check_target(path: str | Path) -> None:
    target = Path(path).expanduser()
    if target.is_dir():
        raise DataError(f"{path} is a folder: give the path of a file to write")
    if not target.parent.is_dir():
        raise DataError(f"cannot write {path}: there is no folder {target.parent}")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass  # permissions alone do not tell: the file system may be read-only
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def _write(path: str | Path, write: Callable[[BinaryIO], object]) -> Path:
    """Let `write` fill a file beside `path`, then put it in place in one step."""
    _check_target(path)
    target = Path(path).expanduser()
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with fresh.open("wb") as file:
            write(file)
        os.replace(fresh, target)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        fresh.unlink(missing_ok=True)
    return target


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


def _finite(value: Any) -> Any:
    """Return plain data without NaN and infinity, which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("arm", overflow="fold")
    for column in columns:
        # names may take a second line; figures may not lose a digit
        table.add_column(column, justify="right", overflow="fold", no_wrap=column != "worst at")
    return table


def cut(value: float | None, digits: int) -> str:
    """Write a figure with its digits cut, not rounded, so that only a cosine of 1 reads as 1."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{math.trunc(value * 10**digits) / 10**digits:.{digits}f}"


def _cost_cells(cost: Mapping[str, Any]) -> list[str]:
    """Write what `_cost_dict` holds as the cells of a row."""
    small = (cost["residuals"]["free"], cost["residuals"]["adjoint"], cost["response"])
    return [
        cut(cost["evaluations"], 1),
        cut(cost["milliseconds"], 1),
        cut(cost["peak_bytes"] / 2**20, 2),
        *("–" if value is None else f"{value:.1e}" for value in small),
    ]

"""The tables of an audit, for a terminal of 100 columns: direction, size and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from altprop.auditing.rows import Reference, Row

WIDTH = 100  # of a terminal; parameters that would not fit make no columns, but a digest


def tables(reference: Reference, rows: Sequence[Row], trials: int) -> Group:
    """Return the three tables, and a line for every figure that is missing and solve that failed.

    **Arguments:** `trials`, how many there were.
    """
    names = list(rows[0].parameters)
    beside = min(30, max(len(row.arm.name) for row in rows)) + 30  # the arm, the mean, the worst
    fits = sum(max(8, len(name)) + 2 for name in names) <= WIDTH - beside
    columns = names if fits else []
    return Group(
        _directions(reference, rows, columns, trials),
        _sizes(rows, columns),
        _costs(reference, rows),
        *_notes(rows, trials),
    )


def cut(value: float | None, digits: int) -> str:
    """Write a figure with its digits cut, not rounded, so that only a cosine of 1 reads as 1."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{math.trunc(value * 10**digits) / 10**digits:.{digits}f}"


def _directions(
    reference: Reference, rows: Sequence[Row], columns: Sequence[str], trials: int
) -> Table:
    digest = [] if columns else ["parts", "worst at"]
    title = f"Cosine to {reference.arm.name} ({trials} trial{'s' * (trials > 1)})"
    table = _table(title, *columns, *digest, "mean ± 95 %" if trials > 1 else "mean", "worst")
    for row in rows:
        figures = {n: a.figures["cosine"] for n, a in row.parameters.items()}
        cells = [_cell(row, name, "cosine", 5) for name in columns]
        if digest:
            known = {n: s.worst for n, s in figures.items() if s.worst is not None}
            cells = [str(len(known)), min(known, key=lambda n: known[n]) if known else "–"]
        mean = row.mean("cosine")
        interval = "" if mean.half_width is None else f" ± {mean.half_width:.4f}"
        cells += [f"{cut(mean.mean, 5)}{interval}", cut(row.worst("cosine"), 5)]
        table.add_row(row.arm.name, *cells)
    return table


def _sizes(rows: Sequence[Row], columns: Sequence[str]) -> Table:
    title = "Norm ratio; relative error, equal signs and descent over all parameters"
    digest = [] if columns else ["mean ratio", "worst ratio"]
    table = _table(title, *columns, *digest, "error", "signs", "descends")
    for row in rows:
        cells = [_cell(row, name, "norm_ratio", 4) for name in columns]
        if digest:
            cells = [cut(r, 4) for r in (row.mean("norm_ratio").mean, row.worst("norm_ratio"))]
        whole, descends = row.whole.figures, row.whole.descends
        error = whole["relative_error"].mean
        cells += ["–" if error is None else f"{error:.3g}"]
        cells += [cut(whole["sign_agreement"].mean, 4)]
        table.add_row(row.arm.name, *cells, "–" if descends is None else f"{descends:.0%}")
    return table


def _costs(reference: Reference, rows: Sequence[Row]) -> Table:
    heads = ["evaluations", "ms", "MiB", "free", "adjoint", "response"]
    every: list[Reference | Row] = [reference, *rows]
    cells = []
    for found in every:
        cost = found.as_dict()
        small = (cost["residuals"]["free"], cost["residuals"]["adjoint"], cost["response"])
        own = [cut(cost["evaluations"], 1), cut(cost["milliseconds"], 1)]
        own += [cut(cost["peak_bytes"] / 2**20, 2)]
        cells.append([*own, *("–" if value is None else f"{value:.1e}" for value in small)])
    kept = [i for i in range(len(heads)) if any(own[i] != "–" for own in cells)]
    table = _table(
        "Cost; worst residuals of the free phase and the adjoint", *(heads[i] for i in kept)
    )
    for found, own in zip(every, cells, strict=True):
        style = "dim" if found is reference else ""
        table.add_row(found.arm.name, *(own[i] for i in kept), style=style)
    return table


def _cell(row: Row, name: str, figure: str, digits: int) -> str:
    agreements = row.parameters[name]
    mark = "†" if agreements.flags else ""
    return cut(agreements.figures[figure].mean, digits) + mark


def _notes(rows: Sequence[Row], trials: int) -> list[str]:
    notes = []
    for row in rows:
        for name, flags in row.flags.items():
            why = "; ".join(f"{flag} in {n} of {trials}" for flag, n in flags.items())
            notes.append(f"† {row.arm.name}, {name}: {why}; left out of the means")
        notes += [f"! {row.arm.name}: {failure}" for failure in row.failures]
    return notes


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("arm", overflow="fold")
    for column in columns:
        # names may take a second line; figures may not lose a digit
        table.add_column(column, justify="right", overflow="fold", no_wrap=column != "worst at")
    return table

"""The bars of an audit: cosine above, norm ratio below, one group of bars per arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from altprop.auditing.rows import Reference, Row
from altprop.auditing.tables import cut

# Okabe and Ito's colours, which colour-blind readers can tell apart; more parameters than these are
# shown in a colour scale from first to last.
FEW = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
GROUP = 0.82  # the width of a group of bars; groups are 1 apart


def draw(reference: Reference, rows: Sequence[Row], trials: int) -> Figure:
    """Draw an audit; a bar is the mean over the trials, its whisker their range."""
    names = list(rows[0].parameters)
    few = len(names) <= len(FEW)
    if few:
        colours: Sequence[Any] = FEW[: len(names)]
    else:
        colours = [colormaps["viridis"](i / (len(names) - 1)) for i in range(len(names))]
    width = min(20.0, max(6.5, 1.0 + 1.25 * len(rows)))
    figure = Figure(figsize=(width, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axis, key, label in (
        (upper, "cosine", "cosine"),
        (lower, "norm_ratio", "norm ratio  ‖ĝ‖ / ‖g‖"),
    ):
        for place, name in enumerate(names):
            _bars(axis, rows, key, name, place, colours)
        for group, row in enumerate(rows):
            _caption(axis, row, key, group)
        axis.axhline(1, color="0.3", linewidth=0.8, zorder=0.5)
        axis.set_ylabel(label)
        axis.grid(axis="y", color="0.9", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", length=0)
    _frame(upper, lower, rows)
    lower.set_xticks(
        range(len(rows)),
        [row.arm.name.replace(" (", "\n(").replace(", ", ",\n") for row in rows],
    )
    lower.set_xlim(-0.6, len(rows) - 0.4)
    figure.suptitle(
        f"Gradients beside {reference.arm.name}"
        + (f"; mean and range of {trials} trials" if trials > 1 else ""),
        x=0.01,
        ha="left",
        fontsize="medium",
    )
    shown = range(len(names)) if few else (0, len(names) - 1)
    handles = [upper.bar([0], [0], color=colours[i], label=names[i]) for i in shown]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        title=None if few else "parameters, from first to last",
    )
    return figure


def _bars(
    axis: Any, rows: Sequence[Row], key: str, name: str, place: int, colours: Sequence[Any]
) -> None:
    """Draw one parameter's bars; a cross stands where there is no figure."""
    size = GROUP / len(colours)
    for group, row in enumerate(rows):
        agreements = row.parameters[name]
        values = [v for t in agreements.trials if (v := getattr(t, key)) is not None]
        x = group + (place - (len(colours) - 1) / 2) * size
        mean = agreements.figures[key].mean
        if mean is None:
            axis.plot([x], [0 if key == "cosine" else 1], "x", color=colours[place], markersize=5)
            continue
        base = 0.0 if key == "cosine" else 1.0  # a ratio is good where its bar is nothing
        axis.bar(x, mean - base, size * 0.92, base, color=colours[place], zorder=2)
        if base:  # so that a bar of no height can be seen
            axis.hlines(mean, x - 0.46 * size, x + 0.46 * size, colours[place], linewidth=2.2)
        if len(values) > 1:
            whisker = [[mean - min(values)], [max(values) - mean]]
            axis.errorbar(x, mean, whisker, color="0.25", linewidth=0.8, capsize=1.5, zorder=3)


def _caption(axis: Any, row: Row, key: str, group: int) -> None:
    """Write the mean over parameters and trials above a group: bars cannot tell 0.999 from 1."""
    mean = row.mean(key).mean
    if mean is None:
        return
    axis.annotate(
        cut(mean, 5 if key == "cosine" else 4),
        (group, 1.0),
        (0, 2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        fontsize="small",
        color="0.25",
    )


def _frame(upper: Any, lower: Any, rows: Sequence[Row]) -> None:
    """Set the axes so that perfect agreement stands at the same place in every audit."""
    cosines = [v for row in rows if (v := row.worst("cosine")) is not None]
    upper.set_ylim(min(0.0, 1.08 * min(cosines, default=0.0)), 1.05)
    ratios = [
        r
        for row in rows
        for a in row.parameters.values()
        for t in a.trials
        if (r := t.norm_ratio) is not None and r > 0
    ]
    low, high = min([0.5, *ratios]) / 1.15, max([2.0, *ratios]) * 1.15
    lower.set_yscale("log", base=2 if high / low < 1000 else 10)
    lower.set_ylim(low, high)
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    lower.yaxis.set_minor_formatter(NullFormatter())

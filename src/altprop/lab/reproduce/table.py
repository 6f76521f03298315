"""What a figure and its measurement look like as words, on a terminal and on a page."""

from __future__ import annotations

from statistics import fmean

from altprop.lab.reproduce.figure import Figure, Measured
from altprop.statistics import half_width


def lines(figure: Figure, found: Measured) -> list[tuple[str, str, str]]:
    """Return of every line its name, the published value and ours with its 95 % interval."""
    return [
        (line, "–" if was is None else f"{was:g}", _measured(found.values.get(line, [])))
        for line, was in figure.published.items()
    ]


def brief(found: Measured) -> str:
    """Say how much was measured, how long it took, and on what."""
    if not found.seeds:
        return "not yet"
    seeds = "1 seed" if len(found.seeds) == 1 else f"{len(found.seeds)} seeds"
    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    return f"{seeds} in {found.seconds:,.0f} s, {threads} of {found.processor}"


def page(name: str, figure: Figure, found: Measured) -> str:
    """Return the figure's part of the page that shows them all, as Markdown."""
    rows = [f"| {line} | {was} | {ours} |" for line, was, ours in lines(figure, found)]
    return "\n".join(
        [
            f"### {figure.title}",
            "",
            f"`altprop reproduce {name}`. {figure.setting}. {figure.column.capitalize()}: "
            f"{figure.source}. Measured: {brief(found)}. {figure.differs}.",
            "",
            f"| {figure.unit} | {figure.column} | measured |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def _measured(values: list[float]) -> str:
    if not values:
        return "–"
    mean, digits = fmean(values), 3 if max(map(abs, values)) <= 1 else 2
    half = half_width(values)
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")

"""The command `altprop reproduce`: a published figure, measured again."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from altprop.errors import ConfigError, unknown
from altprop.lab.display import counting
from altprop.lab.reproduce import FIGURES
from altprop.lab.reproduce.figure import Figure, Measured, measured
from altprop.lab.reproduce.table import brief, lines, page

OUT = Path("runs/reproduce")


def reproduce(
    name: str | None = None, *, seeds: int | None = None, out: Path = OUT, markdown: bool = False
) -> Mapping[str, Measured]:
    """Measure a published figure again, or list the figures and what was measured of them.

    What was measured is kept in a folder, one file per figure, and is not measured twice: more
    seeds are added to those that are there.

    Args:
        name: Name of a figure; without it all are listed.
        seeds: Number of seeds, from 0 on; without it (or null), as many as the figure asks for.
        out: Folder that keeps what was measured.
        markdown: Print the figures that were measured as they stand on a page, and measure nothing.

    Returns:
        What there is of the figure, or of every figure, by name.
    """
    console = Console(highlight=False)
    if name is not None and name not in FIGURES:
        raise unknown("figure", name, FIGURES)
    if markdown:
        there = {each: Measured.read(_record(out, each)) for each in ([name] if name else FIGURES)}
        for each, found in there.items():
            if found.seeds:
                console.print(page(each, load(each), found), markup=False, soft_wrap=True)
        return there
    if name is None:
        if seeds is not None:
            raise ConfigError("--seeds needs a figure: altprop reproduce NAME --seeds 5")
        there = {each: Measured.read(_record(out, each)) for each in FIGURES}
        console.print(_list(there))
        return there
    figure = load(name)
    wanted = figure.seeds if seeds is None else seeds
    if wanted < 1:
        raise ConfigError(f"seeds is {wanted}, expected at least 1")
    found = Measured.read(_record(out, name))
    left = wanted - len([seed for seed in found.seeds if seed < wanted])
    out.mkdir(parents=True, exist_ok=True)
    with counting(left, "seed") as count:
        for now in measured(figure, wanted, _record(out, name)):
            found = now
            count()
    _show(console, figure, found)
    return {name: found}


def load(name: str) -> Figure:
    """Return the figure of that name."""
    module = name.replace("-", "_")
    return importlib.import_module(f"altprop.lab.reproduce.{module}").FIGURE


def _record(out: Path, name: str) -> Path:
    return out / f"{name}.json"


def _list(there: Mapping[str, Measured]) -> Table:
    table = Table("figure", "what it shows", "measured", title="Published figures")
    for name, found in there.items():
        table.add_row(name, FIGURES[name], brief(found))
    return table


def _show(console: Console, figure: Figure, found: Measured) -> None:
    table = Table(figure.unit, figure.column, "measured", title=figure.title)
    for row in lines(figure, found):
        table.add_row(*map(Text, row))
    console.print(table)
    for what, said in (
        ("Setting", figure.setting),
        ("Source", figure.source),
        ("Why they differ", figure.differs),
        ("Measured", brief(found)),
    ):
        console.print(f"{what}: {said}.", markup=False, soft_wrap=True)

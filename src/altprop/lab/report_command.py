"""Show a run or a comparison on one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from pathlib import Path

from altprop import AuditReport, CheckpointError, ConfigError
from altprop.files import write_whole
from altprop.lab.folder import is_comparison, is_run
from altprop.lab.reporting.comparison import read_comparison
from altprop.lab.reporting.comparison_page import comparison_page
from altprop.lab.reporting.picture import plot_comparison, plot_run
from altprop.lab.reporting.run_facts import run_facts
from altprop.lab.reporting.run_page import run_page
from altprop.lab.reporting.tidy import comparison_rows, run_rows, write_csv
from altprop.terminal import printable


def report(
    folder: Path,
    *,
    html: Path | None = None,
    png: Path | None = None,
    csv: Path | None = None,
    sample: int = 400,
    device: str = "auto",
) -> Path:
    """Write one HTML page about a run or a comparison, which loads nothing from anywhere.

    Args:
        folder: the folder of a run of `altprop train`, or of a comparison.
        html: where the page goes; report.html in the folder unless given.
        png: write the curves as a picture too; needs matplotlib.
        csv: write the curves as a table too: arm, seed, step, loss, score.
        sample: of a run, characters of text that its model writes for the page; 0 for none.
        device: of a run, `auto`, `cpu`, `cuda`, or any other that torch knows.

    Returns:
        The page's path.
    """
    compared = is_comparison(folder)
    if not compared and not is_run(folder):
        raise CheckpointError(
            f"{folder}: neither a run nor a comparison; give the folder of altprop train (with "
            "config.yaml and a tokenizer) or of a comparison (with comparison.yaml)"
        )
    page = html or folder / "report.html"
    targets = {name: path for name, path in (("html", page), ("png", png), ("csv", csv)) if path}
    _check(targets)
    draw: Callable[[Path], object]
    if compared:
        comparison = read_comparison(folder)
        text, rows = comparison_page(comparison), comparison_rows(comparison)
        draw = partial(plot_comparison, comparison)
    else:
        run = run_facts(folder, sample, device)
        text, rows = run_page(run), run_rows(run.config, run.records)
        draw = partial(plot_run, folder)
    write_whole(page, text)
    if png is not None:
        draw(png)
    if csv is not None:
        write_csv(csv, rows)
    for path in targets.values():
        print(printable(f"wrote {path}"))
    return page


def _check(targets: Mapping[str, Path]) -> None:
    """Refuse what cannot be written, before anything is.

    **Raises:** `ConfigError` for two names of one file, `DataError` for a place without one.
    """
    for (one, first), (other, second) in combinations(targets.items(), 2):
        if first.absolute() == second.absolute():
            raise ConfigError(f"{one} and {other} are both {first}: give each a file of its own")
    for name, path in targets.items():
        AuditReport.check_target(path, plot=name == "png")

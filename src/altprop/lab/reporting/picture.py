"""Pictures of a run or a comparison, for what shows no page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from altprop import ConfigError
from altprop.files import replacing
from altprop.lab.reporting.comparison import Comparison
from altprop.lab.reporting.metrics import read_metrics, refused_steps, series
from altprop.lab.reporting.thin import average

_CONTROLS = {"backprop": ("black", 2), "frozen": ("0.5", 2)}  # their colours and widths


def plot_run(folder: Path, path: Path | None = None) -> Path:
    """Draw the loss, residual and evaluation curves of a run, and return the picture's path.

    **Arguments:** `path`, where it goes; `curves.png` in the folder unless given.

    **Raises:** `ConfigError` without matplotlib; `CheckpointError` without metrics.
    """
    records = read_metrics(folder)
    figure = _figure(8, 7)
    loss, residual, evaluations = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2, 1.4]}
    )
    steps, losses = series(records, "loss")
    loss.plot(steps, losses, color="0.75", linewidth=0.8, label="training")
    steps, losses = series(records, "validation_loss")
    loss.plot(steps, losses, "o-", color="C0", markersize=4, label="validation")
    if unsettled := [r for r in records if r.get("validation_settled") is False]:
        loss.plot(*series(unsettled, "validation_loss"), "x", color="C3", zorder=3,
                  label=f"not at a fixed point ({len(unsettled)})")  # fmt: skip
    if losses:
        loss.annotate(
            f"{losses[-1]:.3f}", (steps[-1], losses[-1]), (8, 0), textcoords="offset points",
            va="center", color="C0",
        )  # fmt: skip
    loss.set_ylabel("cross-entropy (nats per token)")
    loss.legend(frameon=False, loc="upper right")

    for name, label in (("free_residual", "free"), ("adjoint_residual", "adjoint")):
        steps, values = series(records, name)
        if values:
            residual.semilogy(steps, values, linewidth=0.8, label=label)
    if refused := refused_steps(records):
        top = residual.get_xaxis_transform()
        residual.plot(refused, [0.97] * len(refused), "|", color="C3", transform=top,
                      label=f"refused ({len(refused)})")  # fmt: skip
    residual.set_ylabel("worst relative residual")
    for name, label in (("free_evaluations", "free"), ("adjoint_evaluations", "adjoint")):
        steps, values = series(records, name)
        if values:
            evaluations.plot(steps, values, linewidth=0.8, label=label)
    evaluations.set_ylabel("evaluations per step")
    evaluations.yaxis.get_major_locator().set_params(integer=True)
    evaluations.set_xlabel("step")
    for axis in (residual, evaluations):
        if axis.lines:
            axis.legend(frameon=False, ncols=3, loc="upper right")
        else:
            axis.text(0.5, 0.5, "no equilibrium in this model", ha="center", va="center",
                      transform=axis.transAxes, color="0.5")  # fmt: skip
    for axis in (loss, residual, evaluations):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)

    return _save(figure, path or folder / "curves.png")


def plot_comparison(comparison: Comparison, path: Path) -> Path:
    """Draw how close each arm of a comparison comes to backprop, and the mean curves.

    **Raises:** `ConfigError` without matplotlib.
    """
    task, arms = comparison.results["task"], comparison.arms
    scored = [arm for arm in arms if arm["mean"] is not None][::-1]  # drawn from below
    figure = _figure(11, max(4.0, 1.4 + 0.27 * len(scored)))
    scores, curves = figure.subplots(1, 2, gridspec_kw={"width_ratios": [3, 4]})
    unit = f"{task['score']} ({task['unit']})"
    for height, arm in enumerate(scored):
        low, high = arm["interval"] or (arm["mean"], arm["mean"])
        colour = "0.5" if arm["control"] else "C0"
        scores.plot([low, high], [height, height], color=colour, linewidth=1.5)
        scores.plot(arm["mean"], height, "o", color=colour, markersize=5)
    scores.set_yticks(range(len(scored)), [_literal(arm["name"]) for arm in scored])
    scores.set_xlabel(_literal(f"{unit}, mean and 95 % interval"))
    dashes = "-", "--", ":", "-."  # more arms than colours differ by their dashes
    looks = [(f"C{i % 10}", dashes[i // 10 % 4]) for i in range(len(arms))]
    drawn = [arm for arm in arms if arm["curves"]]
    for arm, (colour, dash) in zip(drawn, looks, strict=False):
        mean = average(arm["curves"])
        values = [math.nan if value is None else value for value in mean["score"]]
        colour, width = _CONTROLS.get(arm["rule"], (colour, 1))
        curves.plot(mean["steps"], values, dash, color=colour, linewidth=width,
                    label=_literal(arm["name"]))  # fmt: skip
    curves.set_xlabel("step")
    curves.set_ylabel(_literal(unit))
    if drawn:
        curves.legend(frameon=False, fontsize=7, ncols=1 + len(drawn) // 16)
    for axis in (scores, curves):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return _save(figure, path)


def plot_sweep(
    trials: Sequence[tuple[Mapping[str, Any], float | None, str]],
    options: Mapping[str, bool],
    path: Path,
) -> Path:
    """Draw the loss of every trial of a sweep against each option, the best one ringed.

    **Arguments:** `trials`, of each its values by option, its loss and its state; `options`, of
    each whether its axis is one of logarithms.

    **Raises:** `ConfigError` without matplotlib.
    """
    columns = min(3, len(options))
    rows = -(-len(options) // columns)
    figure = _figure(4 * columns, 3.4 * rows)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    done = [y for _, y, state in trials if state == "COMPLETE" and y is not None]
    done.sort()
    looks = {"COMPLETE": ("o", "C0", "complete"), "PRUNED": ("x", "0.6", "pruned")}
    for (name, log), axis in zip(options.items(), panels, strict=False):
        for state, (mark, colour, label) in looks.items():
            seen = [
                (v[name], loss)
                for v, loss, s in trials
                if s == state and name in v and loss is not None and math.isfinite(loss)
            ]
            if not seen:
                continue
            values = [_literal(v) if isinstance(v, str) else v for v, _ in seen]
            axis.plot(values, [y for _, y in seen], mark, color=colour, label=label, markersize=5)
            ringed = [(x, y) for x, (_, y) in zip(values, seen, strict=True) if y in done[:1]]
            if state == "COMPLETE":
                axis.plot(
                    *zip(*ringed, strict=True),
                    "o",
                    color="C3",
                    fillstyle="none",
                    markersize=11,
                    label="best",
                )
        if log:
            axis.set_xscale("log")
        axis.set_xlabel(_literal(name))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    for axis in panels:  # those that are left over
        axis.set_visible(False)
    figure.axes[0].set_ylabel("validation cross-entropy (nats per token)")
    if figure.axes[0].lines:
        figure.axes[0].legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('plots need matplotlib: pip install "altprop[plots]"') from None
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    with replacing(path) as fresh:
        figure.savefig(fresh, format="png", dpi=130)
    return path


def _literal(text: str) -> str:
    """Return text that matplotlib draws as it is: a dollar sign would start a formula."""
    return text.replace("$", r"\$")

"""Pictures of a run, drawn from its `metrics.jsonl` alone."""

from __future__ import annotations

from pathlib import Path

from altprop import ConfigError
from altprop.files import replacing
from altprop.lab.reporting.metrics import read_metrics, refused_steps, series


def plot_run(folder: Path) -> Path:
    """Draw the loss, residual and evaluation curves of a run into `curves.png`; return its path.

    **Raises:** `ConfigError` without matplotlib; `CheckpointError` without metrics.
    """
    records = read_metrics(folder)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('plots need matplotlib: pip install "altprop[plots]"') from None

    figure = Figure(figsize=(8, 7), layout="constrained")
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
    loss.legend(frameon=False)

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
            axis.legend(frameon=False, ncols=3)
        else:
            axis.text(0.5, 0.5, "no equilibrium in this model", ha="center", va="center",
                      transform=axis.transAxes, color="0.5")  # fmt: skip
    for axis in (loss, residual, evaluations):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)

    path = folder / "curves.png"
    with replacing(path) as fresh:
        figure.savefig(fresh, format="png", dpi=130)
    return path

"""The page of a run: what it reached, how it came there, and what its model does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from altprop.lab.config import LARGEST
from altprop.lab.reporting.markup import Markup, chart, markup, name, section, table, tag
from altprop.lab.reporting.metrics import Records, refused_steps, series
from altprop.lab.reporting.numbers import large, number
from altprop.lab.reporting.page import again, page
from altprop.lab.reporting.run_facts import RunFacts
from altprop.lab.reporting.thin import thin
from altprop.reading import read_bytes

MOST = 3000
"""How many points of a line are drawn."""


@dataclass(frozen=True)
class Panel:
    """One chart over the steps.

    **Arguments:** `lines`, of each its name, what it is called in the metrics, and its colour.
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str, str], ...]
    height: int = 180
    log: bool = False
    zero: bool = True


PANELS = (
    Panel(
        "Loss",
        "cross-entropy (nats per token)",
        (("training", "loss", "--control"), ("validation", "validation_loss", "--s0")),
        height=340,
        zero=False,
    ),
    Panel(
        "Residuals",
        "worst relative residual",
        (("free", "free_residual", "--s0"), ("adjoint", "adjoint_residual", "--s1")),
        height=220,
        log=True,
        zero=False,
    ),
    Panel(
        "Evaluations",
        "evaluations of the force per step",
        (("free", "free_evaluations", "--s0"), ("adjoint", "adjoint_evaluations", "--s1")),
        height=200,
    ),
    Panel("Gradient norm", "norm before clipping", (("norm", "gradient_norm", "--s2"),)),
    Panel("Learning rate", "learning rate", (("rate", "lr", "--s3"),)),
    Panel("Speed", "tokens per second", (("speed", "tokens_per_second", "--s6"),)),
)


def run_page(run: RunFacts) -> str:
    """Return the page of a run."""
    data = chart_data(run.records)
    options = read_bytes(run.folder / "config.yaml", LARGEST).decode("utf-8", "replace")
    title = f"{_text_name(run)}: {run.config.model} by {run.config.method}"
    body = markup(
        _head(title, run), _charts(data), _failures(run.records), _sample(run), _signals(run),
        again(run.record, options, run.config.data),
    )  # fmt: skip
    return page(title, body, data)


def chart_data(records: Records) -> dict[str, Any]:
    """Return what the charts of a run are drawn from: a panel for each thing that was measured."""
    panels: list[dict[str, Any]] = []
    for panel in PANELS:
        lines = []
        for label, key, colour in panel.lines:
            steps, values = series(records, key)
            if steps:
                kept = thin({"steps": steps, "values": values}, MOST)
                sparse = key == "validation_loss"
                lines.append({"name": label, "colour": colour, "sparse": sparse, **kept})
        if lines:
            nothing = {"doubts": {"steps": [], "values": []}, "refused": []}
            panels.append({**asdict(panel), "lines": lines, **nothing})
    if panels:
        doubted = [r for r in records if r.get("validation_settled") is False]
        steps, values = series(doubted, "validation_loss")
        panels[0]["doubts"] = {"steps": steps, "values": values}
        panels[0]["refused"] = refused_steps(records)
    last = max((record["step"] for record in records), default=1)
    return {"domain": [0, last], "panels": panels}


def _text_name(run: RunFacts) -> str:
    return run.config.data.rstrip("/").rpartition("/")[2].removesuffix(".txt")


def _head(title: str, run: RunFacts) -> Markup:
    records = run.records
    steps, losses = series(records, "validation_loss")
    settled = [r for r in records if r.get("validation_settled")]
    _, sound = series(settled, "validation_loss")
    _, final = series(records, "final_validation_loss")
    made = max((record["step"] for record in records), default=0)
    refused = len(refused_steps(records))
    figures = [
        (number(final[-1]) if final else "–", "nats per token on the validation part, at the end"),
        (number(min(sound)) if sound else "–", "best evaluation at a fixed point"),
        (f"{made:,} of {run.config.steps:,}", "steps"),
        (f"{refused:,}", "refused steps"),
        (large(run.parameters) if run.parameters else "–", "parameters"),
    ]
    facts = f"{run.config.data} · seed {run.config.seed} · run folder {run.folder}"
    doubt = markup()
    if made < run.config.steps:
        doubt = tag("p", f"Not finished: it stopped after step {made:,}.", class_="warning")
    elif not final:
        said = "Without the figure at its end: it was interrupted there."
        doubt = tag("p", said, class_="warning")
    tiles = (tag("div", tag("b", figure), tag("span", said)) for figure, said in figures)
    return tag(
        "header", tag("h1", title), tag("p", facts, class_="facts"), doubt,
        tag("div", *tiles, class_="tiles"),
    )  # fmt: skip


def _charts(data: dict[str, Any]) -> Markup:
    charts = []
    for index, panel in enumerate(data["panels"]):
        said = []
        if count := len(panel["doubts"]["steps"]):
            said.append(f"× {count} evaluations that were read from a state that is no equilibrium")
        if count := len(panel["refused"]):
            said.append(f"marks along the top: {count} refused steps")
        caption = "; ".join(said).capitalize()
        charts.append(chart("series", caption, data_panel=index, id=f"panel-{index}"))
    return section("Training", *charts, id="training") if charts else markup()


def _failures(records: Records) -> Markup:
    refused = refused_steps(records)
    if not refused:
        return markup()
    steps = tag("details", tag("summary", "which"), ", ".join(map(str, refused)))
    said = f"{len(refused)} steps were refused: their gradients were dropped."
    return section("Refused", tag("p", said), steps, id="refused")


def _sample(run: RunFacts) -> Markup:
    if not run.sample:
        return markup()
    said = f"Written by the checkpoint “{run.which}” (temperature 0.8, seed 0)."
    if run.unsettled:
        said += f" {run.unsettled} tokens were read from a state that is no equilibrium."
    return section(
        "A sample of its text", tag("p", said, class_="note"), tag("pre", run.sample), id="sample"
    )


def _signals(run: RunFacts) -> Markup:
    """Return which signal reaches each parameter, and how its weights were read."""
    if run.which is None:
        return markup()
    note = tag(
        "p",
        f"The last column was measured in one backward pass of the checkpoint “{run.which}”: how a "
        "weight was read while gradients were made. Backprop carries a cotangent through every "
        "weight as a matrix.",
        class_="note",
    )
    if run.explained:
        columns = ("rule", "signal", "feedback", "kind", "seed", "Wᵀ remains", "read backwards")
        head: tuple[str, ...] = ("parameter", *columns)
        rows = tuple((name(row[0]), *row[1:-1], name(row[-1])) for row in run.explained)
    else:
        head = ("parameter", "signal", "read backwards")
        rows = tuple((name(first), "backprop", name(how)) for first, how in run.read.items())
    return section(
        "What each parameter receives, and what was read backwards",
        note,
        table(head, rows, class_="first"),
        *(tag("p", f"Note: {said}", class_="note") for said in run.notes),
        id="signals",
    )

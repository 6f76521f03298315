"""Curves as one tidy table: a row for each arm, seed and step."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from altprop.files import replacing
from altprop.lab.reporting.comparison import Comparison
from altprop.lab.reporting.metrics import Records
from altprop.lab.settings import TrainConfig


class Row(NamedTuple):
    """What one arm reached with one seed at one step; None where it was not measured."""

    arm: str
    seed: int
    step: int
    loss: float | None
    score: float | None


def comparison_rows(comparison: Comparison) -> Iterator[Row]:
    """Yield every point of every arm's curves."""
    for arm in comparison.results["arms"]:
        for curve in arm["curves"]:
            columns = (curve[name] for name in ("steps", "loss", "score"))
            for step, loss, score in zip(*columns, strict=True):
                yield Row(arm["name"], curve["seed"], step, loss, score)


def run_rows(config: TrainConfig, records: Records) -> Iterator[Row]:
    """Yield every step of a run; its score is the validation loss, in nats per token."""
    steps: dict[int, dict[str, Any]] = {}
    for record in records:
        steps.setdefault(record["step"], {}).update(record)
    for step, found in steps.items():
        loss, score = found.get("loss"), found.get("validation_loss")
        yield Row(config.method, config.seed, step, loss, score)


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as a CSV file, whole or not at all; what was not measured is left empty."""
    with replacing(path) as fresh, fresh.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)

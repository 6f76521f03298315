"""What a run measured, read back from its `metrics.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from altprop import CheckpointError
from altprop.reading import parse_json, read_bytes
from altprop.shape import check_shape

LARGEST = 1 << 30  # bytes of a run's metrics
Records = list[dict[str, Any]]
_RECORD = {"step": int}
_FIGURES = {str: (float, bool, None)}


def read_metrics(folder: Path) -> Records:
    """Return the records of a run, one per line of its `metrics.jsonl`.

    **Raises:** `CheckpointError` if the folder has none or a line is no JSON object.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise CheckpointError(f"{folder}: no metrics.jsonl there; give a run folder of train")
    try:
        lines = read_bytes(path, LARGEST).decode("utf-8").splitlines()
        records = [parse_json(line) for line in lines]
        for number, record in enumerate(records, start=1):
            check_shape(record, _RECORD, f"line {number}")
            check_shape(record, _FIGURES, f"line {number}")
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not one JSON object a line, each of its step and figures ({error}): go on "
            "with the run by --resume, which takes what can be read"
        ) from None
    return records


def series(records: Records, name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which `name` was measured, and its values there."""
    pairs = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def refused_steps(records: Records) -> list[int]:
    """Return the steps whose gradient was refused: those at which the count went up."""
    steps, counts = series(records, "refused")
    before = [0, *counts]
    return [step for step, was, now in zip(steps, before, counts, strict=False) if now > was]

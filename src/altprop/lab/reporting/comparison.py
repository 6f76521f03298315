"""What a comparison found, read back from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altprop import CheckpointError
from altprop.lab.folder import FORMAT, LARGEST, OPTIONS, RESULTS
from altprop.lab.record import read_record
from altprop.reading import parse_json, read_bytes
from altprop.shape import check_shape

_NUMBER = (float, None)
_INTERVAL = ([_NUMBER, _NUMBER], None)
_ESTIMATE = ({"mean": _NUMBER, "interval": _INTERVAL}, None)
_COSTS = ("seconds_per_step", "relative", "evaluations", "peak_bytes", "carried_numbers")
_ARM = {
    "name": str, "rule": str, "control": bool, "refused": (str, None), "failed": (str, None),
    "rates": ([{"lr": float, "score": _NUMBER}], None), "lr": _NUMBER, "edge": bool,
    "scores": [_NUMBER], "mean": _NUMBER, "interval": _INTERVAL, "difference": _ESTIMATE,
    "recovery": _ESTIMATE,
    "cost": ({f"{name}?": _NUMBER for name in (*_COSTS, "parameters")}, None),
    "equal_cost": ({"steps": int, "mean": _NUMBER, "interval": _INTERVAL}, None),
    "curves": [{"seed": int, "steps": [int], "loss": [_NUMBER], "score": [_NUMBER]}],
    "audit": (
        [{"step": int, "groups": [{"name": str, "cosine": _NUMBER, "ratio": _NUMBER}]}], None,
    ),
    "read": ([{"parameter": str, "how": str}], None),
}  # fmt: skip
_RESULTS = {
    "task": {
        "name": str, "data": str, "score": str, "unit": str, "better": str, "chance": _NUMBER,
    },
    "steps": int, "seeds": [int], "finished": bool, "arms": [_ARM],
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """A comparison's folder.

    **Arguments:** `results`, as `results.json` has them; `record`, the command, the versions and
    the machine; `options`, the text of `comparison.yaml`.
    """

    folder: Path
    results: dict[str, Any]
    record: dict[str, Any]
    options: str

    @property
    def arms(self) -> list[dict[str, Any]]:
        """What was found of every arm, the best first and those without a score last."""
        sign = 1 if self.results["task"]["better"] == "lower" else -1

        def order(arm: Mapping[str, Any]) -> tuple[bool, float]:
            return arm["mean"] is None, sign * (arm["mean"] or 0.0)

        return sorted(self.results["arms"], key=order)


def read_comparison(folder: Path) -> Comparison:
    """Return what lies in a comparison's folder.

    **Raises:** `CheckpointError` if it has no results yet, or what is there is of another format.
    """
    path = folder / RESULTS
    if not path.exists():
        raise CheckpointError(f"{folder}: no results.json there yet; go on with the comparison")
    results = _object(path)
    if results.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: its format is {results.get('format')!r}, expected {FORMAT!r}: compare again "
            "with this version of altprop"
        )
    try:
        check_shape(results, _RESULTS)
        for index, arm in enumerate(results["arms"]):
            _check_arm(arm, f"arms[{index}]")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}: compare again") from None
    return Comparison(
        folder=folder,
        results=results,
        record=read_record(folder),
        options=read_bytes(folder / OPTIONS, LARGEST).decode("utf-8", "replace"),
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(read_bytes(path, LARGEST))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return found


def _check_arm(arm: Mapping[str, Any], where: str) -> None:
    """Refuse an arm whose curves have columns of several lengths, or an interval that is none."""
    for index, curve in enumerate(arm["curves"]):
        if len({len(curve[name]) for name in ("steps", "loss", "score")}) > 1:
            raise ValueError(f"{where}.curves[{index}] has columns of several lengths")
    for name in (None, "difference", "recovery", "equal_cost"):
        low, high = ((arm if name is None else arm[name]) or {}).get("interval") or (None, None)
        if low is not None and high is not None and low > high:
            raise ValueError(f"{where} has an interval from {low:g} to {high:g}")

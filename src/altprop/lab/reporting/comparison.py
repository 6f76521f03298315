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

_TOP = ("task", "steps", "seeds", "finished", "arms")
_TASK = ("name", "data", "score", "unit", "better", "chance")
_ARM = (
    *("name", "rule", "control", "refused", "failed", "rates", "lr", "edge", "scores", "mean"),
    *("interval", "difference", "recovery", "cost", "equal_cost", "curves", "audit", "read"),
)


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
    _check(path, "", results, _TOP)
    _check(path, "task", results["task"], _TASK)
    for index, arm in enumerate(results["arms"]):
        _check(path, f"arms[{index}]", arm, _ARM)
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


def _check(path: Path, place: str, found: object, keys: tuple[str, ...]) -> None:
    """Refuse an object that lacks one of the keys."""
    missing = [key for key in keys if not isinstance(found, Mapping) or key not in found]
    if missing:
        where = f"{place} has" if place else "there is"
        raise CheckpointError(f"{path}: {where} no {', '.join(missing)}: compare again")

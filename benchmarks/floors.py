"""What a ratio of times may not fall behind: `floors.json`, and the comparison with it.

A floor is a ratio that was measured, with room for another machine. A ratio is behind its floor
only if it is so by more than the noise of its own rounds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from altprop.lab.timing import Ratio

PATH = Path(__file__).with_name("floors.json")


@dataclass(frozen=True)
class Floor:
    """The bound of the ratio of two arms' times, and which side of it is `better`."""

    over: str
    under: str
    bound: float
    better: Literal["lower", "higher"]

    def __post_init__(self) -> None:
        if self.better not in ("lower", "higher"):
            raise ValueError(f"better is {self.better!r}, expected 'lower' or 'higher'")

    def complaint(self, measured: Ratio) -> str | None:
        """Return what is wrong with a measured ratio, or None."""
        sign = 1 if self.better == "lower" else -1
        if sign * (measured.median - self.bound) <= measured.noise:
            return None
        return (
            f"{self.over} / {self.under} is {measured.median:.3g} ± {measured.noise:.2g}, behind "
            f"its floor of {self.bound:g} ({self.better} is better)"
        )


def load(path: Path = PATH) -> list[Floor]:
    """Read the committed floors."""
    return [Floor(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def behind(floors: list[Floor], measured: Mapping[tuple[str, str], Ratio]) -> list[str]:
    """Return a complaint for every ratio that is behind its floor.

    **Arguments:** `measured`, by the names of both arms.
    """
    found = [floor.complaint(measured[floor.over, floor.under]) for floor in floors]
    return [complaint for complaint in found if complaint is not None]

"""The pages on estimators and solvers say what their benchmarks measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def test_the_page_prints_the_committed_table_of_solvers() -> None:
    table = (ROOT / "benchmarks" / "results" / "solvers.md").read_text().split("\n\n", 1)[1]
    assert table.strip() in (ROOT / "docs" / "solvers.md").read_text()


def test_the_page_says_what_the_comparison_of_linearisations_measured() -> None:
    rows: list[Any] = json.loads((ROOT / "benchmarks" / "results" / "tracking.json").read_text())
    text = (ROOT / "docs" / "estimators.md").read_text()
    pairs = [list(zip(row["free"], row["tracking"], strict=True)) for row in rows]
    for n in range(4):
        assert sum(pair[n][1]["error"] < pair[n][0]["error"] for pair in pairs) == 6
    assert "Tracking is nearer on 6 of 10 systems" in text
    ratios = [pair[0][1]["error"] / pair[0][0]["error"] for pair in pairs]
    assert sum(0.9 < ratio < 1.1 for ratio in ratios) == 9
    assert "differ by\nless than 10 %" in text

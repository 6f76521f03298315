"""The pages on estimators and solvers run as they are printed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["estimators", "solvers"])
def test_the_code_of_the_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), f"{page}.md", "exec"), {})
    assert capsys.readouterr().out


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

"""The page that follows a gradient through the files shows the way that a call takes now."""

from __future__ import annotations

import re

import pytest

from gradient_path import PACKAGE, PAGE, PATHS, ROOT, entered, followed, in_order, table

HOW = "run python benchmarks/gradient_path.py, and read whether the page's prose still holds"


@pytest.mark.parametrize("name", PATHS)
def test_the_page_and_its_picture_show_the_files_that_a_call_enters(name: str) -> None:
    trace = followed(name)
    assert table(trace) in PAGE.read_text(encoding="utf-8"), HOW
    names = in_order([file for files in trace.values() for file in files])
    picture = (ROOT / "docs" / "images" / f"path-{name}.svg").read_text(encoding="utf-8")
    assert re.findall(r">(\S+\.py)</text>", picture) == names, HOW
    assert f"images/path-{name}.svg" in PAGE.read_text(encoding="utf-8")


def test_a_call_is_noted_by_its_file_and_only_inside_the_package() -> None:
    from altprop.equilibrium.solvers.anderson import Anderson

    solver, files = entered(lambda: Anderson(tol=1e-3))
    assert solver == Anderson(tol=1e-3)
    assert "equilibrium/solvers/anderson.py" in files
    assert all((PACKAGE / file).is_file() for file in files)
    assert entered(lambda: re.sub("a", "b", "a")) == ("b", [])

"""The table of bugs fits the code, so that the nightly run tries what it says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from bugs.bug import Bug
from bugs.table import BUGS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.file}: {bug.old.strip()[:40]}")
def test_each_bug_changes_one_line_of_the_code_into_other_code(bug: Bug) -> None:
    text = (ROOT / "src" / "altprop" / bug.file).read_text()
    assert text.count(bug.old) == 1 and bug.old != bug.new
    ast.parse(text.replace(bug.old, bug.new))
    named = [name.partition("::")[0] for name in bug.tests.split()]
    assert all((ROOT / "tests" / name).exists() for name in named)

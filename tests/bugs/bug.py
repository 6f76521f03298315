"""What one bug of the table is."""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    """`old` in a file below `src/altprop` becomes `new`; `tests`, which should notice, go first.

    `harmless` says why a bug that nobody notices is none.
    """

    file: str
    old: str
    new: str
    tests: str = ""
    harmless: str = ""

"""The bugs that `mutations.py` puts into the code: a table, by folder."""

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


_AEP = "equilibrium/estimators/"
_CONTRAST = "equilibrium/test_contrast.py equilibrium/test_warm_start.py"
_STACK = "equilibrium/test_stack_blocks.py test_layered.py"

BUGS = [
    Bug(_AEP + "confirm.py", "minus = phases.drive(-1.0, -first) + across", "minus = phases.drive(-1.0, -first) - across", _CONTRAST),  # noqa: E501
    Bug(_AEP + "confirm.py", "return (4 * near - pair) / 3", "return (4 * near - pair) / 4", "equilibrium/test_nudges.py"),  # noqa: E501
]

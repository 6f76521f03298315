"""All bugs that `mutations.py` puts into the code."""

from __future__ import annotations

from bugs import (
    application,
    contracts,
    equilibrium,
    estimators,
    inputs,
    layered,
    measuring,
    places,
    rules,
    sharing,
    solvers,
)

FOLDERS = (
    rules,
    places,
    equilibrium,
    sharing,
    solvers,
    estimators,
    layered,
    measuring,
    contracts,
    application,
    inputs,
)
BUGS = [bug for folder in FOLDERS for bug in folder.BUGS]

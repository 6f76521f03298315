"""All bugs that `mutations.py` puts into the code."""

from __future__ import annotations

from bugs import estimators, layered, places, rules

FOLDERS = (rules, places, estimators, layered)
BUGS = [bug for folder in FOLDERS for bug in folder.BUGS]

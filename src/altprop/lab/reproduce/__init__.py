"""Published figures, each in a file of its own and measured again by one command.

`FIGURES` is all that the command knows of them; a figure is imported when it is asked for.
"""

from __future__ import annotations

FIGURES = {
    "reference": "how far published estimators are from the exact gradient",
    "feedback-cosines": "where feedback alignment is right inside a transformer block",
}

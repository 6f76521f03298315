"""Published figures, each in a file of its own and measured again by one command.

`FIGURES` is all that the command knows of them; a figure is imported when it is asked for.
"""

from __future__ import annotations

FIGURES = {
    "reference": "how far published estimators are from the exact gradient",
    "teacher": "direct feedback on a random teacher's labels, as the classes grow",
    "weight-transport": "feedback alignment, Kolen-Pollack, weight mirror: accuracies and angles",
    "skew-coupling": "a system whose gradient naive equilibrium propagation does not follow",
    "parity": "how many epochs sparse parity takes by local feedback",
    "predictive-coding": "a small character model beside a predictive-coding one",
    "residual-penalty": "direct feedback below frozen blocks, and what a penalty repairs",
    "feedback-cosines": "where feedback alignment is right inside a transformer block",
}

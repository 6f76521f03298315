"""What an error that answers bad input says."""

from __future__ import annotations

import pytest

from altprop import AltpropError


def one_line(caught: pytest.ExceptionInfo[AltpropError]) -> str:
    """Return what the error says, which has to be one line."""
    text = str(caught.value)
    assert "\n" not in text
    return text

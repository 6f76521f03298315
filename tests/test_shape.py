"""Data has its shape or is refused with the place where it has not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altprop.shape import LARGEST, check_shape

SHAPE = {
    "name": str,
    "done": bool,
    "steps": [int],
    "interval": ([float, float], None),
    "more?": {str: {"loss": (float, None)}},
}
GOOD: dict[str, Any] = {"name": "a", "done": True, "steps": [1, 2], "interval": [0, 1.5]}


@pytest.mark.parametrize(
    "changes",
    [
        {"interval": None},
        {"steps": []},
        {"more": {"a": {"loss": None}, "": {"loss": -1e9}}},
        {"unknown": object()},
        {"name": "\udcff"},  # as of a path that is no UTF-8
        {"interval": [-LARGEST, LARGEST]},
    ],
)
def test_what_has_the_shape_passes(changes: dict[str, Any]) -> None:
    check_shape({**GOOD, **changes}, SHAPE)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": 7}, "name is 7, expected a text"),
        ({"done": 1}, "done is 1, expected true or false"),
        ({"steps": {}}, "steps is a mapping, expected a list"),
        ({"steps": [1, True]}, r"steps\[1\] is True, expected a whole number"),
        ({"steps": [2**63]}, r"steps\[0\] is 9223372036854775808, expected a whole number"),
        ({"interval": [0.0]}, "interval has 1 values, expected 2"),
        ({"interval": [0.0, float("nan")]}, r"interval\[1\] is nan, expected a number"),
        ({"interval": [0, 10**400]}, r"interval\[1\] is 1000.*0, expected a number"),
        ({"interval": 3}, "interval is 3, expected a list or null"),
        ({"more": {"a": {}}}, "more.a has no loss"),
        ({"more": {7: {"loss": 1}}}, "a name in more is 7, expected a text"),
        ({"more": []}, "more is a list, expected a mapping"),
    ],
)
def test_the_first_place_that_does_not_fit_is_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"^{told}$"):
        check_shape({**GOOD, **changes}, SHAPE)
    with pytest.raises(ValueError, match="there is no name, steps$"):
        check_shape({"done": True, "interval": None}, SHAPE)


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside),
)


@given(JSON)
@settings(max_examples=50, deadline=None)
def test_whatever_it_is_it_passes_or_is_one_short_line(data: Any) -> None:
    for shape in (SHAPE, [SHAPE], {str: (float, [str], None)}, (int, [bool]), str):
        try:
            check_shape(json.loads(json.dumps(data)), shape)
        except ValueError as error:
            assert "\n" not in str(error)

"""HTML by values: what is not `Markup` already is escaped, so that no text ever becomes markup."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any


class Markup(str):
    """HTML that may stand in a page as it is."""


def markup(*inside: object) -> Markup:
    """Return what is inside one after the other, escaped where it is no `Markup`."""
    parts = (part if isinstance(part, Markup) else html.escape(str(part)) for part in inside)
    return Markup("".join(parts))


def tag(name: str, *inside: object, **attributes: object) -> Markup:
    """Return an element; an attribute is written without the underscore at its end (`class_`).

    >>> tag("p", "a < b", class_="x")
    '<p class="x">a &lt; b</p>'
    """
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{words}>{markup(*inside)}</{name}>")


def name(text: str) -> Markup:
    """Return a long name that may be broken behind its marks."""
    parts = re.split(r"(?<=[(,=._])", text)
    inside = [part for pair in zip(parts, repeat(Markup("<wbr>")), strict=False) for part in pair]
    return tag("span", *inside[:-1], class_="name")


def table(head: Sequence[object], rows: Iterable[Sequence[object]], **attributes: object) -> Markup:
    """Return a table that scrolls sideways where it is wider than the page."""
    body = (tag("tr", *(tag("td", cell) for cell in row)) for row in rows)
    whole = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))),
        tag("tbody", *body),
        **attributes,
    )
    return tag("div", whole, class_="wide")


def section(title: str, *inside: object, id: str) -> Markup:
    """Return a part of the page under its title."""
    return tag("section", tag("h2", title), *inside, id=id)


def chart(name: str, caption: object, **attributes: object) -> Markup:
    """Return the place where the page's script draws the chart of that name."""
    return tag(
        "figure",
        tag("div", class_="controls"),
        tag("div", class_="drawing"),
        tag("figcaption", caption),
        data_chart=name,
        **attributes,
    )


def embedded(data: object) -> Markup:
    """Return JSON that ends no script and starts no comment, whatever text is in it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # U+2028 is escaped there
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return Markup(text)


def finite(value: Any) -> float | None:
    """Return a number to six significant digits, or None for what is none."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")

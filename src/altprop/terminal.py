"""Text of somebody else is shown so that a terminal obeys none of it."""

from __future__ import annotations

import re

# C0 and C1 controls, what breaks lines or turns the direction of writing, and half characters
_OBEYED = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]"
)


def printable(text: str, keep: str = "") -> str:
    r"""Return a text with all that a terminal would obey written as Python escapes it.

    **Arguments:** `keep`, characters that stay, such as line breaks.

    >>> printable("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    return _OBEYED.sub(lambda m: m[0] if m[0] in keep else _escaped(m[0]), text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")

"""Text of somebody else is shown so that a terminal obeys none of it."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator

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


class _Aside:
    """Standard error of the process while a library writes to it, and how many calls it is for."""

    lock = threading.Lock()
    calls, screen = 0, -1


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Drop what a library writes to standard error past Python, such as the panics of Rust.

    They raise an exception too, which says the same.
    """
    with _Aside.lock:
        if _Aside.calls == 0:
            with contextlib.suppress(OSError):  # of a process without one
                _Aside.screen = os.dup(2)
                nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
                os.dup2(nowhere, 2)
                os.close(nowhere)
        _Aside.calls += 1
    try:
        yield
    finally:
        with _Aside.lock:
            _Aside.calls -= 1
            if _Aside.calls == 0 and _Aside.screen >= 0:
                os.dup2(_Aside.screen, 2)
                os.close(_Aside.screen)
                _Aside.screen = -1

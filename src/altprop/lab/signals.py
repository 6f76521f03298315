"""A signal asks a run to end: it finishes its step and saves; a second one ends it at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(KeyboardInterrupt):
    """A signal has ended a run. `status` is the customary exit status, such as 143 of SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


ECHO = 5.0  # seconds within which a launcher has passed on what its processes were told already
# Ctrl-C, the batch system or `kill`, and the terminal that is closed
_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interruptible(launched: bool = False) -> Iterator[Callable[[], int]]:
    """Let Ctrl-C, SIGTERM or SIGHUP ask for a stop after the current step: give its number, or 0.

    A second signal raises `Stopped` at once. A SIGHUP that is ignored, as under nohup, stays so.

    **Arguments:** `launched`, whether this is one of the processes of a launcher, which passes on a
    signal that the terminal has given to all of them.
    """
    asked: list[tuple[int, float]] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def ask(number: int, frame: Any) -> None:
        now = time.monotonic()
        if asked:
            first, since = asked[0]
            # a terminal that is closed says so to its shell and to the run, and so does the shell
            if number == first == signal.SIGHUP and now < since + 1:
                return
            if launched and now < since + ECHO:
                return
            raise Stopped(number)
        asked.append((number, now))

    before = {}
    for number in _ASKING:
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, ask)
    try:
        yield lambda: asked[0][0] if asked else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

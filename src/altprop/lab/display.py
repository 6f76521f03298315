"""What a person sees while a run goes on: two live lines on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from altprop.lab.evaluation import Evaluation
from altprop.lab.ranks import leads
from altprop.lab.state import Progress
from altprop.terminal import printable


class Lasting(io.TextIOBase):
    """Writes to a stream for as long as it is there: a run outlives its terminal or its reader.

    After that nothing more is written to it, nor by Python when it exits.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._gone = stream, False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        return not self._gone and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # by which rich chooses its characters
        return self._stream.encoding

    def _try(self, act: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            act()
        except UnicodeError:
            raise
        except (OSError, ValueError):  # no reader, no terminal, no space; or it has been closed
            self._gone = True
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())  # where its buffer goes, too
                os.close(nowhere)


class Display:
    """Shows step, loss, validation loss, tokens per second, residual, evaluations, time left.

    **Arguments:** `total`, the number of steps; `done`, how many a resumed run has made already;
    `console`, where to write (the terminal); `every`, seconds between lines where there is none;
    `quiet`, show the figure at the end alone.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        console: Console | None = None,
        every: float = 10.0,
        quiet: bool = False,
    ) -> None:
        self._last = console or _terminal()
        self._quiet = quiet
        self._console = _nowhere() if quiet else self._last
        self._total, self._every = total, every
        self._validation = math.nan
        self._shown = -math.inf
        self._started, self._first = time.monotonic(), done
        self._live: Live | None = None
        if self._console.is_terminal:
            self._bar = _bar(self._console)
            self._task = self._bar.add_task("step", total=total, completed=done)
            self._figures = Text()
            self._live = Live(Group(self._bar, self._figures), console=self._console)

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """Print a line of its own, as it is."""
        _say(self._console, text)

    def step(self, record: dict[str, Any]) -> None:
        """Show what a step measured."""
        words = self._words(record)
        if self._live is not None:
            self._bar.update(self._task, completed=record["step"])
            self._figures.plain = words
        elif time.monotonic() - self._shown >= self._every:
            self._shown = time.monotonic()
            self.note(f"step {record['step']}/{self._total}  {words}  {self._left(record['step'])}")

    def evaluation(self, step: int, seen: Evaluation) -> None:
        """Show a validation loss."""
        self._validation = seen.loss
        self.note(f"step {step}/{self._total}  validation loss {seen.loss:.4f}{_doubt(seen)}")

    def sample(self, text: str) -> None:
        """Show what the model has written, if it has."""
        if text:
            self._console.rule("a sample")
            self.note(text)
            self._console.rule()

    def finish(
        self, progress: Progress, final: Evaluation, windows: tuple[int, int], folder: Path
    ) -> None:
        """Show how the run ended.

        **Arguments:** `final`, the figure at its end; `windows`, how many of it and of how many.
        """
        minutes, seconds = divmod(round(time.monotonic() - self._started), 60)
        best = f"best {progress.best_loss:.4f}"
        if not math.isfinite(progress.best_loss):
            best = "no best: no evaluation was finite and at a fixed point"
        if self._quiet:
            line = f"validation cross-entropy {final.loss:.4f} nats per token; run folder {folder}"
            _say(self._last, line + _doubt(final))
        used, there = windows
        part = f"the whole validation part, {there:,} windows"
        if used < there:
            part = f"{used:,} of the validation part's {there:,} windows"
        self.note(f"validation cross-entropy {progress.loss:.4f} nats per token ({best})")
        self.note(f"over {part}: {final.loss:.4f}{_doubt(final)}")
        self.note(
            f"refused steps {progress.refused} of {self._total}; time {minutes}:{seconds:02d}; "
            f"run folder {folder}"
        )

    def _words(self, record: dict[str, Any]) -> str:
        parts = [f"loss {record['loss']:.3f}"]
        if math.isfinite(self._validation):
            parts.append(f"validation {self._validation:.3f}")
        parts.append(f"{record['tokens_per_second'] / 1e3:.1f}k tok/s")
        if "free_residual" in record:
            evaluations = record["free_evaluations"] + record["adjoint_evaluations"]
            parts += [f"residual {record['free_residual']:.0e}", f"{evaluations:.0f} evals"]
        if record["refused"]:
            parts.append(f"{record['refused']} refused")
        return "  ".join(parts)

    def _left(self, step: int) -> str:
        made = step - self._first
        left = (time.monotonic() - self._started) / max(1, made) * (self._total - step)
        return f"{int(left // 60)}:{int(left % 60):02d} left"


class Trials:
    """Shows the trials of a comparison as they are done.

    **Arguments:** `total`, about how many there will be; `done`, how many there are already;
    `console` and `every`, as of `Display`.
    """

    def __init__(
        self, total: int, done: int = 0, console: Console | None = None, every: float = 10.0
    ) -> None:
        self._console = console or _terminal()
        self._done, self._total, self._every = done, max(total, done), every
        self._shown = -math.inf
        self._bar = _bar(self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("trial", total=self._total, completed=done)

    def __enter__(self) -> Trials:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """Print a line of its own, as it is."""
        _say(self._console, text)

    def trial(self, name: str, outcome: Mapping[str, Any]) -> None:
        """Show that a trial is done, and how it ended."""
        self._done += 1
        self._total = max(self._total, self._done)
        self._bar.update(self._task, completed=self._done, total=self._total)
        trouble = outcome["refused"] or outcome["failed"]
        if trouble or time.monotonic() - self._shown >= self._every:
            self._shown = time.monotonic()
            score = "" if outcome["score"] is None else f"score {outcome['score']:.4g}"
            self.note(f"{self._done} of about {self._total}: {name}  {trouble or score}")


@contextmanager
def counting(total: int, what: str, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """Show on a terminal how much of `total` is done and the time left; count by what it gives."""
    console = _nowhere() if quiet else _terminal()
    with _bar(console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def _say(console: Console, text: str) -> None:
    # rich would take [brackets] for its markup and :names: for its pictures
    shown = printable(text, keep="\n\t")
    console.print(shown, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _terminal() -> Console:
    if not leads():  # of many processes the first shows what all of them do
        return Console(file=io.StringIO(), quiet=True)
    return Console(file=cast(TextIO, Lasting(sys.stdout)))


def _nowhere() -> Console:
    return Console(quiet=True, force_terminal=False)


def _bar(console: Console, **options: Any) -> Bar:
    return Bar(
        TextColumn("{task.description} {task.completed}/{task.total}"),
        BarColumn(bar_width=None),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        expand=True,
        **options,
    )


def _doubt(seen: Evaluation) -> str:
    """Return what has to be said of a figure that was read from states that are none."""
    if seen.settled:
        return ""
    return f"  NOT AT A FIXED POINT: free residual {seen.free_residual:.1e} past free_limit"

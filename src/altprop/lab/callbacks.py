"""What a run tells while it goes on: a callback gets frozen values, and may end the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from altprop import ProcessError
from altprop.errors import in_a_line
from altprop.lab.ranks import Ranks


@dataclass(frozen=True)
class Begin:
    """A run begins, or goes on.

    `folder`, the run's; `options`, as its `config.yaml` holds them; `step`, the steps that were
    made before, 0 of a new run.
    """

    folder: Path
    options: Mapping[str, Any]
    step: int


@dataclass(frozen=True)
class End:
    """A run has ended.

    `step`, the last that was made; `record`, the figure at its end, empty if it did not come so
    far; `error`, what ended it before, an interrupt too, or nothing.
    """

    step: int
    record: Mapping[str, Any] = field(default_factory=dict)
    error: BaseException | None = None


class Callback:
    """What a run calls; each method does nothing unless it is overridden.

    A record is a read-only mapping, the line that the run writes into `metrics.jsonl`. What a
    method raises ends the run, which has saved its checkpoint by then, and is raised by `train`.
    """

    def on_begin(self, begin: Begin) -> None:
        """Take notice of a run before its first step."""

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Take what a step measured, after the evaluation, if any, that follows it."""

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        """Take a validation loss and what it was read from, which are saved already."""

    def on_end(self, end: End) -> None:
        """Take notice of the end; every callback that was told of a begin is told of this."""


class Callbacks:
    """The callbacks of a run, which are told in their order, and of the end on leaving the block.

    Of many processes the first alone tells its callbacks; what one raises ends all of them.

    **Arguments:** `save`, writes the checkpoint to go on from; called before what a callback raises
    ends the run; `ranks`, the processes of the run.
    """

    def __init__(
        self, callbacks: Sequence[Callback], save: Callable[[], None], ranks: Ranks | None = None
    ) -> None:
        self._save, self._ranks = save, ranks or Ranks()
        self._callbacks = tuple(callbacks) if self._ranks.leads else ()
        self._any = bool(callbacks)
        self._begun: Sequence[Callback] = ()
        self._step = 0
        self._final: Mapping[str, Any] = {}

    def begin(self, begin: Begin) -> None:
        """Tell that a run begins."""
        self._step = begin.step
        self._begun = self._callbacks
        options = _frozen(begin.options)
        self._tell("on_begin", Begin(begin.folder, options, begin.step))

    def step(self, record: Mapping[str, Any]) -> None:
        """Tell what a step measured."""
        self._step = record["step"]
        self._tell("on_step", _frozen(record))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Tell what an evaluation measured."""
        self._tell("on_evaluation", _frozen(record))

    def final(self, record: Mapping[str, Any]) -> None:
        """Keep the figure at the end, for `on_end`."""
        self._final = _frozen(record)

    def _tell(self, method: str, value: Any) -> None:
        """Tell all of them, also where one raises: none misses what the run has kept."""
        if not self._any:
            return
        raised = _raised(self._callbacks, method, value)
        faults = self._ranks.same([f"{type(e).__name__}: {in_a_line(e)}" for e in raised])
        if faults:
            self._save()
            if not raised:
                raise ProcessError(f"a callback of rank 0 has ended the run ({faults[0]})")
            raise _with_notes(*raised)

    def __enter__(self) -> Callbacks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        raised = _raised(self._begun, "on_end", End(self._step, self._final, error))
        if error is not None:
            _with_notes(error, *raised)
        elif raised:
            raise _with_notes(*raised)


def _raised(callbacks: Sequence[Callback], method: str, value: Any) -> list[BaseException]:
    """Call a method of each, and return what they raise."""
    raised: list[BaseException] = []
    for callback in callbacks:
        try:
            getattr(callback, method)(value)
        except BaseException as error:
            raised.append(error)
    return raised


def _with_notes(first: BaseException, *others: BaseException) -> BaseException:
    for other in others:
        first.add_note(f"and then {type(other).__name__}: {other}")
    return first


def _frozen(value: Any) -> Any:
    """Return plain data that nobody can change."""
    if isinstance(value, Mapping):
        return MappingProxyType({name: _frozen(item) for name, item in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value

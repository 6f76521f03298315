"""Whether a study is that of a sweep: it is looked at in a copy, before anything is written."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import StaticPool

from altprop import CheckpointError
from altprop.errors import AltpropError, in_a_line
from altprop.lab.sweep.spec import Choices, Range, Spec
from altprop.reading import open_regular
from altprop.shape import check_shape

LARGEST = 1 << 32  # bytes of a study
PATIENCE = 600  # seconds, while another process writes


def check_study(path: Path, name: str, spec: Spec, runs: Path) -> None:
    """Refuse the file of a study that is damaged, or of a sweep of something else.

    **Arguments:** `name`, of the study in it; `runs`, the folder of its trials' runs, each of which
    was begun by values that it must hold.

    **Raises:** `CheckpointError`; `OSError` for what is no regular file.
    """
    if not os.path.lexists(path):
        return
    os.close(open_regular(path, LARGEST))
    with _refused(path), _copy(path) as storage:
        there = [study.study_name for study in storage.get_all_studies()]
        if there not in ([], [name]):  # none: it was begun, and no more
            raise ValueError(f"it holds the studies {', '.join(there)}, expected {name}")
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        if study.directions != [StudyDirection.MINIMIZE]:
            raise ValueError("it does not look for the lowest loss")
        _check_attributes(study.user_attrs, spec)
        begun = {int(run.name) for run in runs.glob("[0-9]" * 4 + "*") if run.name.isdecimal()}
        trials = study.get_trials(deepcopy=False)
        for number, trial in enumerate(trials):
            if trial.number != number:
                raise ValueError(f"trial {number} is missing")
            try:
                _check_trial(trial, spec, begun=number in begun)
            except ValueError as error:
                raise ValueError(f"trial {number}: {error}") from None
        if lost := begun - set(range(len(trials))):
            raise ValueError(f"trial {min(lost)} is missing")


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except AltpropError:
        raise
    except Exception as fault:  # of whatever SQLite, SQLAlchemy and Optuna raise for such a file
        why = in_a_line(fault.orig if isinstance(fault, DBAPIError) and fault.orig else fault)
        raise CheckpointError(
            f"{path}: damaged, or not the study of this sweep ({why}): put a copy of it there, or "
            "begin again with --overwrite"
        ) from fault


@contextmanager
def _copy(path: Path) -> Iterator[optuna.storages.RDBStorage]:
    """Give a copy of a study's file in memory, as of one moment."""
    where = f"file:{quote(os.fsencode(path.absolute()))}?mode=rw"
    with closing(sqlite3.connect(":memory:")) as copied:
        with closing(sqlite3.connect(where, timeout=PATIENCE, uri=True)) as source:
            source.backup(copied)
        for (found,) in copied.execute("PRAGMA quick_check(1)"):
            if found != "ok":
                raise ValueError(found)
        if orphan := copied.execute("PRAGMA foreign_key_check").fetchone():
            raise ValueError(f"{orphan[0]} holds a row of what is not there")
        engine = {"creator": lambda: copied, "poolclass": StaticPool, "connect_args": {}}
        storage = optuna.storages.RDBStorage("sqlite://", engine_kwargs=engine)
        try:
            yield storage
        finally:
            storage.remove_session()
            storage.engine.dispose()


def _check_attributes(held: Mapping[str, Any], spec: Spec) -> None:
    """Refuse what a sweep has not written about its ranges."""
    ranges = {name for name, it in spec.searched.items() if isinstance(it, Range)}
    check_shape(held, {"ranges?": {str: [float, float]}, "closed?": [[str, int, str]]})
    for name, (low, high) in held.get("ranges", {}).items():
        it = spec.searched.get(name)
        if not isinstance(it, Range) or not (low <= it.low and it.high <= high):
            raise ValueError(f"{name} is not searched from {low} to {high}")
        if it.log and low <= 0:
            raise ValueError(f"{name} is searched from {low}, expected a number > 0")
    if any(name not in ranges or end not in (-1, 1) for name, end, _ in held.get("closed", ())):
        raise ValueError("an end of what is no range is closed")


def _check_trial(trial: FrozenTrial, spec: Spec, *, begun: bool) -> None:
    """Refuse a trial that a sweep of this has not made."""
    check_shape(dict(trial.user_attrs), {"failed?": str, "beyond?": str})
    state, whole = trial.state, begun or trial.state.is_finished()
    names = set(spec.searched)
    if (trial.params.keys() != names) if whole else (trial.params.keys() - names):
        raise ValueError(f"it has the options {', '.join(trial.params) or 'of none'}")
    for name, value in trial.params.items():
        _check_value(name, value, trial.distributions[name], spec.searched[name])
    for name, value in trial.system_attrs.get("fixed_params", {}).items():
        _check_value(name, value, None, spec.searched[name])
    if state == TrialState.COMPLETE:
        check_shape(trial.values, [float], "its loss")
    for step, loss in trial.intermediate_values.items():
        if type(step) is not int or type(loss) is not float:
            raise ValueError(f"its loss at step {step!r:.40} is {loss!r:.40}")


def _check_value(
    name: str, value: object, held: BaseDistribution | None, searched: Range | Choices
) -> None:
    """Refuse a value of an option that its range or choices have not, or where it was drawn."""
    if isinstance(searched, Choices):
        fits, log = value in searched.words, False
        drawn = isinstance(held, CategoricalDistribution) and held.choices == searched.words
    else:
        check_shape(value, int if searched.whole else float, name)
        assert isinstance(value, (int, float))
        fits, log = not searched.log or value > 0, searched.log
        kind = IntDistribution if searched.whole else FloatDistribution
        drawn = isinstance(held, kind) and held.log == log and held.step in (None, 1)
    if not fits or not (drawn or held is None):
        raise ValueError(f"{name} is {value!r:.40}, which is not searched")

"""The study of a sweep: Optuna's, in a SQLite file that any number of processes work on.

Which trial comes next is decided under a lock, so that none is made twice and none too many. Each
trial that runs holds a lock of its own, which the death of its process gives back; the next one to
ask then goes on with it, from its run's last checkpoint.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.pool import NullPool

from altprop import CheckpointError, ConfigError
from altprop.lab.edges import beyond, open_ends, short, width
from altprop.lab.folder import LOCK, STUDY
from altprop.lab.lock import Lock
from altprop.lab.sweep.checked import PATIENCE, check_study
from altprop.lab.sweep.spec import Choices, Range, Spec

NAME, RUNS = "sweep", "trials"
APART, PAST = 0.1, 0.25  # of a range's width: what lies beyond the best, and how far to look
SEEDS = 1_000_003  # from a sweep's seed to that of another


@dataclass(frozen=True)
class Plan:
    """How many `trials`, how many more to `widen` a range, whether to `prune`, and the `seed`."""

    trials: int
    widen: int
    prune: bool
    seed: int


@dataclass(frozen=True)
class Taken:
    """A trial to be made by this process, its searched options as words, and its own lock."""

    trial: optuna.Trial
    words: dict[str, str]
    lock: Lock


class Study:
    """A sweep's study in its folder; `close` it, or use it in a `with` block."""

    def __init__(self, folder: Path, spec: Spec, plan: Plan) -> None:
        self.folder, self.spec, self.plan = folder, spec, plan
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        database = str((folder / STUDY).absolute())
        with self._alone():  # two processes may begin at once
            check_study(folder / STUDY, NAME, spec, folder / RUNS)
            (folder / RUNS).mkdir(exist_ok=True)
            self._storage = optuna.storages.RDBStorage(
                "sqlite://",
                engine_kwargs={
                    # whatever characters the folder's name has
                    "creator": lambda: sqlite3.connect(database, timeout=PATIENCE),
                    "poolclass": NullPool,
                    "connect_args": {},
                },
            )
            pruner = optuna.pruners.MedianPruner() if plan.prune else optuna.pruners.NopPruner()
            self._study = optuna.create_study(
                storage=self._storage, study_name=NAME, load_if_exists=True, pruner=pruner
            )

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self._storage.remove_session()
        self._storage.engine.dispose()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = Lock(self.folder / LOCK, wait=True)
        try:
            yield
        finally:
            lock.close()

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials, in their order."""
        return self._study.get_trials(deepcopy=False)

    @property
    def best(self) -> FrozenTrial | None:
        """The trial with the lowest loss, if any came so far."""
        done = [t for t in self.trials if t.state == TrialState.COMPLETE]
        return min(done, key=lambda t: (t.value, t.number)) if done else None

    def run_folder(self, number: int) -> Path:
        """Return the folder of a trial's run."""
        return self.folder / RUNS / f"{number:04}"

    def take(self) -> Taken | None:
        """Return a trial to be made: one whose process has died, or the next; or none."""
        with self._alone():
            trials = self.trials
            for running in (t for t in trials if t.state == TrialState.RUNNING):
                with suppress(CheckpointError):  # somebody holds the lock: it is alive
                    lock = self._lock(running.number)
                    # it may have been told of meanwhile; and without locks nobody can tell
                    if lock.held and self.trials[running.number].state == TrialState.RUNNING:
                        return self._taken(optuna.Trial(self._study, running._trial_id), lock)
                    lock.close()
            if sum("beyond" not in t.user_attrs for t in trials) >= self.plan.trials:
                # ends are judged once, when all is done; this process is not needed for that
                if any(t.state == TrialState.RUNNING for t in trials) or not self._look_beyond():
                    return None
            # a sampler for each trial, so that one of an interrupted sweep draws what it would have
            seed = (self.plan.seed * SEEDS + len(trials)) % 2**32
            self._study.sampler = optuna.samplers.TPESampler(seed=seed)
            trial = self._study.ask()
            return self._taken(trial, self._lock(trial.number))

    def _lock(self, number: int) -> Lock:
        folder = self.run_folder(number)
        return Lock(folder.with_name(f"{folder.name}.lock"))

    def _taken(self, trial: optuna.Trial, lock: Lock) -> Taken:
        words = {}
        for name, searched in self.searched().items():
            if isinstance(searched, Choices):
                words[name] = str(trial.suggest_categorical(name, searched.words))
            elif searched.whole:
                low, high = round(searched.low), round(searched.high)
                words[name] = searched.word(trial.suggest_int(name, low, high, log=searched.log))
            else:
                value = trial.suggest_float(name, searched.low, searched.high, log=searched.log)
                words[name] = searched.word(value)
        return Taken(trial, words, lock)

    def searched(self) -> dict[str, Range | Choices]:
        """Return what is searched, with ranges as wide as they have become."""
        wide = self._study.user_attrs.get("ranges", {})
        return {
            name: replace(it, low=wide[name][0], high=wide[name][1])
            if isinstance(it, Range) and name in wide
            else it
            for name, it in self.spec.searched.items()
        }

    def words(self, trial: FrozenTrial) -> dict[str, str]:
        """Return the searched options of a trial as words."""
        return {
            name: it.word(trial.params[name]) if isinstance(it, Range) else str(trial.params[name])
            for name, it in self.searched().items()
            if name in trial.params
        }

    def open_ends(self) -> list[tuple[str, int]]:
        """Return the ranges, and their ends, towards which nobody has looked beyond the best.

        A value counts as looked at where its trial was as good as none: pruned or diverged too.
        """
        best = self.best
        if best is None:
            return []
        seen = [t for t in self.trials if t.state.is_finished() and "unfit" not in t.user_attrs]
        found = []
        for name, it in self.spec.searched.items():
            if isinstance(it, Range):
                tried = [t.params[name] for t in seen if name in t.params]
                apart = APART * width(it.low, it.high, log=it.log)
                ends = open_ends(best.params[name], tried, log=it.log, apart=apart)
                found += [(name, end) for end in ends if (name, end) not in self.closed()]
        return found

    def closed(self) -> dict[tuple[str, int], str]:
        """Return the ends beyond which an option takes no value, and why."""
        held = self._study.user_attrs.get("closed", [])
        return {(name, end): why for name, end, why in held}

    def _look_beyond(self) -> bool:
        """Prepare the trial beyond the first open end, in a wider range where that ends there."""
        made = sum("beyond" in t.user_attrs for t in self.trials)
        while made < self.plan.widen and (ends := self.open_ends()):
            (name, end), best = ends[0], self.best
            spec = self.spec.searched[name]
            now = self.searched()[name]
            assert isinstance(spec, Range) and isinstance(now, Range) and best is not None
            distance = end * PAST * width(spec.low, spec.high, log=spec.log)
            value = beyond(best.params[name], distance, log=spec.log)
            away = abs(value - best.params[name])
            value = short(value, 0.1 * away)
            if spec.whole:  # at least the next one
                value = best.params[name] + end * max(1, round(away))
            wider = replace(now, low=min(now.low, value), high=max(now.high, value))
            try:
                self.spec.config({**self.words(best), name: wider.word(value)})
            except ConfigError as error:
                closed = [[n, e, why] for (n, e), why in self.closed().items()]
                self._study.set_user_attr("closed", [*closed, [name, end, str(error)]])
                continue
            ranges = self._study.user_attrs.get("ranges", {})
            ranges = {**ranges, name: [wider.low, wider.high]}
            self._study.set_user_attr("ranges", ranges)
            self._study.enqueue_trial({**best.params, name: value}, {"beyond": name})
            return True
        return False

    def tell(self, taken: Taken, value: float | None, state: TrialState, **said: Any) -> None:
        """Keep how a trial has ended, and let others have it."""
        for name, text in said.items():
            taken.trial.set_user_attr(name, text)
        self._study.tell(taken.trial, value, state)

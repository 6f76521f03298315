"""The trials of a sweep, in this process or side by side in processes of their own."""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from altprop import ConfigError, ConvergenceError, RuleError
from altprop.lab.callbacks import Callback
from altprop.lab.folder import is_run
from altprop.lab.signals import Stopped, interruptible
from altprop.lab.sweep.spec import Spec
from altprop.lab.sweep.study import Plan, Study, Taken
from altprop.lab.train import train
from altprop.terminal import printable


def work(study: Study, workers: int) -> None:
    """Make the trials of a study that are left.

    **Raises:** what ends a run for other reasons than its options; `Stopped` after saving.
    """
    if workers == 1:
        make_trials(study)
        return
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    with (
        interruptible() as asked,
        ProcessPoolExecutor(workers, context, initializer=_begin) as pool,
    ):
        futures = [pool.submit(_join, study.folder, study.spec, study.plan) for _ in range(workers)]
        while not asked() and wait(futures, 0.2, FIRST_EXCEPTION).not_done:
            if any(future.done() and future.exception() for future in futures):
                break
        if any(not future.done() for future in futures):
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()  # its run saves first
        errors = [error for future in futures if (error := future.exception()) is not None]
    if asked():
        raise Stopped(asked())
    for error in sorted(errors, key=lambda error: isinstance(error, BrokenProcessPool)):
        if not isinstance(error, BrokenProcessPool):
            raise error
        raise ConfigError(
            "a worker process was killed, perhaps for want of memory: go on with --resume and "
            f"--workers {max(1, workers // 2)}"
        )


def _join(folder: Path, spec: Spec, plan: Plan) -> None:
    with contextlib.suppress(KeyboardInterrupt), Study(folder, spec, plan) as study:
        make_trials(study)  # who interrupts it knows of that


def _begin() -> None:
    """Prepare a worker: one thread, no Ctrl-C of the terminal, and no life after its parent."""
    torch.set_num_threads(1)
    os.setpgrp()  # who is asked to end asks the workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()


def make_trials(study: Study) -> None:
    """Make trials, one after the other, as long as there are any."""
    while (taken := study.take()) is not None:
        try:
            said = _make(study, taken)
        finally:
            taken.lock.close()
        words = ", ".join(f"{name} {word}" for name, word in taken.words.items())
        print(printable(f"trial {taken.trial.number}: {words}: {said}"), flush=True)


class Reporter(Callback):
    """Reports a trial's validation losses, and ends it where it falls behind the others."""

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        loss = record["validation_loss"] if record["validation_settled"] else math.inf
        self._trial.report(loss, record["step"])
        if self._trial.should_prune():
            raise optuna.TrialPruned


def _make(study: Study, taken: Taken) -> str:
    """Make a trial, or go on with it, keep how it ended, and return that in words."""
    run = study.run_folder(taken.trial.number)
    begun = (run / "last.safetensors").exists()
    try:
        config = study.spec.config(
            taken.words, out=run, resume=begun, overwrite=not begun and is_run(run), quiet=True
        )
        with contextlib.redirect_stdout(io.StringIO()):
            result = train(config, callbacks=[Reporter(taken.trial)])
    except optuna.TrialPruned:
        study.tell(taken, None, TrialState.PRUNED)
        return "pruned"
    except (ConfigError, RuleError) as error:  # of options that do not go together
        return _failed(study, taken, str(error), unfit=True)
    except ConvergenceError as error:
        return _failed(study, taken, str(error))
    if not (result.settled and math.isfinite(result.final_loss)):
        return _failed(study, taken, "its figure at the end is not finite, or at no fixed point")
    study.tell(taken, result.final_loss, TrialState.COMPLETE)
    return f"{result.final_loss:.4f}"


def _failed(study: Study, taken: Taken, why: str, **said: Any) -> str:
    why = " ".join(why.split())
    study.tell(taken, None, TrialState.FAIL, failed=why, **said)
    return f"failed: {why}"

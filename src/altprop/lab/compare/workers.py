"""Where the trials run: in this process, or side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from altprop import ConfigError
from altprop.lab.compare.trial import Job, run_job, single_threaded
from altprop.lab.tasks.task import AbstractTask

Done = tuple[Job, dict[str, Any]]


def run_jobs(
    task: AbstractTask, folder: Path, workers: int, wanted: Callable[[], list[Job]]
) -> Iterator[Done]:
    """Do what is wanted, ask again whenever a job is done, and yield each with its outcome.

    **Arguments:** `wanted`, returns the jobs that can be done and are not done, running ones too.
    """
    running: dict[Future[dict[str, Any]], Job] = {}
    most = 1 if workers == 1 else 2 * workers  # no worker waits for the next
    with _executor(workers, task) as executor:
        while True:
            busy = {job.key for job in running.values()}
            for job in [job for job in wanted() if job.key not in busy][: most - len(busy)]:
                running[executor.submit(_run, job, folder)] = job
            if not running:
                return
            try:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    outcome = future.result()
                    yield running.pop(future), outcome
            except BrokenProcessPool:
                raise ConfigError(
                    "a worker process was killed, perhaps for want of memory: go on with --resume "
                    f"and --workers {max(1, workers // 2)}"
                ) from None


@contextmanager
def _executor(workers: int, task: AbstractTask) -> Iterator[Executor]:
    _Task.task = task
    if workers == 1:
        yield _Here()
        return
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(task,))
    try:
        yield pool
    finally:  # after an interrupt or an error no trial is waited for
        ours = set(multiprocessing.active_children()) - before
        pool.shutdown(wait=False, cancel_futures=True)
        for process in ours:
            process.terminate()


class _Here(Executor):
    """Does at once what is submitted."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(single_threaded(lambda: fn(*args, **kwargs)))
        return future


class _Task:
    """Holds the task of this process: it is sent once, and reads its data once."""

    task: AbstractTask


def _run(job: Job, folder: Path) -> dict[str, Any]:
    return run_job(_Task.task, job, folder)


def _begin(task: AbstractTask) -> None:
    """Prepare a worker: one thread, and no life after the process that it works for."""
    _Task.task = task
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asked for it ends the workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

"""The command `altprop sweep`, and the same in Python."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from json import dumps
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from altprop import CheckpointError, ConfigError
from altprop.files import write_whole
from altprop.lab.choices import at, defaults_of
from altprop.lab.config import WRITES, read_mapping
from altprop.lab.corpus import corpus_of
from altprop.lab.folder import (
    LOCK,
    PICTURE,
    SPEC,
    STUDY,
    check_files,
    check_place,
    check_ways,
    new_folder,
)
from altprop.lab.help import brief
from altprop.lab.lock import Lock
from altprop.lab.reporting.picture import plot_sweep
from altprop.lab.settings import TrainConfig
from altprop.lab.sweep.spec import Range, Spec, read_spec
from altprop.lab.values import homes, plain
from altprop.lm.text import check_context
from altprop.terminal import printable


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    `folder`; `best`, the options of the best trial, or nothing where there is none, or where it
    lies at the edge of a range; `loss`, the lowest validation cross-entropy in nats per token, also
    at an edge; `command`, the words that train by `best`; `edges`, the options at whose edge it
    lies.
    """

    folder: Path
    best: Mapping[str, str] | None
    loss: float | None
    command: str
    edges: tuple[str, ...]


def sweep(
    spec: Path,
    *,
    trials: int = 20,
    widen: int = 6,
    workers: int = 1,
    prune: bool = True,
    seed: int = 0,
    out: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> SweepResult:
    """Search options of training for the lowest validation loss, by Optuna.

    Trials that fall behind are ended early. A best that lies at the edge of a range is not called
    one: the range is widened and a trial made beyond it, until the loss rises on both sides.

    Args:
        spec: A YAML file: options as of train, and under `sweep` a range or choices for each one
            that is searched.
        trials: How many trials there are in all, those beyond edges left out.
        widen: How many more trials may look beyond the edge of a range.
        workers: Processes that make trials side by side, of one thread each; 1 makes them in this
            one.
        prune: Whether a trial ends early where its loss is above the median of the others.
        seed: Of what is drawn; each trial's own is that of the spec.
        out: The sweep's folder; a new one below runs/ unless given.
        resume: Go on with the sweep in the folder; also beside a process that works on it.
        overwrite: Replace a sweep that is in the folder.

    Returns:
        What was printed.
    """
    _check(trials, widen, workers, seed, out, resume, overwrite)
    asked = read_spec(spec)
    corners = [asked.config(words) for words in asked.corners()]
    check_context(corpus_of(corners[0]), max(config.context for config in corners))
    folder = out or new_folder(str(spec), "sweep")
    _open(folder, asked, resume=resume, overwrite=overwrite)

    from altprop.lab.sweep.study import Plan, Study
    from altprop.lab.sweep.workers import work

    print(printable(f"sweep of {', '.join(asked.searched)}; folder {folder}"), flush=True)
    with Study(folder, asked, Plan(trials, widen, prune, seed)) as study:
        work(study, workers)
        return _told(study, asked)


def _check(
    trials: int,
    widen: int,
    workers: int,
    seed: int,
    out: Path | None,
    resume: bool,
    overwrite: bool,
) -> None:
    for name, value, least in (("trials", trials, 1), ("widen", widen, 0), ("workers", workers, 1)):
        if value < least:
            raise ConfigError(f"{name} is {value}, expected at least {least}")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed is {seed}, expected a whole number from 0 to 2^32")
    check_ways("sweep", out, resume, overwrite)
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError('sweeps need the package optuna: pip install "altprop[sweep]"')


def _open(folder: Path, spec: Spec, *, resume: bool, overwrite: bool) -> None:
    """Make a sweep's folder, or find the one to go on in.

    **Raises:** `CheckpointError` for a sweep that is in the way, in use, or another one.
    """
    there = (folder / SPEC).is_file()
    left = {LOCK, f".{SPEC}.part"}
    free = not folder.exists() or folder.is_dir() and set(os.listdir(folder)) <= left
    check_place("sweep", folder, there, free, resume, overwrite)
    check_files(folder, (SPEC, STUDY, PICTURE))
    held = spec.as_plain()
    if resume:
        before = at(str(folder / SPEC), lambda: read_mapping(folder / SPEC))
        if changed := [n for n in {**held, **before} if held.get(n) != before.get(n)]:
            raise CheckpointError(
                f"{folder} was started with other values of {', '.join(changed)}: give those of "
                f"{folder / SPEC}, or start a new sweep"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if there:
            for path in folder.glob("trials/*.lock"):
                Lock(path).close()  # which raises if it is in use
            shutil.rmtree(folder / "trials", ignore_errors=True)
            for name in (STUDY, PICTURE):
                (folder / name).unlink(missing_ok=True)
        text = yaml.safe_dump(held, sort_keys=False, allow_unicode=True, width=10**6)
        write_whole(folder / SPEC, text)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror})") from None


def _told(study: Any, spec: Spec) -> SweepResult:
    """Draw the picture, and say what was found."""
    trials, best, searched = study.trials, study.best, study.searched()
    drawn = [(t.params, t.value, t.state.name) for t in trials if t.state.is_finished()]
    logs = {name: isinstance(it, Range) and it.log for name, it in searched.items()}
    try:
        picture = str(plot_sweep(drawn, logs, study.folder / PICTURE))
    except ConfigError as error:
        picture = f"no picture: {error}"
    states = [t.state.name for t in trials]
    counts = {"complete": "complete", "pruned": "pruned", "fail": "failed"}
    said = ", ".join(f"{states.count(k.upper())} {word}" for k, word in counts.items())
    print(printable(f"{len(trials)} trials: {said}; {picture}"))
    if best is None:
        why = [t.user_attrs["failed"] for t in trials if "failed" in t.user_attrs]
        print(printable(f"no best: no trial came to a figure{': ' + why[0] if why else ''}"))
        return SweepResult(study.folder, None, None, "", ())
    words = study.words(best)
    command = command_of(spec, words)
    for (name, end), why in study.closed().items():
        print(printable(f"{name} is searched to its {'end' if end > 0 else 'start'}: {why}"))
    edges = tuple(dict.fromkeys(name for name, _ in study.open_ends()))
    if edges:
        lie = ", ".join(f"{name} {words[name]}" for name in edges)
        print(
            printable(
                f"no best yet: the lowest loss, {best.value:.4f} of trial {best.number}, lies at "
                f"the edge of what was tried ({lie}): go on with --resume and a larger --widen"
            )
        )
        return SweepResult(study.folder, None, best.value, "", edges)
    print(
        printable(f"best: {best.value:.4f} nats per token, trial {best.number}; to train by it\n")
    )
    print(printable(f"\n  {command}", keep="\n"))
    return SweepResult(study.folder, words, best.value, command, ())


def command_of(spec: Spec, words: Mapping[str, str]) -> str:
    """Return the command that trains as a trial with these words did, ready for a shell."""
    config = spec.config(words)
    default = defaults_of(TrainConfig)
    said = ["altprop", "train", *(f"--import {module}" for module in sorted(homes(config)))]
    for name in (f.name for f in fields(config) if f.name not in WRITES):
        value = getattr(config, name)
        if value != default[name]:
            held = plain(value)
            whole = isinstance(value, (tuple, list, dict))
            said += [f"--{name}", quote(dumps(held) if whole else brief(value))]
    return " ".join(said)

"""What lies in the folder of a run, comparison or sweep, and what tells it from any other one."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from altprop import CheckpointError, ConfigError
from altprop.files import part_of
from altprop.lab.seal import has_seal
from altprop.lm.text import TOKENIZER_FILES

LOCK = ".lock"  # older than anything else in it
PREVIOUS = "last.previous"  # the checkpoint before `last`
FILES = (
    *("config.yaml", *TOKENIZER_FILES),
    *("run.json", "metrics.jsonl", "curves.png", "report.html"),
    *(f"{name}.safetensors" for name in ("best", "last", PREVIOUS)),
)
TRACKERS = ("tensorboard", "trackio", "wandb")  # a folder each, in which a tracker writes
# of a comparison
OPTIONS, RECORD, RESULTS = "comparison.yaml", "record.json", "results.json"
FORMAT = "altprop-comparison/1"  # of its results
LARGEST = 256 << 20  # bytes of its results
SPEC, PICTURE, STUDY = "sweep.yaml", "sweep.png", "study.db"  # of a sweep


def is_run(folder: Path) -> bool:
    """Tell whether a folder is that of a run, be it one that a crash has left unfinished."""
    config = folder / "config.yaml"
    begun = (folder / LOCK).is_file() and has_seal(config)
    kept = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return config.is_file() and (begun or kept)


def is_comparison(folder: Path) -> bool:
    """Tell whether a folder is that of a comparison."""
    return (folder / OPTIONS).is_file()


def is_free(folder: Path) -> bool:
    """Tell whether a run may start in a folder: it holds at most what the crash of one left."""
    if not folder.exists():
        return True
    left = {LOCK, *(part_of(Path(name)).name for name in FILES)}
    return folder.is_dir() and set(os.listdir(folder)) <= left


def check_ways(kind: str, out: Path | None, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that cannot be one, and ways to begin that exclude each other or lack one.

    **Arguments:** `kind`, what is begun: a run, a comparison or a sweep.

    **Raises:** `ConfigError`.
    """
    if out is not None and any("\ud800" <= character <= "\udfff" for character in str(out)):
        raise ConfigError(  # no checkpoint can be written there
            f"out is {str(out)[:80]!r}, which is not UTF-8: name another folder with --out"
        )
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other: give one of them")
    for name, given in (("resume", resume), ("overwrite", overwrite)):
        if given and out is None:
            raise ConfigError(f"{name} needs the {kind}'s folder: write --out FOLDER --{name}")


def check_place(
    kind: str, folder: Path, there: bool, free: bool, resume: bool, overwrite: bool
) -> None:
    """Refuse to begin in a folder where that would mix or lose something.

    **Arguments:** `there`, whether one of that `kind` is in the folder already; `free`, whether
    nothing else is.

    **Raises:** `CheckpointError`.
    """
    if resume and not there:
        raise CheckpointError(f"{folder} holds no {kind} to resume: leave out --resume")
    if there and not (resume or overwrite):
        raise CheckpointError(
            f"{folder} already holds a {kind}: add --resume to go on with it, --overwrite to "
            "replace it, or name another folder with --out"
        )
    if not there and not free:
        raise CheckpointError(f"{folder} is no {kind} folder: name a new folder with --out")


def check_files(folder: Path, names: Iterable[str] = FILES) -> None:
    """Make sure that what bears the name of a file is one, before anything is changed.

    **Arguments:** `names`, those of a run unless given.

    **Raises:** `CheckpointError` naming what is none.
    """
    for path in (folder / name for name in names):
        if path.exists() and not path.is_file():
            raise CheckpointError(
                f"{path} is no file: remove it, or name another folder with --out"
            )


def new_folder(text: str, method: str) -> Path:
    """Make a folder below runs/ that nobody else has, not even a run of the same second."""
    parent = Path("runs")
    parent.mkdir(exist_ok=True)
    stem = re.sub(r"[^\w.-]+", "-", Path(os.path.abspath(text)).stem)  # of hf:NAME:config too
    name = f"{stem}-{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):  # abspath: the text may be `.` too
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def empty(folder: Path) -> None:
    """Remove a run from its folder, but for what tells that there was one."""
    for name in FILES:
        if name not in ("config.yaml", *TOKENIZER_FILES):
            (folder / name).unlink(missing_ok=True)
    for path in (folder / name for name in TRACKERS):
        if path.is_symlink():
            path.unlink()  # and not what somebody keeps elsewhere
        elif path.exists():
            shutil.rmtree(path)


def clean(folder: Path) -> None:
    """Remove what earlier crashes have left half-written."""
    for name in FILES:
        part_of(folder / name).unlink(missing_ok=True)

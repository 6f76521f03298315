"""What lies in the folder of a run or a comparison, and what tells it from any other folder."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import time
from pathlib import Path

from altprop import CheckpointError
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


def check_files(folder: Path) -> None:
    """Make sure that what bears the name of a run's file is a file, before anything is changed.

    **Raises:** `CheckpointError` naming what is none.
    """
    for path in (folder / name for name in FILES):
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

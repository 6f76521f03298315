"""A comparison's folder: what was asked for, by what it was computed, and every trial's outcome."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

import altprop
from altprop import CheckpointError
from altprop.files import write_whole
from altprop.lab.compare.trial import Key

OPTIONS, RECORD, RESULTS = "comparison.yaml", "record.json", "results.json"
FREE = {"workers", "rules", "seeds", "controls", "equal_cost"}  # what a resumed one may change


def open_folder(
    folder: Path, options: Mapping[str, Any], command: str, *, resume: bool, overwrite: bool
) -> dict[Key, dict[str, Any]]:
    """Make a comparison's folder, or find the one to go on in; return the outcomes in it.

    **Arguments:** `options`, plain data, as `comparison.yaml` holds it; `command`, what computes
    the same again.

    **Raises:** `CheckpointError` for a comparison that is in the way or is another one.
    """
    there = (folder / OPTIONS).is_file() and (folder / RECORD).is_file()
    if resume and not there:
        raise CheckpointError(f"{folder} holds no comparison to resume: leave out --resume")
    if there and not resume and not overwrite:
        raise CheckpointError(
            f"{folder} already holds a comparison: add --resume to go on with it, --overwrite to "
            "replace it, or name another folder with --out"
        )
    if folder.exists() and not there and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is no comparison's: name a new folder with --out")
    if resume:
        before = yaml.safe_load((folder / OPTIONS).read_text(encoding="utf-8"))
        changed = [n for n in options if n not in FREE and options[n] != before.get(n)]
        if changed:
            raise CheckpointError(
                f"{folder} was started with other values of {', '.join(changed)}: give those of "
                f"{folder / OPTIONS}, or start a new comparison"
            )
    elif there:
        for file in (*folder.glob("trials/*/*/*"), folder / RESULTS):
            if file.name in ("done.json", "metrics.jsonl", RESULTS):
                file.unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True, width=10**6)
        write_whole(folder / OPTIONS, text)
        record = _record(command)
        if resume:
            started = json.loads((folder / RECORD).read_text(encoding="utf-8")).get("started")
            record |= {"started": started, "resumed": record["started"]}
        write_whole(folder / RECORD, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror})") from None
    return outcomes_in(folder)


def outcomes_in(folder: Path) -> dict[Key, dict[str, Any]]:
    """Return the outcomes of all finished trials in a comparison's folder.

    **Raises:** `CheckpointError` for a file that is no outcome.
    """
    found = {}
    for file in sorted(folder.glob("trials/*/*/done.json")):
        try:
            outcome = json.loads(file.read_text(encoding="utf-8"))
            key = outcome["arm"], outcome["phase"], outcome["lr"], outcome["seed"]
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{file}: no outcome of a trial: remove it") from None
        found[key] = outcome
    return found


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `results.json`, whole."""
    write_whole(folder / RESULTS, json.dumps(results, allow_nan=False) + "\n")


def _record(command: str) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [n for n in info.read_text().splitlines() if n.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "command": command,
        "versions": {
            "altprop": altprop.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{processor}, {platform.system()}",
        "threads": 1,  # of each trial
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }

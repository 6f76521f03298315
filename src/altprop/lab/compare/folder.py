"""A comparison's folder: what was asked for, by what it was computed, and every trial's outcome."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from altprop import CheckpointError
from altprop.files import write_whole
from altprop.lab.choices import at
from altprop.lab.compare.trial import Key
from altprop.lab.config import read_mapping
from altprop.lab.folder import LARGEST, OPTIONS, RECORD, RESULTS, check_place
from altprop.lab.record import processor, read_record, versions
from altprop.reading import parse_json, read_bytes

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
    free = not folder.exists() or folder.is_dir() and not any(folder.iterdir())
    check_place("comparison", folder, there, free, resume, overwrite)
    if resume:
        before = at(str(folder / OPTIONS), lambda: read_mapping(folder / OPTIONS))
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
            started = read_record(folder).get("started")
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
            outcome = parse_json(read_bytes(file, LARGEST))
            key = outcome["arm"], outcome["phase"], outcome["lr"], outcome["seed"]
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{file}: no outcome of a trial: remove it") from None
        found[key] = outcome
    return found


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `results.json`, whole."""
    write_whole(folder / RESULTS, json.dumps(results, allow_nan=False) + "\n")


def _record(command: str) -> dict[str, Any]:
    return {
        "command": command,
        "versions": versions(),
        "machine": f"{processor()}, {platform.system()}",
        "threads": 1,  # of each trial
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }

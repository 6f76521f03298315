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
from altprop.lab.folder import LARGEST, OPTIONS, RECORD, RESULTS, check_files, check_place
from altprop.lab.record import processor, read_record, versions
from altprop.reading import parse_json, read_bytes
from altprop.shape import check_shape

_NUMBER = (float, None)
_OUTCOME = {
    "arm": str, "rule": str, "phase": str, "lr": float, "seed": int, "steps": int,
    "refused": (str, None), "failed": (str, None), "score": _NUMBER, "evaluations?": _NUMBER,
    "cost?": {
        "seconds_per_step": float, "relative": float, "quartiles": [float, float],
        "peak_bytes": int, "carried_numbers": int, "parameters": int,
    },
    "read?": [{"parameter": str, "how": str}],
    "curve?": {"steps": [int], "loss": [_NUMBER], "score": [_NUMBER]},
    "audit?": [{"step": int, "groups": [{"name": str, "cosine": _NUMBER, "ratio": _NUMBER}]}],
}  # fmt: skip
FREE = {"workers", "rules", "seeds", "controls", "equal_cost"}  # what a resumed one may change


def open_folder(
    folder: Path,
    options: Mapping[str, Any],
    command: str,
    digest: str,
    rules: Mapping[str, str],
    *,
    resume: bool,
    overwrite: bool,
) -> dict[Key, dict[str, Any]]:
    """Make a comparison's folder, or find the one to go on in; return the outcomes in it.

    **Arguments:** `options`, plain data, as `comparison.yaml` holds it; `command`, what computes
    the same again; `digest`, of what no option says of the task;
    `rules`, the whole text of each arm's rule, but for controls, whose names say all of them.

    **Raises:** `CheckpointError` for a comparison that is in the way or is another one.
    """
    there = (folder / OPTIONS).is_file() and (folder / RECORD).is_file()
    free = not folder.exists() or folder.is_dir() and not any(folder.iterdir())
    check_place("comparison", folder, there, free, resume, overwrite)
    check_files(folder, (OPTIONS, RECORD, RESULTS))
    if resume:
        before = at(str(folder / OPTIONS), lambda: read_mapping(folder / OPTIONS))
        changed = [n for n in options if n not in FREE and options[n] != before.get(n)]
        if changed:
            raise CheckpointError(
                f"{folder} was started with other values of {', '.join(changed)}: give those of "
                f"{folder / OPTIONS}, or start a new comparison"
            )
        record = read_record(folder)
        if record.get("digest") != digest:
            raise CheckpointError(
                f"{folder} was started with another network, recipe or data of {options['task']}, "
                "or by another version of altprop: start a new comparison"
            )
        started = record.get("started")
        for outcome in outcomes_in(folder).values():
            name, rule = outcome["arm"], outcome["rule"]
            if rules.get(name, rule) != rule:
                raise CheckpointError(
                    f"{folder}: the arm {name} was {rule} there and is {rules[name]} now: give it "
                    "another name, or start a new comparison"
                )
    elif there:
        for file in (*folder.glob("trials/*/*/*"), folder / RESULTS):
            if file.name in ("done.json", "metrics.jsonl", RESULTS):
                file.unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True, width=10**6)
        write_whole(folder / OPTIONS, text)
        record = {**_record(command), "digest": digest}
        if resume:
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
            check_shape(outcome, _OUTCOME)
            if not 1e-4 < outcome.get("cost", {"relative": 1})["relative"] < 1e4:
                raise ValueError("cost.relative is not that of any step")
        except ValueError as error:
            raise CheckpointError(f"{file}: no outcome of a trial ({error}): remove it") from None
        found[outcome["arm"], outcome["phase"], outcome["lr"], outcome["seed"]] = outcome
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

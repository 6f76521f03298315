"""What a folder of figures says of how they were made: by which command, versions and machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from altprop import CheckpointError


def read_record(folder: Path) -> dict[str, Any]:
    """Return the command, versions and machine of a comparison's `record.json`, or of a run.

    Of a run's `run.json` it is the last session. Nothing, where a folder has neither.

    **Raises:** `CheckpointError` for a file that is no such record.
    """
    for name in ("record.json", "run.json"):
        path = folder / name
        if path.is_file():
            break
    else:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if name == "record.json" and "command" in found else _session(found)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: no record of a run or comparison; remove it") from None


def _session(found: dict[str, Any]) -> dict[str, Any]:
    last = found["sessions"][-1]
    return {
        "command": str(last["command"]),
        "versions": {name: str(last[name]) for name in ("altprop", "torch", "python")},
        "machine": str(last.get("device_name", last["device"])),
        "threads": last["threads"],
        "seconds": last.get("seconds"),
    }

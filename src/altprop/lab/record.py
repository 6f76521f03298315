"""What a folder of figures says of how they were made: by which command, versions and machine."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

import altprop
from altprop import CheckpointError
from altprop.files import write_whole

RECORD = "record.json"


def write_record(folder: Path, command: str) -> None:
    """Write `record.json`: `command`, what computes the same again, and what it is computed by."""
    record = {
        "command": command,
        "versions": {
            "altprop": altprop.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_whole(folder / RECORD, json.dumps(record, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """Return what a folder's `record.json` holds, or nothing where it has none.

    **Raises:** `CheckpointError` for a file that is no JSON object.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a JSON object; remove it")
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()

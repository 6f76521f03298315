"""A run's `run.json`: what each session of it, from its start or a resume on, was made by.

It names versions, the device, threads, the command line and the text, and no host, user or time of
day of its own accord: two machines of one kind write the same.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import altprop
from altprop import CheckpointError
from altprop.files import write_whole


class Record:
    """The sessions of a run; the last one is this.

    **Arguments:** `path`, the file; `before`, the sessions before this one.
    """

    def __init__(self, path: Path, before: list[dict[str, Any]]) -> None:
        self._path, self._before = path, before
        self._session: dict[str, Any] = {}

    @classmethod
    def go_on(cls, path: Path) -> Record:
        """Return the record that goes on with what a file holds, as far as it can be read."""
        try:
            sessions = json.loads(path.read_bytes())["sessions"] if path.is_file() else []
        except (ValueError, KeyError, TypeError, RecursionError):
            sessions = []
        good = isinstance(sessions, list) and all(isinstance(s, dict) for s in sessions)
        return cls(path, sessions if good else [])

    def start(self, step: int, device: torch.device, text: Mapping[str, str]) -> str:
        """Write that a session has started, and return in words what makes its figures others."""
        self._session = {
            "from_step": step,
            "altprop": altprop.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "text": dict(text),
        }
        if device.type == "cuda":
            self._session["device_name"] = torch.cuda.get_device_name(device)
        self._write()
        last = self._before[-1] if self._before else self._session
        names = ("altprop", "torch", "device", "device_name", "threads")
        other = [
            f"{name} {self._session.get(name)} instead of {last.get(name)}"
            for name in names
            if self._session.get(name) != last.get(name)
        ]
        if not other:
            return ""
        return f"this session has {', '.join(other)}: its figures may differ in the last digits"

    def end(self, step: int, seconds: float) -> None:
        """Write how far the session came, and the seconds that the run has taken in all."""
        self._session |= {"to_step": step, "seconds": round(seconds, 1)}
        self._write()

    def _write(self) -> None:
        content = {"sessions": [*self._before, self._session]}
        try:
            write_whole(self._path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be written ({error.strerror})") from error

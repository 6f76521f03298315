"""By what figures were made: `run.json` of a run, a session each, `record.json` of a comparison.

They name versions, the processor or device, threads and the command line, and no host or user: two
machines of one kind write the same.
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
from altprop.reading import parse_json, read_bytes
from altprop.shape import check_shape

LARGEST = 16 << 20  # bytes of a record


def versions() -> dict[str, str]:
    """Return the versions that figures depend on."""
    return {
        "altprop": altprop.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def processor() -> str:
    """Return the processor's name, without what tells one machine from another."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read_record(folder: Path) -> dict[str, Any]:
    """Return by which command, versions and machine a comparison or the last of a run was made.

    Nothing, where the folder does not say.

    **Raises:** `CheckpointError` for a file that is no such record.
    """
    for name, command_of in (("record.json", _comparison), ("run.json", _last_session)):
        path = folder / name
        if path.exists():
            try:
                return command_of(parse_json(read_bytes(path, LARGEST)))
            except ValueError as error:
                raise CheckpointError(
                    f"{path}: no record of a run or comparison ({error}); remove it"
                ) from None
    return {}


_COMPARISON = {
    "command": str,
    "versions?": ({str: str}, None),
    "threads?": (int, None),
    **dict.fromkeys(("machine?", "started?", "digest?"), (str, None)),
}
_SESSION = {
    **dict.fromkeys(("command", "device", "device_name?"), str),
    "threads": int,
}


def _comparison(found: Any) -> dict[str, Any]:
    check_shape(found, _COMPARISON)
    return {**found}


def _last_session(found: Any) -> dict[str, Any]:
    check_shape(found, {"sessions": [{}]})
    if not found["sessions"]:
        raise ValueError("it has no session")
    last = found["sessions"][-1]
    check_shape(last, {**_SESSION, **dict.fromkeys(versions(), str)}, "the last session")
    return {
        "command": last["command"],
        "versions": {name: last[name] for name in versions()},
        "machine": last.get("device_name", last["device"]),
        "threads": last["threads"],
    }


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
            sessions = parse_json(read_bytes(path, LARGEST))["sessions"]
        except (OSError, ValueError, KeyError, TypeError):
            sessions = []
        good = isinstance(sessions, list) and all(isinstance(s, dict) for s in sessions)
        return cls(path, sessions if good else [])

    def start(
        self, step: int, device: torch.device, text: Mapping[str, str], processes: int = 1
    ) -> str:
        """Write that a session has started, and return in words what makes its figures others."""
        self._session = {
            "from_step": step,
            **versions(),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "processes": processes,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "text": dict(text),
        }
        if device.type == "cuda":
            self._session["device_name"] = torch.cuda.get_device_name(device)
        self._write()
        last = self._before[-1] if self._before else self._session
        last = {"processes": 1, **last}  # older records do not say
        names = ("altprop", "torch", "device", "device_name", "threads", "processes")
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

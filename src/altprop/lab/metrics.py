"""What a run measures, one JSON object a line, and how that file goes on after a crash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from altprop import CheckpointError
from altprop.files import write_whole


class Metrics:
    """The file `metrics.jsonl` of a run, which grows by one line for each record.

    **Arguments:** `path`, the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1
        self._bytes, self._sha = 0, hashlib.sha256()  # of what has been written

    def start(self) -> None:
        """Begin an empty file."""
        self._begin(b"")

    def go_on(self, step: int, written: dict[str, Any]) -> str:
        """Take the file back to `step`, and return in words what of it is lost, or nothing.

        What cannot be read is left out and marked by a record of its own, `{"step": last,
        "gap_from": first}`.

        **Arguments:** `written`, what `mark` returned at that step.
        """
        content = self.path.read_bytes() if self.path.is_file() else b""
        size = written["bytes"]
        if len(content) >= size and hashlib.sha256(content[:size]).hexdigest() == written["sha256"]:
            self._begin(content[:size])
            return ""
        records = salvaged(content, step)
        self._begin("".join(f"{json.dumps(record)}\n" for record in records).encode())
        gaps = [f"{r['gap_from']} to {r['step']}" for r in records if "gap_from" in r]
        where = f", and marked what is lost, of steps {', '.join(gaps)}" if gaps else ""
        return f"{self.path} is not as it was written: took what can be read{where}"

    def _begin(self, content: bytes) -> None:
        write_whole(self.path, content)  # a new file: nothing is written through a link
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self._bytes, self._sha = len(content), hashlib.sha256(content)

    def append(self, record: dict[str, Any]) -> None:
        """Write a record as a line, at once; what is not finite becomes null.

        **Raises:** `CheckpointError` if it cannot be written; then there is no half of it.
        """
        plain = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        line = (json.dumps(plain, allow_nan=False) + "\n").encode()
        try:
            rest = line
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._bytes)
            raise CheckpointError(f"{self.path}: cannot be written ({error.strerror})") from error
        self._bytes += len(line)
        self._sha.update(line)

    def mark(self) -> dict[str, Any]:
        """Wait until the file is on the disk, and return what tells it from a damaged one."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written ({error.strerror})") from error
        return {"bytes": self._bytes, "sha256": self._sha.hexdigest()}

    def close(self) -> None:
        """End writing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def salvaged(content: bytes, step: int) -> list[dict[str, Any]]:
    """Return the records of a damaged file up to `step` that are readable and in order, and
    between them one for each gap."""
    kept: list[dict[str, Any]] = []
    following, torn = 1, False  # the step that comes next; whether something was not readable

    def mark(first: int, last: int) -> None:
        kept.append({"step": last, "gap_from": first})

    for line in content.split(b"\n"):
        record = read_record(line)
        if record is None or "gap_from" in record:
            torn = torn or bool(line.strip())
            continue
        at, made = record["step"], "loss" in record
        late = at < following - (not made)
        if at > step or late or "final_validation_loss" in record:
            continue
        if at - made >= following:  # its own record is missing, or those before it
            mark(following, at - made)
        elif torn and following > 1:
            mark(following - 1, following - 1)
        kept.append(record)
        following, torn = at + 1, False
    if following <= step:
        mark(following, step)
    elif torn and step:
        mark(step, step)
    return kept


def read_record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line, or nothing if the line holds none."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    good = isinstance(record, dict) and type(record.get("step")) is int and record["step"] >= 0
    return record if good else None

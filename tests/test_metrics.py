"""A run's metrics survive what happens to their file: what can be read stays, a gap is said."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from altprop import CheckpointError
from altprop.lab.metrics import Metrics, salvaged


def logged(folder: Path, steps: int = 6, every: int = 3) -> tuple[list[dict[str, Any]], Any, bytes]:
    """Write a file of so many steps; return its records, its mark at step 4, and its bytes."""
    metrics, records, mark = Metrics(folder / "metrics.jsonl"), [], None
    metrics.start()
    for step in range(1, steps + 1):
        records.append({"step": step, "loss": 1.0 / step})
        if step % every == 0:
            records.append({"step": step, "validation_loss": 2.0 / step})
        for record in records[-1 - (step % every == 0) :]:
            metrics.append(record)
        mark = metrics.mark() if step == 4 else mark
    metrics.close()
    return records, mark, (folder / "metrics.jsonl").read_bytes()


def gone_on(folder: Path, mark: Any, step: int = 4) -> tuple[list[dict[str, Any]], str]:
    """Go on from step 4 with one more record; return what the file holds, and what was said."""
    metrics = Metrics(folder / "metrics.jsonl")
    said = metrics.go_on(step, mark)
    metrics.append({"step": step + 1, "loss": 0.0})
    metrics.close()
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert records.pop() == {"step": step + 1, "loss": 0.0}
    return records, said


def test_a_file_goes_on_at_the_byte_where_the_checkpoint_was_written(tmp_path: Path) -> None:
    records, mark, content = logged(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(content + b'{"step": 7, "lo')
    assert gone_on(tmp_path, mark) == (records[:5], "")


FAULTS: dict[str, Any] = {
    "empty": lambda lines: [],
    "cut off": lambda lines: [*lines[:2], lines[2][:5]],
    "no UTF-8": lambda lines: [*lines[:2], b"\xff\xfe", *lines[3:]],
    "foreign lines": lambda lines: [b"[1]", b'{"step": "3"}', b"{" * 10**4, *lines],
    "a line lost": lambda lines: [*lines[:1], *lines[2:]],
    "a line twice": lambda lines: [lines[0], *lines],
    "in another order": lambda lines: lines[::-1],
    "of more steps": lambda lines: [b'{"step": 99, "loss": 1.0}', *lines],
    "of another run's end": lambda lines: [b'{"step": 2, "final_validation_loss": 1}', *lines],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_can_be_read_stays_in_order_and_every_step_has_a_record_or_a_gap(
    fault: str, tmp_path: Path
) -> None:
    records, mark, content = logged(tmp_path)
    damaged = b"\n".join(FAULTS[fault](content.split(b"\n")[:-1])) + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    kept, said = gone_on(tmp_path, mark)
    assert "is not as it was written: took what can be read" in said
    assert all(record in records or "gap_from" in record for record in kept)
    covered = []
    for record in kept:
        if "loss" in record:
            covered.append(record["step"])
        elif "gap_from" in record and record["gap_from"] not in covered:
            covered += range(record["gap_from"], record["step"] + 1)
    assert covered == [1, 2, 3, 4]
    lost = [step for step in (1, 2, 3, 4) if {"step": step, "loss": 1.0 / step} not in kept]
    assert (not lost) == (fault in ("foreign lines", "a line twice", "of more steps", FINAL))


FINAL = "of another run's end"


def test_a_missing_file_and_one_that_is_none_are_gaps(tmp_path: Path) -> None:
    _, mark, _ = logged(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    assert gone_on(tmp_path, mark)[0] == [{"step": 4, "gap_from": 1}]
    (tmp_path / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "metrics.jsonl")  # which nobody will ever write to
    assert gone_on(tmp_path, mark)[0] == [{"step": 4, "gap_from": 1}]


def test_a_lost_evaluation_is_marked_where_it_was(tmp_path: Path) -> None:
    _, mark, content = logged(tmp_path)
    lines = content.splitlines(keepends=True)
    lines[3] = b"#" + lines[3]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    kept, said = gone_on(tmp_path, mark)
    assert kept[3] == {"step": 3, "gap_from": 3} and [r["step"] for r in kept] == [1, 2, 3, 3, 4]
    assert said.endswith("and marked what is lost, of steps 3 to 3")


def test_a_gap_stays_marked_when_the_file_is_damaged_again() -> None:
    content = b'{"step": 3, "gap_from": 1}\n{"step": 4, "loss": 1.0}\n#\n'
    assert salvaged(content, 4)[:2] == [{"step": 3, "gap_from": 1}, {"step": 4, "loss": 1.0}]


def test_a_line_that_finds_no_space_is_not_there_by_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.start()
    metrics.append({"step": 1, "loss": float("nan")})
    write = os.write

    def nearly_full(file: int, content: bytes) -> int:
        if len(content) > 5:
            return write(file, content[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", nearly_full)
        with pytest.raises(CheckpointError, match="metrics.jsonl: cannot be written .No space"):
            metrics.append({"step": 2, "l": 1})
    metrics.append({"step": 2, "loss": 3.0})
    metrics.close()
    written = (tmp_path / "metrics.jsonl").read_text()
    assert written == '{"step": 1, "loss": null}\n{"step": 2, "loss": 3.0}\n'

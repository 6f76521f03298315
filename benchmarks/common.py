"""What every benchmark shares: how a table is written, with the machine and the command it is from.

Writes `results/<name>.md` and `.json` beside this file.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from altprop.lab.record import processor

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return what a timing or a figure depends on."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results(name: str) -> Any:
    """Return what a benchmark wrote last on a machine like this one, or else an empty list."""
    file = RESULTS / f"{name}.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return record["results"] if record.get("machine") == machine() else []


def write(name: str, title: str, parts: Sequence[str], data: Any) -> None:
    """Write and print the report of one benchmark; `parts` are Markdown paragraphs or tables."""
    script = Path(sys.argv[0]).name
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = " ".join(["python", f"benchmarks/{script}", *words])
    where = machine()
    line = ", ".join(f"{key} {value}" for key, value in where.items())
    text = "\n\n".join([f"# {title}", *parts, f"Command: `{command}`. Machine: {line}."]) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    record = {"command": command, "machine": where, "results": data}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(text)

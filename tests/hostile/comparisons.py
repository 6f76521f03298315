"""Malformed comparisons, and malformed records of a run, for those who read them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from random import Random

from altprop.lab.cli import main
from hostile.files import changed, put_something_else, spoil, spoil_json
from hostile.values import PATHS, TEXTS, WORDS, hostile
from made_comparisons import made, write

TASK = "Parity(bits=4, k=2, examples=64, width=4)"
COMPARE = ["compare", TASK, "--rules", "[SignSymmetry]", "--controls", "backprop"]
COMPARE += ["--steps", "2", "--seeds", "1", "--rates", "[0.01]", "--budget", "1"]


def good_comparisons(train: Sequence[str]) -> None:
    """Make a comparison, and the records of one that nobody has run."""
    write(Path("compared"), made(3, seeds=2, points=3))
    assert main([*COMPARE, "--out", "made"]) == 0


def _spoil_metrics(draw: Random, path: Path) -> None:
    """Spoil the metrics of a run: a line of them, or its bytes."""
    if draw.random() < 0.3:
        spoil(draw, path)
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    for _ in range(draw.choice([1, 1, 3])):
        at = draw.randrange(len(lines))
        lines[at] = json.dumps(changed(draw, json.loads(lines[at])))
    if draw.random() < 0.2:
        draw.shuffle(lines)
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def compared(draw: Random, here: Path, train: Sequence[str]) -> list[str]:
    """What a comparison or a run has recorded, and words of `compare` and `report`."""
    again, folder = [*COMPARE, "--out", "made", "--resume"], draw.choice(["compared", "made"])
    show = ["report", folder]
    match draw.randrange(9):
        case 0 | 1 | 2:
            spoil_json(draw, here / folder / "results.json", draw.choice([1, 1, 3]))
        case 3:
            spoil_json(draw, here / folder / "record.json")
            show = draw.choice([show, again])
        case 4:
            name = draw.choice(["results.json", "record.json", "comparison.yaml"])
            put_something_else(draw, here / folder / name)
            show = draw.choice([show, again])
        case 5:
            path = draw.choice(sorted((here / "made" / "trials").glob("*/*/done.json")))
            if draw.random() < 0.2:
                put_something_else(draw, path)
            else:
                spoil_json(draw, path)
            show = again
        case 6:
            show = ["report", "run", "--sample", draw.choice(["0", "3"])]
            name = draw.choice(["metrics.jsonl", "metrics.jsonl", "run.json", "config.yaml"])
            path = here / "run" / name
            if draw.random() < 0.15:
                put_something_else(draw, path)
            elif name == "metrics.jsonl":
                _spoil_metrics(draw, path)
            elif name == "run.json":
                spoil_json(draw, path)
            else:
                spoil(draw, path)
            if draw.random() < 0.5:  # of a run that was stopped before it kept anything
                for which in ("best", "last"):
                    (here / "run" / f"{which}.safetensors").unlink()
        case 7:
            os.mkfifo(here / "fifo")
            (here / "loop").symlink_to("loop")
            names = ["html", "csv", "csv", "sample", "device", "folder", "png"]
            show = ["report", draw.choice(["compared", "made", "run", draw.choice(PATHS)])]
            show += ["--sample", "0"]
            for _ in range(draw.choice([1, 2])):
                show += [f"--{draw.choice(names)}={draw.choice([*PATHS, *TEXTS, *WORDS])}"]
        case _:
            show = list(draw.choice([COMPARE, again]))
            names = ["task", "rules", "seeds", "seed", "steps", "rates", "budget", "search_steps"]
            names += ["controls", "equal_cost", "workers", "out", "resume", "overwrite"]
            for _ in range(draw.choice([1, 1, 2])):
                name = draw.choice(names)
                value = hostile(draw, "steps" if name in ("task", "rules") else name)
                listed = draw.choice([f"[{value}]", f"{{a: {value}}}", json.dumps([value]), value])
                show += [f"--{name}={draw.choice([value, listed])}"]
    if show[0] == "report" and draw.random() < 0.3:
        show += ["--csv", "table.csv"]
    if show[0] == "report" and draw.random() < 0.03:
        show += ["--png", "picture.png"]
    return show

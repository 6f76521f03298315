"""Many processes against one: that their steps are the same, and what a step costs.

    python benchmarks/processes.py

**The same.** Ten steps in float64 of every rule and estimator with its hinge, by two and four gloo
processes, by DDP and FSDP2, with and without accumulation: the largest difference of any weight,
average, loss or gradient norm from one process's, relative to that tensor's largest entry.

**Efficiency.** Steps of `altprop train` in one process and in two, a thread each, on the wall
clock: tokens per second of two over twice those of one, where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from altprop.lab.ranks import Ranks  # noqa: E402
from common import markdown, write  # noqa: E402
from ranks import CASES, apart, ended, learned, start, together  # noqa: E402

WAYS = [f"{parallel}:{passes}" for parallel in ("ddp", "fsdp") for passes in (1, 2)]
RUNS: dict[str, list[str]] = {
    "gpt, backprop": ["--model", "gpt"],
    "equilibrium, AEP": [],
}


def differences(counts: list[int]) -> dict[str, dict[str, float]]:
    """Return the largest difference from one process, by case, and by processes and way."""
    wanted = [f"{way}:{name}" for name in CASES for way in WAYS]
    out: dict[str, dict[str, float]] = {name: {} for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            found = together(count, wanted, Path(folder))
            for name in CASES:
                one = learned(name, Ranks())
                for way in WAYS:
                    differ = apart(one, found[f"{way}:{name}"])
                    out[name][f"{count} {way}"] = max(differ.values())
    return out


def speed(count: int, words: list[str], data: str, steps: int) -> float:
    """Return the median tokens per second of a run in so many processes of one thread."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        sizes = ["--steps", str(steps), "--eval_every", str(steps), "--eval_windows", "1"]
        sizes += ["--final_windows", "1", "--sample", "0", "--device", "cpu", "--threads", "1"]
        command = ["-m", "altprop", "train", "--data", data, "--out", str(run), *sizes, *words]
        found = ended(start(count, *command), timeout=600)
        if any(status for status, *_ in found):
            raise RuntimeError(found[0][2])
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [r["tokens_per_second"] for r in map(json.loads, lines) if "tokens_per_second" in r]
    return statistics.median(rates[5:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="plays", help="a corpus or a text file")
    parser.add_argument("--steps", type=int, default=60, help="of each timed run")
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    same = differences(options.processes)
    columns = list(next(iter(same.values())))
    rows = [[name, *(f"{row[c]:.0e}" for c in columns)] for name, row in same.items()]
    worst = max(by for row in same.values() for by in row.values())
    speeds: dict[str, Any] = {}
    for name, words in RUNS.items():
        one, two = (speed(count, words, options.data, options.steps) for count in (1, 2))
        fsdp = speed(2, [*words, "--parallel", "fsdp"], options.data, options.steps)
        speeds[name] = {"one": one, "two": two, "fsdp": fsdp}
    head = ["run", "one, tokens/s", "two by DDP", "efficiency", "two by FSDP2", "efficiency"]
    timed = [
        [name, f"{s['one']:.0f}"]
        + [w for way in ("two", "fsdp") for w in (f"{s[way]:.0f}", f"{s[way] / s['one'] / 2:.2f}")]
        for name, s in speeds.items()
    ]
    parts = [
        "Largest difference from one process after ten steps in float64; columns: processes, way, "
        f"passes a step. The largest of all: {worst:.0e}.",
        markdown(["case", *columns], rows),
        "Efficiency, a thread a process (16 × 64 tokens, C = 128):",
        markdown(head, timed),
    ]
    write("processes", "Many processes", parts, {"differences": same, "speed": speeds})


if __name__ == "__main__":
    main()

"""Many processes against one: that their steps are the same.

    python benchmarks/processes.py

Ten steps in float64 of every rule and estimator with its hinge, by two and four gloo processes, by
DDP and FSDP2, with and without accumulation: the largest difference of any weight, average, loss or
gradient norm from one process's, relative to that tensor's largest entry. What two processes gain
is `data_parallel.py`'s.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from altprop.lab.ranks import Ranks  # noqa: E402
from common import markdown, write  # noqa: E402
from ranks import CASES, apart, learned, together  # noqa: E402

WAYS = [f"{parallel}:{passes}" for parallel in ("ddp", "fsdp") for passes in (1, 2)]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    same = differences(options.processes)
    columns = list(next(iter(same.values())))
    rows = [[name, *(f"{row[c]:.0e}" for c in columns)] for name, row in same.items()]
    worst = max(by for row in same.values() for by in row.values())
    said = (
        "Largest difference from one process after ten steps in float64; columns: processes, way, "
        f"passes a step. The largest of all: {worst:.0e}."
    )
    write("processes", "Many processes", [said, markdown(["case", *columns], rows)], same)


if __name__ == "__main__":
    main()

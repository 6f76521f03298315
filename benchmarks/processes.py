"""Many processes against one: that their steps are the same.

    python benchmarks/processes.py

Ten steps in float64 of every rule and estimator with its hinge, by two and four gloo processes, by
DDP and FSDP2, with and without accumulation: the largest difference of any weight, average, loss or
gradient norm from one process's, relative to that tensor's largest entry. And two processes of the
command, of which one is killed in the middle of a run, which then goes on with two: how soon the
other one ends, and how far the run's end is from an undisturbed one's. What two processes gain is
`data_parallel.py`'s.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from altprop.lab.ranks import Ranks  # noqa: E402
from common import markdown, write  # noqa: E402
from lm_runs import small, steps, tensors, words  # noqa: E402
from ranks import CASES, apart, ended, learned, start, together, until  # noqa: E402

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


def survived(parallel: str, folder: Path) -> tuple[float, float]:
    """Return the seconds until two ranks have ended of which one was killed, and what it changed.

    That is the largest difference of weights, moments and losses at the end of the run, gone on
    with by two ranks, from those of an undisturbed run of two.
    """
    commands = {}
    for name in ("whole", "lost"):
        config = small(folder / name, steps=60, save_every=0.0, eval_every=20)
        said = words(config, "save_every", "eval_every")
        commands[name] = ["-m", "altprop", "train", *said, "--parallel", parallel]
    statuses = [status for status, *_ in ended(start(2, *commands["whole"]))]
    two = start(2, *commands["lost"])
    until(folder / "lost" / "metrics.jsonl", 17, two)
    two[1].send_signal(signal.SIGKILL)
    since = time.monotonic()
    statuses.append(ended(two)[0][0])
    seconds = time.monotonic() - since
    statuses += [status for status, *_ in ended(start(2, *commands["lost"], "--resume", "true"))]
    assert statuses == [0, 0, 2, 0, 0], statuses
    ends = [tensors(folder / name) for name in commands]
    for name, end in zip(commands, ends, strict=True):
        end["losses"] = torch.tensor([record["loss"] for record in steps(folder / name)])
    return seconds, max(apart(*ends).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    same, ends = differences(options.processes), dict[str, tuple[float, float]]()
    columns = list(next(iter(same.values())))
    rows = [[name, *(f"{row[c]:.0e}" for c in columns)] for name, row in same.items()]
    worst = max(by for row in same.values() for by in row.values())
    said = (
        "Largest difference from one process after ten steps in float64; columns: processes, way, "
        f"passes a step. The largest of all: {worst:.0e}."
    )
    with tempfile.TemporaryDirectory() as made:
        for way in ("ddp", "fsdp"):
            (folder := Path(made) / way).mkdir()
            ends[way] = survived(way, folder)
    lost = "; ".join(f"{way}: {sec:.0f} s, {by:.0e}" for way, (sec, by) in ends.items())
    last = (
        "One of two ranks killed by SIGKILL: the time until the other has ended, and the largest "
        f"difference of the run that goes on from one that was never disturbed. {lost}."
    )
    parts = [said, markdown(["case", *columns], rows), last]
    write("processes", "Many processes", parts, {"steps": same, "killed": ends})


if __name__ == "__main__":
    main()

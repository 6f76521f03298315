"""Paired timing: every round runs every arm once, in random order, in one process.

Machines are noisy and drift, so what is compared is the ratio of two arms within a round; its
median over the rounds is the figure, and its quartiles say how sure it is.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

WARM_UP = 2
TICK = 1e-9  # seconds, the least that is told apart
Times = dict[str, list[float]]


def paired(
    arms: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | str = "cpu"
) -> Times:
    """Return each arm's seconds per round; the rounds to warm up are not counted.

    **Arguments:** `device`, where the arms compute; on CUDA the clock waits for it.
    """
    times: Times = {name: [] for name in arms}
    for number in range(rounds + WARM_UP):
        for name in random.sample(list(arms), len(arms)):
            start = now(device)
            arms[name]()
            elapsed = now(device) - start
            if number >= WARM_UP:
                times[name].append(elapsed)
    return times


def now(device: torch.device | str) -> float:
    """Return the time in seconds, on CUDA once the device has finished what it was given.

    In one thread on the CPU it is the process's own time: on a busy machine a long arm is put off
    for another process and a short one is not, so that wall time would change their ratio
    (measured: threefold at twice as many processes as cores). On an idle one both are the same.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@dataclass(frozen=True)
class Ratio:
    """The median over rounds of one arm's time over another's, and its quartiles."""

    median: float
    low: float
    high: float

    @property
    def noise(self) -> float:
        """Half the distance of the quartiles: how far the median of such rounds may be off."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def ratio(times: Times, over: str, under: str) -> Ratio:
    """Return the time of the arm `over` in units of the arm `under`."""
    if all(times[over]) and all(times[under]):
        each = [a / b for a, b in zip(times[over], times[under], strict=True)]
    else:  # the clock is too coarse for a round: all of them together
        whole, unit = (max(sum(times[name]), TICK) for name in (over, under))
        each = [whole / unit]
    if len(each) == 1:
        return Ratio(each[0], each[0], each[0])
    low, median, high = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(median, low, high)

"""The statistics of a comparison against scipy, closed forms, and simulated comparisons."""

from __future__ import annotations

import math
import random

import pytest

from altprop.lab.compare.statistics import Estimate, difference, mean_of, recovery

stats = pytest.importorskip("scipy.stats")

DRAW = random.Random(0)
FIRST = [DRAW.gauss(95, 1) for _ in range(5)]
OTHER = [a - 0.5 + DRAW.gauss(0, 0.2) for a in FIRST]
LOW = [DRAW.gauss(90, 1) for _ in range(5)]


def test_the_interval_of_a_mean_is_student_s() -> None:
    found = mean_of(FIRST)
    assert found is not None and found.interval is not None
    mean = math.fsum(FIRST) / 5
    want = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(FIRST))
    assert found.mean == pytest.approx(mean) and found.interval == pytest.approx(want)


def test_the_interval_of_a_difference_is_that_of_the_paired_t_test() -> None:
    found = difference(OTHER, FIRST)
    want = stats.ttest_rel(OTHER, FIRST).confidence_interval(0.95)
    assert found is not None and found.interval == pytest.approx((want.low, want.high))
    alone = mean_of(OTHER)
    assert alone is not None and alone.interval is not None and found.interval is not None
    # what the seeds share is left out of a paired difference
    assert found.interval[1] - found.interval[0] < (alone.interval[1] - alone.interval[0]) / 2


def test_a_seed_that_failed_leaves_its_pair_out() -> None:
    holes = [None, *OTHER[1:]]
    assert difference(holes, FIRST) == difference(OTHER[1:], FIRST[1:])
    assert recovery(holes, LOW, FIRST) == recovery(OTHER[1:], LOW[1:], FIRST[1:])
    assert mean_of([None, 3.0]) == Estimate(3.0, None)
    assert mean_of([None]) is None and difference([None], [1.0]) is None


def test_recovery_with_a_gap_that_is_the_same_for_every_seed_is_a_mean_over_that_gap() -> None:
    gain = [0.1, 0.4, 0.3, 0.9, 0.2]
    found = recovery([low + g for low, g in zip(LOW, gain, strict=True)], LOW, [v + 2 for v in LOW])
    want = mean_of([g / 2 for g in gain])
    assert found is not None and want is not None
    assert found.mean == pytest.approx(want.mean) and found.interval == pytest.approx(want.interval)


def test_at_the_ends_of_a_recovery_s_interval_the_t_test_is_at_its_limit() -> None:
    found = recovery(OTHER, LOW, FIRST)
    assert found is not None and found.interval is not None
    assert found.interval[0] < found.mean < found.interval[1]
    for r in found.interval:
        rest = [
            (v - low) - r * (high - low) for v, low, high in zip(OTHER, LOW, FIRST, strict=True)
        ]
        assert stats.ttest_1samp(rest, 0).pvalue == pytest.approx(0.05, abs=1e-6)


def test_where_backprop_is_not_shown_to_beat_frozen_layers_there_is_no_recovery() -> None:
    assert recovery([1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [2.0, 1.0, 3.5]) is None
    assert recovery([1.0, 2.0], [1.0, 2.0], [2.0, 1.0]) is None  # the means are equal
    assert recovery(OTHER, FIRST, LOW) is None  # frozen layers beat it
    assert recovery([3.0], [2.0], [4.0]) == Estimate(0.5, None)  # a single seed shows no spread


def test_recovery_is_0_for_the_frozen_and_1_for_backprop() -> None:
    for values, want in ((LOW, 0.0), (FIRST, 1.0)):
        found = recovery(values, LOW, FIRST)
        assert found is not None and found.mean == want
        assert found.interval == pytest.approx((want, want), abs=1e-9)


def simulated(seeds: int, draw: random.Random) -> tuple[list[float], list[float], list[float]]:
    """Return the scores of a rule without any effect, of backprop and of frozen layers."""
    shared = [draw.gauss(95, 2) for _ in range(seeds)]  # what a seed is worth to all arms
    rule, backprop = ([s + draw.gauss(0, 0.5) for s in shared] for _ in range(2))
    return rule, backprop, [s - 3 + draw.gauss(0, 0.5) for s in shared]


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_of_1000_comparisons_without_effect_covers_zero_in_93_to_97_per_cent(
    seeds: int,
) -> None:
    draw = random.Random(seeds)
    covered = recovered = 0
    for _ in range(1000):
        rule, backprop, frozen = simulated(seeds, draw)
        found, share = difference(rule, backprop), recovery(rule, frozen, backprop)
        assert found is not None and found.interval is not None
        covered += found.interval[0] <= 0 <= found.interval[1]
        recovered += share is None or share.interval[0] <= 1 <= share.interval[1]
    assert 930 <= covered <= 970
    assert 930 <= recovered <= 975  # no figure excludes nothing

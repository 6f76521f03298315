"""Student's distribution beside scipy's."""

from __future__ import annotations

import pytest
from scipy import stats

from altprop.statistics import half_width, t_quantile


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("freedom", [1, 2, 5, 19])
def test_quantiles_are_scipys(freedom: int, level: float) -> None:
    wanted = stats.t.ppf((1 + level) / 2, freedom)
    assert t_quantile(freedom, level) == pytest.approx(wanted, rel=1e-9)


def test_the_interval_of_a_mean_is_scipys_and_one_value_has_none() -> None:
    values = [0.7, 0.8, 0.95, 0.2]
    low, high = stats.t.interval(0.95, 3, 0.6625, stats.sem(values))
    assert half_width(values) == pytest.approx((high - low) / 2, rel=1e-9)
    assert half_width([0.7]) is None

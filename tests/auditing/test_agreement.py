"""How far two gradients agree: every figure by hand, and none where it would mean nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from altprop import ConfigError
from altprop.auditing.agreement import Flag, compare, compare_all, summarise


def test_figures_equal_those_computed_by_hand() -> None:
    found = compare(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, -3.0]]))
    assert found.cosine == pytest.approx(0.0) and found.descends is False
    found = compare(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0]))
    assert found.cosine == pytest.approx(24 / 25)
    assert found.norm_ratio == pytest.approx(1.0)
    assert found.relative_error == pytest.approx(math.sqrt(2) / 5)
    assert found.sign_agreement == 1.0 and found.descends is True and found.flag is None
    assert compare(torch.tensor([-2.0]), torch.tensor([1.0])).norm_ratio == pytest.approx(2.0)
    assert compare(torch.tensor([-2.0]), torch.tensor([1.0])).cosine == -1.0


def test_signs_are_compared_where_the_reference_has_one() -> None:
    reference = torch.tensor([1.0, -1.0, 2.0, 0.0])
    assert compare(torch.tensor([1.0, 1.0, 0.0, 5.0]), reference).sign_agreement == 1 / 3


def test_a_zero_gradient_has_no_cosine_and_lowers_every_other_figure() -> None:
    found = compare(torch.zeros(3), torch.ones(3))
    assert found.cosine is None and found.flag is Flag.ZERO
    assert (found.norm_ratio, found.relative_error, found.sign_agreement) == (0.0, 1.0, 0.0)
    assert found.descends is False


@pytest.mark.parametrize(
    ("gradient", "reference", "flag"),
    [
        (1.0, 0.0, Flag.REFERENCE_ZERO),
        (0.0, 0.0, Flag.REFERENCE_ZERO),
        (1.0, 1e-4, Flag.REFERENCE_FLOOR),
        (1.0, math.nan, Flag.REFERENCE_NON_FINITE),
        (math.nan, 1.0, Flag.NON_FINITE),
        (math.inf, 1.0, Flag.NON_FINITE),
    ],
)
def test_what_means_nothing_is_flagged_and_has_no_figure(
    gradient: float, reference: float, flag: Flag
) -> None:
    found = compare(torch.full((2,), gradient), torch.full((2,), reference), floor=1e-3)
    assert found.flag is flag
    assert found.cosine is found.norm_ratio is found.relative_error is found.descends is None


def test_a_gradient_that_is_zero_but_for_rounding_is_left_out() -> None:
    # What a norm subtracts has no gradient: float32 leaves a remainder that points anywhere.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False))
    shift = nn.Parameter(torch.zeros(()))  # added to every feature, and taken out again
    loss = (model[1](model[0](torch.randn(64, 8)) + shift) * torch.randn(64, 8)).mean()
    weight, constant = torch.autograd.grad(loss, [model[0].weight, shift])
    reference = {"weight": weight, "shift": constant}
    assert 0 < constant.abs() < 1e-6
    named, whole = compare_all({"weight": weight, "shift": -constant}, reference)
    assert named["shift"].flag is Flag.REFERENCE_FLOOR and named["weight"].cosine == 1.0
    assert whole.cosine == pytest.approx(1.0)


def test_gradients_of_other_shapes_or_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(3,\) with a reference of shape \(2,\)"):
        compare(torch.ones(3), torch.ones(2))
    with pytest.raises(ConfigError, match="on one side only: b"):
        compare_all({"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1)})


def test_a_reference_at_its_floor_is_noise_and_one_above_is_not() -> None:
    reference = {"large": torch.tensor([3.0, 4.0]), "small": torch.tensor([0.05])}
    for floor, flag in ((0.0101, Flag.REFERENCE_FLOOR), (0.0099, None)):
        named, whole = compare_all(reference, reference, floor=floor)
        assert named["small"].flag is flag and named["large"].flag is None
        assert whole.cosine == 1.0 and whole.relative_error == 0.0
    at = compare(torch.ones(1), torch.ones(1), floor=1.0)
    assert at.flag is Flag.REFERENCE_FLOOR  # up to it, and not beyond


def test_without_a_floor_only_what_rounding_leaves_is_noise() -> None:
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        for share, flag in ((20, Flag.REFERENCE_FLOOR), (50, None)):
            reference = {
                "a": torch.ones(1, dtype=dtype),
                "b": torch.full((1,), share * eps).to(dtype),
            }
            assert compare_all(reference, reference)[0]["b"].flag is flag
    # numbers so small that they have lost digits count as noise, however small the whole
    # (an entry below the smallest normal number has, so that four of them have twice its norm)
    for share, flag in ((0.9, Flag.REFERENCE_FLOOR), (1.1, None)):
        tiny = {"a": torch.full((4,), share * torch.finfo(torch.float32).smallest_normal)}
        assert compare_all(tiny, tiny)[0]["a"].flag is flag


def test_gradients_are_paired_by_name_and_compared_in_float64() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    named, whole = compare_all({"b": b, "a": a}, {"a": a, "b": b})
    assert whole.cosine == 1.0 and named["a"].relative_error == 0.0
    large = torch.full((2,), 1e30)  # whose squares are beyond float32
    assert compare(large, large).cosine == pytest.approx(1.0, abs=1e-15)
    over = 0
    for seed in range(50):  # rounding carries no cosine past 1
        v = torch.randn(3, generator=torch.Generator().manual_seed(seed)).double()
        over += float(3 * v @ v) / float((3 * v).norm()) / float(v.norm()) > 1
        assert compare(3 * v, v).cosine <= 1.0 and compare(-3 * v, v).cosine >= -1.0
    assert over > 5


def test_a_parameter_that_is_lost_in_the_reference_hides_no_other() -> None:
    reference = {"a": torch.tensor([math.inf]), "b": torch.tensor([1.0, -2.0])}
    named, whole = compare_all(reference, reference)
    assert named["a"].flag is whole.flag is Flag.REFERENCE_NON_FINITE
    assert named["b"].flag is None and named["b"].cosine == 1.0


def test_a_summary_has_the_t_interval_of_what_there_is_and_the_value_farthest_from_ideal() -> None:
    summary = summarise("cosine", [0.7, None, 0.8, 0.9, None])
    assert summary.count == 3 and summary.mean == pytest.approx(0.8) and summary.worst == 0.7
    assert summary.half_width == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    two = summarise("cosine", [0.7, None, 0.9])
    assert two.half_width == pytest.approx(12.7062 * math.sqrt(0.02) / math.sqrt(2), rel=1e-4)
    assert summarise("cosine", [0.7]).half_width is None
    assert summarise("norm_ratio", [0.4, 2.0]).worst == 0.4  # by its logarithm
    assert summarise("norm_ratio", [2.0, 0.0]).worst == 0.0
    assert summarise("relative_error", [0.1, 0.3]).worst == 0.3

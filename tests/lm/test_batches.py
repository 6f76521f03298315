"""Contexts cut out of a text: random ones to train on, fixed ones to evaluate by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from altprop.errors import ConfigError, DataError
from altprop.lm.text import Batches, check_context, load_corpus, windows


def tokens(length: int = 200) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.arange(length, dtype=np.uint16)


def test_targets_are_inputs_one_position_on() -> None:
    batches = Batches(tokens(), 4, 8, torch.Generator().manual_seed(0))
    x, y = batches.draw()
    assert x.shape == y.shape == (4, 8) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(8))


def test_batches_are_those_of_their_seed() -> None:
    first, again, other = (
        Batches(tokens(), 4, 8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    for _ in range(3):
        x, y = first.draw()
        same, _ = again.draw()
        assert torch.equal(x, same) and not torch.equal(x, other.draw()[0])


def test_batches_go_on_from_the_state_of_their_generator() -> None:
    batches = Batches(tokens(), 4, 8, torch.Generator().manual_seed(3))
    batches.draw()
    state = batches.generator.get_state()
    expected = [x for x, _ in (batches.draw(), batches.draw())]
    generator = torch.Generator()
    generator.set_state(state)
    resumed = Batches(tokens(), 4, 8, generator)
    assert all(torch.equal(resumed.draw()[0], x) for x in expected)


def test_batches_reach_the_first_and_the_last_window_and_no_further() -> None:
    x, y = Batches(tokens(12), 500, 8, torch.Generator().manual_seed(0)).draw()
    assert set(x[:, 0].tolist()) == {0, 1, 2, 3} and int(y.max()) == 11
    x, y = Batches(tokens(9), 3, 8, torch.Generator()).draw()
    assert torch.equal(x, torch.arange(8).expand(3, 8)) and int(y.max()) == 8


def test_impossible_batches_are_refused() -> None:
    generator = torch.Generator()
    with pytest.raises(DataError, match="holds 8 tokens, but a context of 8 needs 9"):
        Batches(tokens(8), 1, 8, generator)
    with pytest.raises(ConfigError, match="batch=0"):
        Batches(tokens(), 0, 8, generator)
    with pytest.raises(ConfigError, match="context=0"):
        Batches(tokens(), 1, 0, generator)
    with pytest.raises(DataError, match="needs 9"):
        windows(tokens(8), 1, 8, 0)
    with pytest.raises(ConfigError, match="count=0"):
        windows(tokens(), 0, 8, 0)


def test_evaluation_windows_are_fixed_and_cover_the_text() -> None:
    x, y = windows(tokens(), 16, 8, seed=5)
    assert x.shape == (16, 8) and torch.equal(y, x + 1)
    assert torch.equal(x, windows(tokens(), 16, 8, seed=5)[0])
    assert not torch.equal(x, windows(tokens(), 16, 8, seed=6)[0])
    starts = x[:, 0].double()
    stretch = (200 - 8) / 16
    assert torch.equal((starts / stretch).floor(), torch.arange(16).double())


@given(st.integers(2, 40), st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=50)
def test_evaluation_windows_stay_inside_the_text(length: int, count: int, seed: int) -> None:
    x, y = windows(tokens(length), count, 1, seed)
    assert torch.equal(y, x + 1) and int(x.min()) >= 0 and int(y.max()) < length


def test_a_context_longer_than_a_split_is_refused_with_both_lengths(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    corpus = load_corpus(tmp_path / "a.txt")
    check_context(corpus, 9)
    with pytest.raises(DataError, match="validation split of a.txt holds 10 .* of 10 needs 11"):
        check_context(corpus, 10)
    with pytest.raises(DataError, match="train split of a.txt holds 90 .* of 90 needs 91"):
        check_context(corpus, 90)
    with pytest.raises(ConfigError, match="context=0"):
        check_context(corpus, 0)

"""Every test starts from the same seed, and what hypothesis draws is the same on every machine."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("altprop", derandomize=True, deadline=None, max_examples=10)
settings.load_profile("altprop")

torch.set_num_threads(1)  # the tensors here are tiny: a second thread would only spin


@pytest.fixture(autouse=True, scope="session")
def _without_waiting_for_the_disk() -> Iterator[None]:
    """A power failure is no test's business, and a hundred runs would wait for the disk each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda opened: None)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="module")
def no_curves() -> Iterator[None]:
    """Draw no run: that takes longer than all else in a tiny one, and tests/test_report.py does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("altprop.lab.train.plot_run", lambda folder: folder)
        yield


@pytest.fixture
def as_in_a_terminal() -> Iterator[None]:
    """Let signals do what they do there: background jobs begin with SIGINT or SIGHUP ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, hangup)


def pytest_configure(config: pytest.Config) -> None:
    # torch's own forward mode still registers its decompositions with torch.jit.script
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script` is:DeprecationWarning")


def pytest_collection_finish(session: pytest.Session) -> None:
    # what was imported is never garbage: to look through it takes most of every gc.collect()
    gc.collect()
    gc.freeze()

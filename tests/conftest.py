"""Every test starts from the same seed, and what hypothesis draws is the same on every machine."""

from __future__ import annotations

import gc
import os
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


def pytest_configure(config: pytest.Config) -> None:
    # torch's own forward mode still registers its decompositions with torch.jit.script
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script` is:DeprecationWarning")


def pytest_collection_finish(session: pytest.Session) -> None:
    # what was imported is never garbage: to look through it takes most of every gc.collect()
    gc.collect()
    gc.freeze()

"""Random numbers that are drawn twice alike."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def drawing_alike() -> Iterator[None]:
    """Draw inside what would be drawn afterwards, of torch's numbers, Python's and numpy's."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)

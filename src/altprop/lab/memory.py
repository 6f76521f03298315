"""The memory that a run needs at least, counted before any of it is asked for.

A system that is asked for more than it has may end any process, this one without a word.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

from altprop import ConfigError
from altprop.lm.blocks import ModelConfig
from altprop.reading import in_bytes

FLOAT, INT = 4, 8  # bytes of a number in a model, and of an id in a batch
# numbers in the matrices of a block, in units of the width squared; vectors are left out
MATRICES = {"gpt": 12, "gated": 12, "thick": 12, "damped": 4}
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def weights(shape: ModelConfig, model: str) -> int:
    """Return how many weights a `gpt` or `equilibrium` of that shape has, vectors left out."""
    gpt = model == "gpt"
    layers = shape.layers or (4 if gpt else 1)
    embeddings = shape.context + shape.vocabulary * (1 if gpt and shape.tie_head else 2)
    blocks = layers * MATRICES["gpt" if gpt else shape.block] * shape.d_model
    return shape.d_model * (embeddings + blocks)


def training(shape: ModelConfig, model: str, batch: int, windows: int, average: bool) -> int:
    """Return the bytes of weights, gradients, moments, one batch and the windows of evaluation.

    **Arguments:** `average`, whether the weights are kept a second time.
    """
    kept = (4 + average) * weights(shape, model)  # gradients and two moments beside the weights
    seen = batch * shape.context * (shape.d_model + 2 * shape.vocabulary)  # logits and their own
    return FLOAT * (kept + seen) + INT * 2 * windows * shape.context


def check_memory(needed: int, what: str) -> None:
    """Refuse what needs more memory than this machine has.

    **Arguments:** `needed`, bytes; `what`, what they are for and which sizes they come from.

    **Raises:** `ConfigError`.
    """
    if needed > (there := available()):
        raise ConfigError(
            f"{what}: at least {in_bytes(needed)} of memory, but there are {in_bytes(there)}: "
            "take a smaller size"
        )


def available() -> int:
    """Return the bytes of memory that this process may have."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        found.append(limit)
    for path in map(Path, _LIMITS):
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            found.append(int(text))
    return min(found)

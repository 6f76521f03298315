"""Windows of ids: batches to train on, and fixed ones to be judged by.

Legend: B sequences in a batch, T ids in a sequence (the context).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from altprop.errors import ConfigError
from altprop.lm.text.corpus import check_length
from altprop.lm.text.token_file import Tokens

if TYPE_CHECKING:  # torch is imported where batches are made: encoding text does not need it
    import torch


class Batches:
    """Draws endless batches of random windows from ids.

    Each draw takes B starts from `generator` (on the CPU), whose state is all the state there is: a
    run that restores it goes on with the batches that would have come.

    Raises ConfigError for `batch` or `context` below 1 or a generator elsewhere, and DataError when
    there are fewer than `context + 1` tokens.
    """

    def __init__(
        self, tokens: Tokens, batch: int, context: int, generator: torch.Generator
    ) -> None:
        if batch < 1:
            raise ConfigError(f"batch={batch}: expected at least 1")
        check_length("the text", len(tokens), context)
        if generator.device.type != "cpu":
            raise ConfigError(
                f"generator on {generator.device}: expected torch.Generator(), on the CPU, "
                "so that the batches are the same on every device"
            )
        self.tokens, self.batch, self.context = tokens, batch, context
        self.generator = generator

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs x and targets y, both int64 (B, T): y is x one position on."""
        import torch

        last = len(self.tokens) - self.context
        starts = torch.randint(last, (self.batch,), generator=self.generator)
        return gather(self.tokens, starts.numpy(), self.context)


def windows(
    tokens: Tokens, count: int, context: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `count` fixed windows for evaluation: x and y, both int64 (count, T).

    One window starts at a random place in each of `count` equal stretches of the text. The mean
    over them estimates the mean over all windows without bias, like independent starts, and with
    less variance. The same arguments give the same windows.
    """
    import torch

    if count < 1:
        raise ConfigError(f"count={count}: expected at least 1")
    check_length("the text", len(tokens), context)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.rand(count, generator=generator, dtype=torch.float64).numpy()
    last = len(tokens) - context
    starts = ((np.arange(count) + offsets) * (last / count)).astype(np.int64)
    return gather(tokens, np.minimum(starts, last - 1), context)


def gather(
    tokens: Tokens, starts: NDArray[np.int64], context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the windows at `starts`, x and y, both int64 (B, T)."""
    import torch

    rows = [tokens[start : start + context + 1] for start in starts.tolist()]
    both = torch.from_numpy(np.stack(rows).astype(np.int64))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()

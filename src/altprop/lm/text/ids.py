"""Ids of which nobody has said what they mean, as in a token folder of somebody else's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from altprop.errors import CheckpointError, DataError
from altprop.files import write_whole
from altprop.lm.text.tokenizer import (
    AbstractTokenizer,
    Ids,
    read_vocabulary,
    row_of_ids,
    width_of,
)

FORMAT = "altprop-ids-1"
LARGEST_SIZE = (1 << 31) - 1


@dataclass(frozen=True)
class IdTokenizer(AbstractTokenizer):
    """Stands for the ids below `size`, whose text is their numbers with spaces between them.

    **Raises:** `DataError` for fewer than one id, or more than 2³¹ − 1.
    """

    size: int

    file: ClassVar[str] = "vocab.json"

    def __post_init__(self) -> None:
        if type(self.size) is not int or not 1 <= self.size <= LARGEST_SIZE:
            raise DataError(f"ids:{self.size}: expected how many ids there are, such as ids:50257")

    @classmethod
    def from_json(cls, path: str | Path, folder: int | None = None) -> IdTokenizer:
        """Read what `to_json` wrote, or that file of the folder that has this descriptor."""
        expected = f"expected the file that IdTokenizer.to_json writes ({FORMAT})"
        content = read_vocabulary(path, folder, expected)
        if content.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a number of ids: {expected}")
        return cls(content.get("size"))  # type: ignore[arg-type]

    def to_json(self, path: str | Path) -> None:
        content = {"format": FORMAT, "size": self.size}
        write_whole(Path(path), json.dumps(content, indent=1) + "\n")

    def __len__(self) -> int:
        return self.size

    def digest(self) -> str:
        return hashlib.sha256(f"{FORMAT}:{self.size}".encode()).hexdigest()

    def encode(self, text: str) -> Ids:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError:
            raise DataError(
                f"{text[:40]!r} is no row of ids: of this run only the numbers of its tokens are "
                "known; write some, such as '12 7 4'"
            ) from None
        return row_of_ids(ids, self.size).astype(width_of(self.size))

    def decode(self, ids: ArrayLike | Iterable[int]) -> str:
        return " ".join(map(str, row_of_ids(ids, self.size).tolist()))

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        for index in ids:
            yield f"{self.decode([index])} "

    def facts(self) -> dict[str, Any]:
        return {}

    def opening(self) -> Ids:
        return np.zeros(1, dtype=width_of(self.size))

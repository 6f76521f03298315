"""The ids of a prepared folder: they stay in their file and are read, and checked, as needed."""

from __future__ import annotations

import hashlib
import os
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from altprop.errors import DataError
from altprop.lm.text.tokenizer import CHUNK, Ids
from altprop.reading import open_regular

LARGEST = 1 << 40  # bytes
WIDTH = 2  # bytes of an id


class TokenFile:
    """A row of ids in a file of raw little-endian uint16, of which a slice is an array.

    The file that was opened is the one that is read, whatever its name stands for later. It is not
    mapped into memory: a mapped file that becomes shorter ends the process.

    **Arguments:** `name`, of a file in the folder whose descriptor is `folder`; `where`, the whole
    path, for errors; `vocabulary`, the number above all ids.

    **Raises:** `DataError` for a file of another layout, and for ids that the vocabulary lacks,
    also when they are read later.
    """

    dtype = np.dtype("<u2")

    def __init__(self, folder: int, name: str, where: str, vocabulary: int) -> None:
        self._where, self._vocabulary = where, vocabulary
        self._file = open_regular(name, LARGEST, folder)
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        if size == 0 or size % WIDTH:
            raise DataError(
                f"{where} has {size} bytes: expected raw uint16 ids, an even number above 0"
            )
        self._length = size // WIDTH

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> Ids:
        start, stop, step = part.indices(self._length)
        raw = bytearray(max(0, stop - start) * WIDTH)
        read, view = 0, memoryview(raw)
        while read < len(raw):
            got = os.preadv(self._file, [view[read : read + (1 << 26)]], start * WIDTH + read)
            if not got:
                raise DataError(
                    f"{self._where} has become shorter since it was opened: it held "
                    f"{self._length} ids, and must stay as it is while it is used"
                )
            read += got
        ids: Ids = np.frombuffer(raw, self.dtype)
        if len(ids) and (largest := int(ids.max())) >= self._vocabulary:
            raise DataError(
                f"{self._where} holds the id {largest}, but its vocabulary has {self._vocabulary} "
                "characters: the tokens and the vocabulary are not of the same text"
            )
        return ids[::step]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        ids = self[:]
        return ids if dtype is None else ids.astype(dtype)

    def digest(self) -> str:
        """Read the whole file, which checks every id, and return its SHA-256."""
        digest = hashlib.sha256()
        for start in range(0, len(self), CHUNK):
            digest.update(self[start : start + CHUNK].data)
        return digest.hexdigest()


Tokens = Ids | TokenFile
"""A row of ids, in memory or in a file: it has a length, and a slice of it is an array."""

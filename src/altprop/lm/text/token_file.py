"""The ids of a prepared folder: they stay in their file and are read, and checked, as needed."""

from __future__ import annotations

import hashlib
import os
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from altprop.errors import DataError
from altprop.lm.text.tokenizer import CHUNK, Ids, width_of
from altprop.reading import open_regular

LARGEST = 1 << 40  # bytes


class TokenFile:
    """A row of ids in a file of raw little-endian integers, of which a slice is an array.

    An id takes 16 bits, or 32 where the vocabulary has more than 65536.

    The file that was opened is the one that is read, whatever its name stands for later. It is not
    mapped into memory: a mapped file that becomes shorter ends the process.

    **Arguments:** `name`, of a file in the folder whose descriptor is `folder`; `where`, the whole
    path, for errors; `vocabulary`, the number above all ids.

    **Raises:** `DataError` for a file of another layout, and for ids that the vocabulary lacks,
    also when they are read later.
    """

    def __init__(self, folder: int, name: str, where: str, vocabulary: int) -> None:
        self._where, self._vocabulary = where, vocabulary
        self.dtype = width_of(vocabulary).newbyteorder("<")
        self._file = open_regular(name, LARGEST, folder)
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        width = self.dtype.itemsize
        if size == 0 or size % width:
            raise DataError(
                f"{where} has {size} bytes: expected raw uint{8 * width} ids, a multiple of "
                f"{width} above 0"
            )
        self._length = size // width

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> Ids:
        start, stop, step = part.indices(self._length)
        width = self.dtype.itemsize
        raw = bytearray(max(0, stop - start) * width)
        read, view = 0, memoryview(raw)
        while read < len(raw):
            got = os.preadv(self._file, [view[read : read + (1 << 26)]], start * width + read)
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
                "entries: the tokens and the vocabulary are not of the same text"
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

"""Turns text into integers and back: what a tokenizer is, and the one that takes characters."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from altprop.errors import CheckpointError, DataError
from altprop.files import write_whole
from altprop.reading import parse_json, read_bytes

Ids = NDArray[np.unsignedinteger[Any]]

CHUNK = 1 << 22  # characters or ids that are looked at in one piece
VOCAB_FORMAT = "altprop-characters-1"
LARGEST_VOCAB = 32 << 20  # bytes; all characters that there are take about half of it
NARROW = 1 << 16  # ids that 16 bits can number


class AbstractTokenizer(ABC):
    """Turns text into ids below its length, and ids back into text.

    `file`, the name under which a folder keeps it; `unit`, what an id stands for, in the plural.
    """

    file: ClassVar[str]
    unit: ClassVar[str] = "tokens"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Return the ids of `text`; DataError for text that it cannot turn into ids."""

    @abstractmethod
    def decode(self, ids: ArrayLike | Iterable[int]) -> str:
        """Return the text of a one-dimensional sequence of ids; DataError for a foreign id."""

    @abstractmethod
    def digest(self) -> str:
        """Return the SHA-256 of all that decides what its ids mean."""

    @abstractmethod
    def to_json(self, path: str | Path) -> None:
        """Write it as JSON that reads back as the same tokenizer."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what a description of a corpus says of it, by name."""

    @abstractmethod
    def opening(self) -> Ids:
        """Return what a text may start after: a line break, else a space, else its first id."""

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of ids as they come; no character is cut."""
        for index in ids:
            yield self.decode([index])


def row_of_ids(ids: ArrayLike | Iterable[int], vocabulary: int) -> NDArray[Any]:
    """Return ids as a row of integers, all of them below `vocabulary`; DataError for others."""
    array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))  # type: ignore[arg-type]
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"cannot decode {array.dtype} of shape {array.shape}: expected a row of integers"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocabulary:
        raise DataError(
            f"cannot decode the id {low if low < 0 else high}: "
            f"the vocabulary has the ids 0 to {vocabulary - 1}"
        )
    return array


def read_vocabulary(path: str | Path, folder: int | None, expected: str) -> dict[str, Any]:
    """Read a `vocab.json`, or that file of the folder that has this descriptor; of none, nothing.

    Raises CheckpointError, which says what was `expected`, when it is missing or truncated.
    """
    try:
        name = path if folder is None else Path(path).name
        content = parse_json(read_bytes(name, LARGEST_VOCAB, folder).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged or not JSON: {expected}") from error
    return content if isinstance(content, dict) else {}


def width_of(vocabulary: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return what ids of so large a vocabulary are kept in: uint16, or uint32 past 65536."""
    return np.dtype(np.uint32 if vocabulary > NARROW else np.uint16)


@dataclass(frozen=True)
class CharTokenizer(AbstractTokenizer):
    """Maps each character of a vocabulary to its position in it, and back.

    `from_text` sorts the vocabulary by code point; one that comes with somebody else's tokens keeps
    its order. Raises DataError when `vocab` is empty or not distinct single characters.
    """

    vocab: tuple[str, ...]

    file: ClassVar[str] = "vocab.json"
    unit: ClassVar[str] = "characters"

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab", tuple(self.vocab))
        if not self.vocab:
            raise DataError("the vocabulary is empty: expected at least one character")
        seen: set[str] = set()
        for index, char in enumerate(self.vocab):
            if not isinstance(char, str) or len(char) != 1 or "\ud800" <= char <= "\udfff":
                raise DataError(f"entry {index} of the vocabulary is not a single character")
            if char in seen:
                raise DataError(f"the vocabulary holds {char!r} twice: its entries must differ")
            seen.add(char)

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """Take the sorted distinct characters of `text` as the vocabulary."""
        return cls(tuple(sorted(set(text))))

    @classmethod
    def from_json(cls, path: str | Path, folder: int | None = None) -> CharTokenizer:
        """Read what `to_json` wrote, or that file of the folder that has this descriptor.

        Raises CheckpointError when the file is missing, truncated or foreign, and DataError when
        its characters make no vocabulary.
        """
        expected = f"expected the file that CharTokenizer.to_json writes ({VOCAB_FORMAT})"
        content = read_vocabulary(path, folder, expected)
        if content.get("format") != VOCAB_FORMAT:
            raise CheckpointError(f"{path} is not a vocabulary: {expected}")
        characters = content.get("characters")
        if not isinstance(characters, list):
            raise CheckpointError(f"{path} has no list of characters: {expected}")
        return cls(tuple(characters))

    def to_json(self, path: str | Path) -> None:
        """Write the vocabulary as JSON that a person can read, the characters in order of id."""
        content = {"format": VOCAB_FORMAT, "size": len(self), "characters": list(self.vocab)}
        write_whole(Path(path), json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    def __len__(self) -> int:
        return len(self.vocab)

    def digest(self) -> str:
        """Return the SHA-256 of the characters in order of id."""
        return hashlib.sha256("".join(self.vocab).encode("utf-8")).hexdigest()

    @cached_property
    def _ids(self) -> NDArray[np.int64]:
        # By code point; one entry more than the largest, to which every larger one is clipped.
        points = [ord(char) for char in self.vocab]
        table = np.full(max(points) + 2, -1, dtype=np.int64)
        table[points] = np.arange(len(points))
        return table

    def encode(self, text: str) -> Ids:
        """Return the ids of `text`: uint16, or uint32 for more than 65536 characters.

        Raises DataError that names the characters outside the vocabulary.
        """
        ids = np.empty(len(text), dtype=width_of(len(self)))
        for start in range(0, len(text), CHUNK):
            piece = text[start : start + CHUNK].encode("utf-32-le", "surrogatepass")
            points = np.frombuffer(piece, dtype="<u4")
            found = self._ids[np.minimum(points, len(self._ids) - 1)]
            if found.min() < 0:
                self._refuse(text)
            ids[start : start + len(found)] = found
        return ids

    def _refuse(self, text: str) -> NoReturn:
        foreign = sorted(set(text) - set(self.vocab))
        shown = ", ".join(repr(char) for char in foreign[:10])
        more = f" and {len(foreign) - 10} more" if len(foreign) > 10 else ""
        raise DataError(
            f"the vocabulary of {len(self)} characters lacks {shown}{more}: "
            "remove or replace them, or train on a corpus that contains them"
        )

    def decode(self, ids: ArrayLike | Iterable[int]) -> str:
        """Return the text of a one-dimensional sequence of ids; DataError for a foreign id."""
        return "".join(map(self.vocab.__getitem__, row_of_ids(ids, len(self)).tolist()))

    def facts(self) -> dict[str, Any]:
        return {"characters": "".join(self.vocab)}

    def opening(self) -> Ids:
        return self.encode(next((mark for mark in "\n " if mark in self.vocab), self.vocab[0]))

"""Tokens longer than a character, by the library tokenizers: trained on a text, or from a file.

A tokenizer is the text of its `tokenizer.json`, bit for bit, which is data and runs nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from altprop.errors import DataError, in_a_line
from altprop.files import write_whole
from altprop.lm.text.tokenizer import AbstractTokenizer, Ids, row_of_ids, width_of
from altprop.reading import parse_json, read_bytes
from altprop.terminal import unheard

if TYPE_CHECKING:
    import tokenizers

INSTALL = 'pip install "altprop[hf]"'
LARGEST = 64 << 20  # bytes of a tokenizer.json
LARGEST_ID = (1 << 31) - 1
PIECE = 1 << 20  # characters that are encoded at a time
_LINE = re.compile(r"(?<=\n)(?=\S)")  # where no token of a byte-level BPE goes on


@dataclass(frozen=True, repr=False)
class SubwordTokenizer(AbstractTokenizer):
    """The tokenizer of a `tokenizer.json`, of any kind that the library tokenizers knows.

    No special tokens are added to a text, and it is never cut off or padded. A text is encoded in
    pieces of about a million characters, each cut before a line if there is one; what is trained by
    `train_bpe` encodes them as it would the whole, and decodes every text exactly.

    **Arguments:** `text`, what the file says.

    **Raises:** `DataError` for what is no tokenizer, and without the library.
    """

    text: str

    file: ClassVar[str] = "tokenizer.json"

    def __post_init__(self) -> None:
        if not self._vocabulary:
            raise DataError("the tokenizer's vocabulary is empty: expected at least one token")
        if len(self) > LARGEST_ID:
            raise DataError(f"the tokenizer has the id {len(self) - 1}, the largest is 2^31 - 2")

    @classmethod
    def from_json(cls, path: str | Path, folder: int | None = None) -> SubwordTokenizer:
        """Read a `tokenizer.json`, or that file of the folder that has this descriptor."""
        try:
            name = path if folder is None else Path(path).name
            text = read_bytes(name, LARGEST, folder).decode("utf-8")
            read = parse_json(text)  # which bounds how deeply it nests
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise DataError(f"{path} is damaged or not JSON: expected a tokenizer.json") from error
        try:
            _check_table(read)
            return cls(text)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error.__cause__

    def to_json(self, path: str | Path) -> None:
        """Write the file that the tokenizer is."""
        write_whole(Path(path), self.text)

    @cached_property
    def _model(self) -> tokenizers.Tokenizer:
        with _told("no tokenizer that the library tokenizers can read"):
            model = library().Tokenizer.from_str(self.text)
            model.no_truncation()
            model.no_padding()
        return model

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return self._model.get_vocab(with_added_tokens=True)

    @cached_property
    def _size(self) -> int:
        return max(self._vocabulary.values()) + 1

    def __len__(self) -> int:
        return self._size

    def digest(self) -> str:
        """Return the SHA-256 of the file."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()

    def encode(self, text: str) -> Ids:
        """Return the ids of `text`: uint16, or uint32 for more than 65536 tokens.

        Raises DataError for text that the tokenizer has no tokens for.
        """
        dtype = width_of(len(self))
        with _told("the tokenizer cannot encode the text"):
            rows = [
                np.array(self._model.encode(piece, add_special_tokens=False).ids, dtype=dtype)
                for piece in pieces_of(text)
            ]
        return np.concatenate([np.empty(0, dtype=dtype), *rows])

    def decode(self, ids: ArrayLike | Iterable[int]) -> str:
        """Return the text of a one-dimensional sequence of ids; DataError for a foreign id."""
        row = row_of_ids(ids, len(self)).tolist()
        with _told("the tokenizer cannot decode the ids"):
            return self._model.decode(row, skip_special_tokens=False)

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of ids as they come; what is part of a character waits for its rest."""
        stream = library().decoders.DecodeStream(skip_special_tokens=False)
        waiting: list[int] = []
        for index in ids:
            waiting += row_of_ids([index], len(self)).tolist()
            with _told("the tokenizer cannot decode the ids"):
                text = stream.step(self._model, index)
            if text is not None:
                waiting.clear()
                yield text
        if waiting:
            yield self.decode(waiting)

    def facts(self) -> dict[str, Any]:
        return {"tokenizer": type(self._model.model).__name__}

    def opening(self) -> Ids:
        for mark in "\n ":
            if len(ids := self.encode(mark)):
                return ids[:1]
        return np.zeros(1, dtype=width_of(len(self)))


def train_bpe(text: str, size: int) -> SubwordTokenizer:
    """Learn a byte-level BPE of at most `size` tokens from a text; it can encode every other too.

    The same text gives the same tokens. A short text gives fewer than `size`: those there are.

    **Raises:** `DataError` for fewer than 256 tokens, that of each byte, and without the library.
    """
    if not 256 <= size <= LARGEST_ID:
        raise DataError(f"bpe:{size}: expected at least 256 tokens, one for each byte")
    with _told("a BPE cannot be trained"):
        lib = library()
        model = lib.Tokenizer(lib.models.BPE())
        model.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = lib.decoders.ByteLevel()
        trainer = lib.trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(pieces_of(text), trainer)
        return SubwordTokenizer(model.to_str())


def pieces_of(text: str) -> Iterator[str]:
    """Yield a text in pieces of about `PIECE` characters, cut before a line if there is one."""
    start = 0
    while start < len(text):
        found = _LINE.search(text, min(start + PIECE, len(text)), start + 2 * PIECE)
        end = found.end() if found else start + 2 * PIECE
        yield text[start:end]
        start = end


def library() -> Any:
    """Return the library tokenizers; DataError, with what to install, without it."""
    try:
        import tokenizers
    except ImportError:
        raise DataError(f"BPE and tokenizer.json need the package tokenizers: {INSTALL}") from None
    return tokenizers


def _check_table(read: Any) -> None:
    """Refuse a table of characters that states more bytes than it has.

    The library asks for as many as are stated before it looks, and where they are not to be had it
    ends the process.
    """
    waiting = [read.get("normalizer") if isinstance(read, dict) else None]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
            table = value.get("precompiled_charsmap")
            if not isinstance(table, str):
                continue
            try:
                content = base64.b64decode(table)
            except ValueError:  # which the library refuses too
                continue
            stated = int.from_bytes(content[:4], "little")
            if stated > len(content) - 4:
                raise DataError(
                    f"the normalizer's precompiled_charsmap states {stated} bytes and has "
                    f"{max(len(content) - 4, 0)}"
                )


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn whatever the library raises, a panic of its Rust too, into one DataError."""
    try:
        with unheard():
            yield
    except (DataError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise DataError(f"{what}: {in_a_line(error)}") from error

"""The ids of a text to learn from, and of one to be judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from altprop.errors import ConfigError, DataError
from altprop.lm.text.token_file import Tokens
from altprop.lm.text.tokenizer import CHUNK, AbstractTokenizer, Ids


@dataclass(frozen=True, eq=False)
class Corpus:
    """The ids of a text to train on and one to validate on, in memory or in a file."""

    name: str
    description: str
    train: Tokens
    validation: Tokens
    tokenizer: AbstractTokenizer


def check_context(corpus: Corpus, context: int) -> None:
    """Raise DataError unless each split holds one window: `context` ids and one to predict."""
    for split, ids in (("train", corpus.train), ("validation", corpus.validation)):
        check_length(f"the {split} split of {corpus.name}", len(ids), context)


def check_length(what: str, length: int, context: int) -> None:
    """Raise DataError unless a text of so many ids holds one window."""
    if context < 1:
        raise ConfigError(f"context={context}: expected at least 1")
    if length < context + 1:
        raise DataError(
            f"{what} holds {length} tokens, but a context of {context} needs {context + 1}: "
            "give more text or a shorter context"
        )


def describe(corpus: Corpus) -> dict[str, Any]:
    """Return what identifies a corpus: its sizes in ids, vocabulary, digests and first words.

    The SHA-256 digests are those of the ids as little-endian unsigned integers of their width.
    """
    return {
        "name": corpus.name,
        "description": corpus.description,
        "train": len(corpus.train),
        "validation": len(corpus.validation),
        "vocabulary": len(corpus.tokenizer),
        **corpus.tokenizer.facts(),
        "train_sha256": _digest(corpus.train),
        "validation_sha256": _digest(corpus.validation),
        "head": corpus.tokenizer.decode(corpus.train[:200]),
    }


def little_endian(ids: Tokens) -> Iterator[Ids]:
    """Yield ids as little-endian pieces, the same on every machine."""
    for start in range(0, len(ids), CHUNK):
        piece = ids[start : start + CHUNK]
        yield np.ascontiguousarray(piece, dtype=piece.dtype.newbyteorder("<"))


def _digest(ids: Tokens) -> str:
    digest = hashlib.sha256()
    for piece in little_endian(ids):
        digest.update(piece.data)
    return digest.hexdigest()

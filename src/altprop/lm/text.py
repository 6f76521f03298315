"""Turns text into integers and back: the character tokenizer, corpora of ids, batches of windows.

Legend: B sequences in a batch, T ids in a sequence (the context).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from altprop.errors import CheckpointError, ConfigError, DataError
from altprop.files import write_whole
from altprop.lm.corpora import (
    CorpusInfo,
    list_corpora,
    names_corpus,
    plays_text,
    read_characters,
    read_source,
)

if TYPE_CHECKING:  # torch is imported where batches are made: encoding text does not need it
    import torch
    from numpy.typing import ArrayLike, NDArray

    Ids = NDArray[np.unsignedinteger[Any]]

__all__ = [
    "Batches",
    "CharTokenizer",
    "Corpus",
    "CorpusInfo",
    "check_context",
    "describe",
    "gather",
    "list_corpora",
    "load_corpus",
    "plays_text",
    "prepare",
    "windows",
]

CHUNK = 1 << 22  # characters or ids that are looked at in one piece
VOCAB_FORMAT = "altprop-characters-1"
PREPARED = ("train.bin", "val.bin", "vocab.json", "meta.pkl")


# -------------------------------------------------------------------------------------- tokenizer


@dataclass(frozen=True)
class CharTokenizer:
    """Maps each character of a vocabulary to its position in it, and back.

    `from_text` sorts the vocabulary by code point; one that comes with somebody else's tokens keeps
    its order. Raises DataError when `vocab` is empty or not distinct single characters.
    """

    vocab: tuple[str, ...]

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
    def from_json(cls, path: str | Path) -> CharTokenizer:
        """Read what `to_json` wrote.

        Raises CheckpointError when the file is missing, truncated or foreign, and DataError when
        its characters make no vocabulary.
        """
        expected = f"expected the file that CharTokenizer.to_json writes ({VOCAB_FORMAT})"
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged or not JSON: {expected}") from error
        if not isinstance(content, dict) or content.get("format") != VOCAB_FORMAT:
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

    @property
    def size(self) -> int:
        """The number of characters."""
        return len(self.vocab)

    @cached_property
    def _ids(self) -> NDArray[np.int64]:
        # By code point; one entry more than the largest, to which every larger one is clipped.
        points = [ord(char) for char in self.vocab]
        table = np.full(max(points) + 2, -1, dtype=np.int64)
        table[points] = np.arange(len(points))
        return table

    def encode(self, text: str) -> Ids:
        """Return the ids of `text`: uint16, or uint32 for more than 65535 characters.

        Raises DataError that names the characters outside the vocabulary.
        """
        width: type[np.unsignedinteger[Any]] = np.uint32 if len(self) > 65535 else np.uint16
        ids = np.empty(len(text), dtype=width)
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
        array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))  # type: ignore[arg-type]
        if array.size == 0:
            return ""
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(
                f"cannot decode {array.dtype} of shape {array.shape}: expected a row of integers"
            )
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= len(self):
            raise DataError(
                f"cannot decode the id {low if low < 0 else high}: "
                f"the vocabulary has the ids 0 to {len(self) - 1}"
            )
        return "".join(map(self.vocab.__getitem__, array.tolist()))


# ----------------------------------------------------------------------------------------- corpora


@dataclass(frozen=True, eq=False)
class Corpus:
    """The ids of a text to train on and one to validate on, in memory or mapped from a file."""

    name: str
    description: str
    train: Ids
    validation: Ids
    tokenizer: CharTokenizer


def load_corpus(spec: str | Path) -> Corpus:
    """Load the corpus that `spec` names.

    `spec` is a name (`list_corpora`), a UTF-8 text file, a folder of `*.txt` and `*.md` files, or a
    folder of nanoGPT's layout: `train.bin`, `val.bin` (raw little-endian uint16, mapped, not read
    into memory) and `vocab.json` or `meta.pkl`. How text is read and split stands in
    `altprop.lm.corpora.read_source`; the vocabulary is that of both splits.

    Raises DataError, one line each, for everything that cannot be used.
    """
    if spec != "" and not names_corpus(spec):
        folder = Path(spec).expanduser()
        if any(os.path.exists(folder / name) for name in ("train.bin", "val.bin")):
            return _load_prepared(folder)
    source = read_source(spec)
    tokenizer = CharTokenizer(tuple(sorted(set(source.train) | set(source.validation))))
    train, validation = tokenizer.encode(source.train), tokenizer.encode(source.validation)
    return Corpus(source.name, source.description, train, validation, tokenizer)


def check_context(corpus: Corpus, context: int) -> None:
    """Raise DataError unless each split holds one window: `context` ids and one to predict."""
    for split, ids in (("train", corpus.train), ("validation", corpus.validation)):
        _check_length(f"the {split} split of {corpus.name}", len(ids), context)


def _check_length(what: str, length: int, context: int) -> None:
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
        "characters": "".join(corpus.tokenizer.vocab),
        "train_sha256": _digest(corpus.train),
        "validation_sha256": _digest(corpus.validation),
        "head": corpus.tokenizer.decode(corpus.train[:200]),
    }


def _little(ids: Ids) -> Iterator[Ids]:
    for start in range(0, len(ids), CHUNK):
        piece = ids[start : start + CHUNK]
        yield np.ascontiguousarray(piece, dtype=piece.dtype.newbyteorder("<"))


def _digest(ids: Ids) -> str:
    digest = hashlib.sha256()
    for piece in _little(ids):
        digest.update(piece.data)
    return digest.hexdigest()


# --------------------------------------------------------------------------------- prepared folders


def prepare(spec: str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """Encode a corpus once into the folder `out`, which `load_corpus` then maps; return `out`.

    The folder is nanoGPT's: `train.bin` and `val.bin` (raw uint16) and `meta.pkl`, and besides
    `vocab.json`, the same vocabulary for people. It is written beside `out` and renamed, so that
    `out` is there whole or not at all.

    Raises DataError when the corpus cannot be used or has more than 65536 characters, when `out`
    is a file or holds anything and `overwrite` is false, or when it holds more than such a folder
    does: `overwrite` replaces a prepared folder and nothing else.
    """
    target = Path(os.path.abspath(Path(out).expanduser()))
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        _check_target(target, overwrite)
        corpus = load_corpus(spec)
        if len(corpus.tokenizer) > 65536:
            raise DataError(
                f"{corpus.name} has {len(corpus.tokenizer)} characters, more than the 65536 that "
                "nanoGPT's uint16 layout can number: use the text itself"
            )
        fresh.mkdir(parents=True)
        for name, ids in (("train.bin", corpus.train), ("val.bin", corpus.validation)):
            with (fresh / name).open("wb") as file:
                for piece in _little(ids):
                    file.write(piece.astype("<u2", copy=False).data)
        corpus.tokenizer.to_json(fresh / "vocab.json")
        (fresh / "meta.pkl").write_bytes(pickle.dumps(_meta(corpus.tokenizer), protocol=4))
        _swap(fresh, target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return Path(out)


def _check_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise DataError(f"{target} is a file or a link: give the path of a folder to write")
    held = sorted(os.listdir(target))
    if held and not overwrite:
        raise DataError(f"{target} is not empty: give another folder, or overwrite (--overwrite)")
    if foreign := [name for name in held if name not in PREPARED]:
        raise DataError(
            f"{target} holds {foreign[0]!r}, which no prepared folder does, and will not be "
            "replaced: give another folder"
        )


def _swap(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    aside = fresh.with_suffix(".replaced")
    target.rename(aside)
    try:
        fresh.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def _meta(tokenizer: CharTokenizer) -> dict[str, Any]:
    itos = dict(enumerate(tokenizer.vocab))
    stoi = {char: index for index, char in itos.items()}
    return {"vocab_size": len(tokenizer), "itos": itos, "stoi": stoi}


def _load_prepared(folder: Path) -> Corpus:
    try:
        if os.path.exists(folder / "vocab.json"):
            tokenizer = CharTokenizer.from_json(folder / "vocab.json")
        elif os.path.exists(folder / "meta.pkl"):
            tokenizer = CharTokenizer(read_characters(folder / "meta.pkl"))
        else:
            raise DataError(
                f"{folder} holds tokens but neither vocab.json nor meta.pkl to say what they mean"
            )
    except CheckpointError as error:
        raise DataError(str(error)) from error
    train = _map(folder / "train.bin", len(tokenizer))
    validation = _map(folder / "val.bin", len(tokenizer))
    name, description = folder.resolve().name, f"the prepared folder {folder}"
    return Corpus(name, description, train, validation, tokenizer)


def _map(path: Path, size: int) -> Ids:
    try:
        length = path.stat().st_size
        if length == 0 or length % 2:
            raise DataError(
                f"{path} has {length} bytes: expected raw uint16 ids, an even number above 0"
            )
        ids = np.memmap(path, dtype="<u2", mode="r")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    for start in range(0, len(ids), CHUNK):
        if (largest := int(ids[start : start + CHUNK].max())) >= size:
            raise DataError(
                f"{path} holds the id {largest}, but its vocabulary has {size} characters: "
                "the tokens and the vocabulary are not of the same text"
            )
    return ids


# ----------------------------------------------------------------------------------------- batches


class Batches:
    """Draws endless batches of random windows from ids.

    Each draw takes B starts from `generator` (on the CPU), whose state is all the state there is: a
    run that restores it goes on with the batches that would have come.

    Raises ConfigError for `batch` or `context` below 1 or a generator elsewhere, and DataError when
    there are fewer than `context + 1` tokens.
    """

    def __init__(self, tokens: Ids, batch: int, context: int, generator: torch.Generator) -> None:
        if batch < 1:
            raise ConfigError(f"batch={batch}: expected at least 1")
        _check_length("the text", len(tokens), context)
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

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield self.draw()


def windows(tokens: Ids, count: int, context: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `count` fixed windows for evaluation: x and y, both int64 (count, T).

    One window starts at a random place in each of `count` equal stretches of the text. The mean
    over them estimates the mean over all windows without bias, like independent starts, and with
    less variance. The same arguments give the same windows.
    """
    import torch

    if count < 1:
        raise ConfigError(f"count={count}: expected at least 1")
    _check_length("the text", len(tokens), context)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.rand(count, generator=generator, dtype=torch.float64).numpy()
    last = len(tokens) - context
    starts = ((np.arange(count) + offsets) * (last / count)).astype(np.int64)
    return gather(tokens, np.minimum(starts, last - 1), context)


def gather(
    tokens: Ids, starts: NDArray[np.int64], context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the windows at `starts`, x and y, both int64 (B, T)."""
    import torch

    rows = tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()

"""A corpus that is encoded already, in a folder of nanoGPT's layout."""

from __future__ import annotations

import os
import pickle
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from altprop.errors import CheckpointError, DataError
from altprop.lm.text.corpus import Corpus, little_endian
from altprop.lm.text.reading import read_characters
from altprop.lm.text.tokenizer import CHUNK, CharTokenizer, Ids

PREPARED = ("train.bin", "val.bin", "vocab.json", "meta.pkl")


def is_prepared(folder: Path) -> bool:
    """Tell whether a folder holds tokens."""
    return any(os.path.exists(folder / name) for name in ("train.bin", "val.bin"))


def check_folder(out: str | Path, overwrite: bool) -> None:
    """Make sure that `write_prepared` may write a folder, or replace what it wrote before.

    **Raises:** `DataError` for one that holds anything else, or cannot be read.
    """
    target = _absolute(out)
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise DataError(f"{target} is a file or a link: give the path of a folder to write")
    try:
        held = sorted(os.listdir(target))
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}") from error
    if held and not overwrite:
        raise DataError(f"{target} is not empty: give another folder, or overwrite (--overwrite)")
    if foreign := [name for name in held if name not in PREPARED]:
        raise DataError(
            f"{target} holds {foreign[0]!r}, which no prepared folder does, and will not be "
            "replaced: give another folder"
        )


def write_prepared(corpus: Corpus, out: str | Path) -> None:
    """Write a corpus as a folder, beside `out` first, so that it is there whole or not at all.

    **Raises:** `DataError` for more than 65536 characters, or what cannot be written.
    """
    target = _absolute(out)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    if len(corpus.tokenizer) > 65536:
        raise DataError(
            f"{corpus.name} has {len(corpus.tokenizer)} characters, more than the 65536 that "
            "nanoGPT's uint16 layout can number: use the text itself"
        )
    try:
        fresh.mkdir(parents=True)
        for name, ids in (("train.bin", corpus.train), ("val.bin", corpus.validation)):
            with (fresh / name).open("wb") as file:
                for piece in little_endian(ids):
                    file.write(piece.astype("<u2", copy=False).data)
        corpus.tokenizer.to_json(fresh / "vocab.json")
        (fresh / "meta.pkl").write_bytes(pickle.dumps(_meta(corpus.tokenizer), protocol=4))
        _swap(fresh, target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _absolute(out: str | Path) -> Path:
    return Path(os.path.abspath(Path(out).expanduser()))


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


def read_prepared(folder: Path) -> Corpus:
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

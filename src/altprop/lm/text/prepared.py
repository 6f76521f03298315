"""A corpus that is encoded already, in a folder of nanoGPT's layout."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from altprop.errors import CheckpointError, DataError
from altprop.files import replacing, sync, write_whole
from altprop.lm.text.choice import read_tokenizer, stated_tokenizer
from altprop.lm.text.corpus import Corpus, little_endian
from altprop.lm.text.reading import read_characters
from altprop.lm.text.token_file import TokenFile, Tokens
from altprop.lm.text.tokenizer import AbstractTokenizer, CharTokenizer, width_of
from altprop.reading import parse_json, place, read_bytes

PREPARED = ("train.bin", "val.bin", "vocab.json", "tokenizer.json", "meta.pkl", "digest.json")
LARGEST_DIGEST = 64 << 10  # bytes
ATTEMPTS = 10  # at a folder that is replaced while it is read


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

    An id takes 16 bits, or 32 where there are more than 65536. It is all on the disk before it has
    its name.

    **Raises:** `DataError` for what cannot be written.
    """
    target = _absolute(out)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    tokenizer = corpus.tokenizer
    dtype = width_of(len(tokenizer)).newbyteorder("<")
    try:
        fresh.mkdir(parents=True)
        digests = {"vocabulary": tokenizer.digest()}
        for name, ids in (("train.bin", corpus.train), ("val.bin", corpus.validation)):
            digests[name] = _write_ids(fresh / name, ids, dtype)
        write_whole(fresh / "digest.json", json.dumps(digests, indent=1) + "\n")
        tokenizer.to_json(fresh / tokenizer.file)
        if isinstance(tokenizer, CharTokenizer):
            write_whole(fresh / "meta.pkl", pickle.dumps(_meta(tokenizer), protocol=4))
        _swap(fresh, target)
        sync(target.parent)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_ids(path: Path, ids: Tokens, dtype: np.dtype[Any]) -> str:
    """Write ids as raw integers, and return the SHA-256 of the file."""
    digest = hashlib.sha256()
    with replacing(path) as part, part.open("wb") as file:
        for piece in little_endian(ids):
            raw = piece.astype(dtype, copy=False).data
            digest.update(raw)
            file.write(raw)
    return digest.hexdigest()


def _absolute(out: str | Path) -> Path:
    return Path(os.path.abspath(place(out, DataError)))


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


def read_prepared(folder: Path, tokenizer: str | None = None) -> Corpus:
    """Open a prepared folder: the one that is there, whole, or the one that replaces it meanwhile.

    **Arguments:** `tokenizer`, whose ids these are, where the folder does not say: the path of a
    `tokenizer.json`, or `ids:N`.

    **Raises:** `DataError` for files that are missing, damaged or not of one text.
    """
    for _ in range(ATTEMPTS):
        try:
            opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"cannot read {folder}: {error.strerror or error}") from error
        try:
            return _read(folder, opened, tokenizer)
        except DataError:
            if os.path.isdir(folder) and os.path.samestat(os.stat(folder), os.fstat(opened)):
                raise
        finally:
            os.close(opened)
    raise DataError(f"{folder} is replaced again and again while it is read: wait, and try again")


def _read(folder: Path, opened: int, stated: str | None) -> Corpus:
    there = set(os.listdir(opened))
    try:
        tokenizer = _tokenizer(folder, opened, stated)
        parts = {
            name: TokenFile(opened, name, f"{folder / name}", len(tokenizer))
            for name in ("train.bin", "val.bin")
        }
        digests = {name: ids.digest() for name, ids in parts.items()}
        digests["vocabulary"] = tokenizer.digest()
        if "digest.json" in there:
            _check_digests(folder / "digest.json", opened, digests)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        file = folder / Path(error.filename or "").name
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error
    name, description = folder.resolve().name, f"the prepared folder {folder}"
    return Corpus(name, description, parts["train.bin"], parts["val.bin"], tokenizer)


def _tokenizer(folder: Path, opened: int, stated: str | None) -> AbstractTokenizer:
    """Return the tokenizer that a folder holds, or else the one that is stated."""
    there = set(os.listdir(opened))
    own = read_tokenizer(folder, opened)
    if own is None and "meta.pkl" in there and stated in (None, "char"):
        own = CharTokenizer(read_characters(folder / "meta.pkl", opened))
    if own is not None and (stated is None or stated == "char" and type(own) is CharTokenizer):
        return own
    if stated is None:
        raise DataError(
            f"{folder} holds tokens but neither vocab.json nor meta.pkl nor tokenizer.json to say "
            "what they mean: state it by --tokenizer path/tokenizer.json, or --tokenizer ids:50257 "
            "for the number of ids alone"
        )
    tokenizer = stated_tokenizer(stated)
    if own is not None and own.digest() != tokenizer.digest():
        raise DataError(f"{folder} holds another tokenizer than {stated}: leave out --tokenizer")
    return tokenizer


def _check_digests(path: Path, opened: int, found: dict[str, str]) -> None:
    try:
        written = parse_json(read_bytes(path.name, LARGEST_DIGEST, opened))
    except ValueError as error:
        raise DataError(f"{path} is damaged or not JSON: write the folder again") from error
    wanted = written if isinstance(written, dict) else {}
    if changed := [name for name, digest in found.items() if wanted.get(name) != digest]:
        raise DataError(
            f"{path.parent}: {', '.join(changed)} is not what was written there (digest.json): "
            "write the folder again, or remove digest.json if the change is meant"
        )

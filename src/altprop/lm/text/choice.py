"""Which tokenizer a text is read by: what an option says, and what a folder keeps."""

from __future__ import annotations

import os
from pathlib import Path

from altprop.errors import DataError
from altprop.lm.text.ids import FORMAT as IDS
from altprop.lm.text.ids import IdTokenizer
from altprop.lm.text.subword import SubwordTokenizer, train_bpe
from altprop.lm.text.tokenizer import AbstractTokenizer, CharTokenizer, read_vocabulary
from altprop.reading import place

FILES = (CharTokenizer.file, SubwordTokenizer.file)  # by which a folder keeps its tokenizer
EXPECTED = "expected char, bpe:4096, the path of a tokenizer.json, or ids:50257 for tokens alone"


def names_tokenizer(spec: str | None) -> bool:
    """Say whether `spec` is the name of a tokenizer, such as `bpe:4096`, and not a path."""
    return spec is None or spec == "char" or spec.partition(":")[0] in ("bpe", "ids")


def make_tokenizer(spec: str | None, train: str, validation: str) -> AbstractTokenizer:
    """Return the tokenizer that an option names, of a text in two splits.

    Characters are those of both splits; a BPE is learned from the first alone.

    **Raises:** `DataError` for one that cannot be read, learned or used for text.
    """
    if spec is None or spec == "char":
        return CharTokenizer.from_text(train + validation)
    kind, _, size = spec.partition(":")
    if kind == "bpe":
        return train_bpe(train, _number(spec, size))
    if kind == "ids":
        raise DataError(f"{spec} is for a folder of train.bin and val.bin alone: a text is none")
    return stated_tokenizer(spec)


def stated_tokenizer(spec: str) -> AbstractTokenizer:
    """Return the tokenizer that an option states without a text: a file, or a number of ids.

    **Raises:** `DataError` for any other.
    """
    kind, _, size = spec.partition(":")
    if kind == "ids":
        return IdTokenizer(_number(spec, size))
    if names_tokenizer(spec):
        raise DataError(
            f"tokenizer {spec} is made from a text, and this folder holds tokens: give the path of "
            "their tokenizer.json, or the number of ids, such as ids:50257"
        )
    path = place(spec, DataError)
    if not os.path.lexists(path):
        raise DataError(f"no tokenizer {spec[:200]!r}: {EXPECTED}")
    return SubwordTokenizer.from_json(path / SubwordTokenizer.file if path.is_dir() else path)


def read_tokenizer(folder: Path, opened: int | None = None) -> AbstractTokenizer | None:
    """Return the tokenizer that altprop has kept in a folder, or none.

    **Arguments:** `opened`, the folder's descriptor, if it is open.

    **Raises:** `CheckpointError` or `DataError` for one that is damaged.
    """
    there = set(os.listdir(folder if opened is None else opened))
    if SubwordTokenizer.file in there:
        return SubwordTokenizer.from_json(folder / SubwordTokenizer.file, opened)
    if CharTokenizer.file not in there:
        return None
    path = folder / CharTokenizer.file
    if read_vocabulary(path, opened, "expected a vocabulary").get("format") == IDS:
        return IdTokenizer.from_json(path, opened)
    return CharTokenizer.from_json(path, opened)


def _number(spec: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 10:
        raise DataError(f"tokenizer {spec[:80]!r} is none: {EXPECTED}")
    return int(text)

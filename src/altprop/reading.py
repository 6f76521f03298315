"""What somebody else wrote is read within bounds: regular files, of a largest size and depth.

What is not read so ends as an `OSError` with the file's name and one line, like a missing file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from altprop.errors import AltpropError, ConfigError

DEEPEST = 30  # lists and mappings in one another
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "a fifo"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def place(path: str | Path, error: type[AltpropError] = ConfigError) -> Path:
    """Return a path as a person writes it: `~` is a home, unless it is that of nobody here.

    **Raises:** `error` for what no file can be named.
    """
    text = os.fspath(path)
    with contextlib.suppress(UnicodeEncodeError):
        if b"\0" not in os.fsencode(text):
            return Path(os.path.expanduser(text))
    raise error(f"{text[:80]!r} is no path: it holds a zero byte or half a character")


def open_regular(path: str | Path, most: int, folder: int | None = None) -> int:
    """Open a regular file of at most so many bytes to be read, and return its descriptor.

    Nothing else is opened: a fifo would wait for its writer, a device for its user.

    **Arguments:** `folder`, the descriptor of a folder in which `path` is the name.

    **Raises:** `OSError`.
    """
    try:
        _check(os.stat(path, dir_fd=folder), path, most)
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        file = os.open(path, flags, dir_fd=folder)
    except ValueError:
        raise OSError(errno.EINVAL, "no file has such a name", str(path)) from None
    try:
        _check(os.fstat(file), path, most)  # it may be another one by now
    except OSError:
        os.close(file)
        raise
    return file


def read_bytes(path: str | Path, most: int, folder: int | None = None) -> bytes:
    """Return what a regular file of at most so many bytes holds; arguments as `open_regular`.

    **Raises:** `OSError`.
    """
    file = open_regular(path, most, folder)
    pieces, left = [], most + 1
    try:
        while left > 0 and (piece := os.read(file, min(left, 1 << 24))):
            pieces.append(piece)
            left -= len(piece)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(file)
    if left <= 0:
        raise _too_large(path, most)
    return b"".join(pieces)


def _check(found: os.stat_result, path: str | Path, most: int) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS if test(found.st_mode)), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, expected a regular file", str(path))
    if found.st_size > most:
        raise _too_large(path, most)


def _too_large(path: str | Path, most: int) -> OSError:
    why = f"it is larger than {in_bytes(most)}, the most that is read here"
    return OSError(errno.EFBIG, why, str(path))


def in_bytes(count: int) -> str:
    """Return a number of bytes in the largest unit of which there is one.

    >>> in_bytes(262144), in_bytes(3 << 29)
    ('256 KiB', '1.5 GiB')
    """
    names = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = min((count.bit_length() - 1) // 10, len(names) - 1) if count else 0
    tenths = count * 10 >> 10 * power
    whole, tenth = divmod(tenths, 10)
    shown = str(whole) if whole < 10_000 else f"1e{len(str(whole)) - 1}"
    return f"{shown}{f'.{tenth}' if tenth and whole < 10_000 else ''} {names[power]}"


def parse_json(text: str | bytes, deepest: int = DEEPEST) -> Any:
    """Return what a JSON text says.

    **Raises:** `ValueError` for what is no JSON, or nests more deeply than `deepest`.
    """
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError(f"more than {deepest} levels in one another") from None
    level = _nested([data])
    for _ in range(deepest):
        level = _nested(
            x for each in level for x in (each if type(each) is list else each.values())
        )
    if level:
        raise ValueError(f"more than {deepest} levels in one another")
    return data


def _nested(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, (list, dict))]

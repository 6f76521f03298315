"""A file is either whole or as it was before, whatever happens while it is written.

What this library writes, it writes here: beside the file first, then to the disk, then in place of
the file in one step. A crash leaves at most `.NAME.part`, which the next writer of NAME replaces.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path to write to; what lies there at the end takes the place of `path` in one step.

    After an error nothing has changed. What is linked to the file before stays as it was. The file
    is on the disk, and has the mode that the umask gives, before it has its name.
    """
    fresh = part_of(path)
    fresh.unlink(missing_ok=True)  # of an earlier crash, or a link to somebody's file
    try:
        opened = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = os.fstat(opened).st_mode & 0o777
        os.close(opened)
        yield fresh
        fresh.chmod(mode)  # some libraries make a file for its owner alone
        sync(fresh)
        os.replace(fresh, path)
        sync(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """Return where `replacing` writes what becomes `path`."""
    return path.with_name(f".{path.name}.part")


def sync(path: Path) -> None:
    """Wait until a file's content, or which files a folder holds, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder, and writes its names by itself
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_whole(path: Path, text: str | bytes) -> None:
    """Write `text` as a file, whole or not at all."""
    content = text.encode("utf-8") if isinstance(text, str) else text
    with replacing(path) as fresh:
        fresh.write_bytes(content)

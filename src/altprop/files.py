"""A file is either whole or as it was before, whatever happens while it is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path to write to; what lies there at the end takes the place of `path` in one step.

    After an error nothing has changed. What is linked to the file before stays as it was.
    """
    fresh = path.with_name(f".{path.name}.part")
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` as a file, whole or not at all."""
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")

"""The closing line of a run's `config.yaml`: the digest of all lines above.

A file that a crash or a hand has changed does not read as another configuration, silently: it no
longer fits its closing line. To YAML the line is a comment.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from altprop.lab.config import LARGEST
from altprop.reading import read_bytes

_MARK = b"# a run's options change on the command line, not here: sha256 "


def sealed(text: str) -> bytes:
    """Return the text with its closing line."""
    above = text.encode("utf-8")
    return above + _line(above)


def has_seal(path: Path) -> bool:
    """Tell whether a file ends with its closing line, and is as it was written."""
    try:
        content = read_bytes(path, LARGEST)
    except OSError:
        return False
    above, mark, _ = content.rpartition(_MARK)
    return bool(mark) and content == above + _line(above)


def _line(above: bytes) -> bytes:
    return _MARK + hashlib.sha256(above).hexdigest().encode() + b"\n"

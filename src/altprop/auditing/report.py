"""What an audit found: numbers for a program, tables for a terminal, bars for the eye."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group

from altprop.auditing.rows import Reference, Row
from altprop.auditing.tables import tables
from altprop.errors import ConfigError, DataError
from altprop.files import replacing
from altprop.reading import place


@dataclass(frozen=True)
class AuditReport:
    """The rows of an audit, its reference and the names of its trials.

    `extra` is what the caller adds to the JSON form: where the problem came from, versions.
    """

    reference: Reference
    rows: Sequence[Row]
    trials: Sequence[str]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data; an undefined or infinite figure is `None`."""
        content = {
            "reference": self.reference.as_dict(),
            "rows": [row.as_dict() for row in self.rows],
            "trials": list(self.trials),
            **self.extra,
        }
        return _finite(content)

    def to_json(self) -> str:
        """Return the report as JSON; per-parameter figures are means over the trials."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def write_json(self, path: str | Path) -> Path:
        """Write `to_json` to a file, whole or not at all; return its path.

        **Raises:** `DataError` where the file cannot be written.
        """
        text = self.to_json() + "\n"
        return _write(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))

    def plot(self, path: str | Path) -> Path:
        """Draw cosine and norm ratio per parameter, arm by arm, as a PNG; return its path.

        **Raises:** `ConfigError` without matplotlib; `DataError` where the file cannot be written.
        """
        self.check_target(path, plot=True)
        from altprop.auditing.plot import draw

        figure = draw(self.reference, self.rows, len(self.trials))
        return _write(path, lambda fresh: figure.savefig(fresh, format="png", dpi=150))

    @staticmethod
    def check_target(path: str | Path, *, plot: bool = False) -> None:
        """Make sure that a report can be written to `path`, and leave nothing there.

        **Arguments:** `plot`, whether it is the picture that will be written.

        **Raises:** `DataError` where the file cannot be written; `ConfigError` without matplotlib.
        """
        if plot and importlib.util.find_spec("matplotlib") is None:
            raise ConfigError('plots need matplotlib: pip install "altprop[plots]"')
        target = place(path, DataError)
        if target.is_dir():
            raise DataError(f"{path} is a folder: give the path of a file to write")
        if os.path.lexists(target) and not target.is_file():
            raise DataError(f"{path} is no regular file: give the path of a file to write")
        if not target.parent.is_dir():
            raise DataError(f"cannot write {path}: there is no folder {target.parent}")
        try:
            with tempfile.TemporaryFile(dir=target.parent):
                pass  # permissions alone do not tell: the file system may be read-only
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror or error}") from error

    def table(self) -> Group:
        """Return rich tables for a terminal of 100 columns: direction, size, and cost."""
        return tables(self.reference, self.rows, len(self.trials))

    def __rich__(self) -> Group:
        return self.table()

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=100).print(self.table())
        return out.getvalue()


def _write(path: str | Path, write: Callable[[Path], object]) -> Path:
    AuditReport.check_target(path)
    target = place(path, DataError)
    try:
        with replacing(target) as fresh:
            write(fresh)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    return target


def _finite(value: Any) -> Any:
    """Return plain data without NaN and infinity, which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value

"""Texts of Hugging Face datasets, by the library datasets; no code of a dataset is ever run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from altprop.errors import DataError, in_a_line, suggest
from altprop.lm.text.reading import LARGEST_TEXT
from altprop.lm.text.subword import INSTALL
from altprop.reading import in_bytes

PREFIX = "hf:"
_BUILDERS = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet", "txt": "text"}
_SAVED = ("dataset_dict.json", "state.json")  # of a dataset's own save_to_disk


def read_dataset(spec: str) -> tuple[str, str | None]:
    """Return the text that `hf:NAME[:config][:column]` names, to train on and to validate on.

    NAME is one of the Hub, or the path of a file (json, jsonl, csv, parquet, txt), of a folder of
    such files, or of one that `save_to_disk` wrote. The column is the only one that holds text, or
    `text`, unless it is named; `hf:NAME::column` names it alone. Rows follow one another, each
    ending in a newline. The split `train` trains, or the only one there is; `validation` validates,
    if there is one. A dataset that needs code of its own is refused by the library.

    **Raises:** `DataError`, one line each, without the library and for what cannot be read.
    """
    name, config, column = _parts(spec)
    try:
        import datasets
    except ImportError:
        raise DataError(f"{spec} needs the package datasets: {INSTALL}") from None
    path = Path(os.path.expanduser(name))
    try:
        if path.is_dir() and any((path / mark).exists() for mark in _SAVED):
            found = datasets.load_from_disk(str(path))
        elif path.is_file():
            builder = _BUILDERS.get(path.suffix.lstrip(".").lower(), "text")
            found = datasets.load_dataset(builder, config, data_files=str(path))
        else:
            found = datasets.load_dataset(str(path) if path.is_dir() else name, config)
    except Exception as error:  # of a dozen libraries, and of the network
        raise DataError(f"cannot read the dataset {spec[:200]!r}: {in_a_line(error)}") from error
    splits = dict(found) if isinstance(found, dict) else {"train": found}
    if "train" not in splits and len(splits) > 1:
        raise DataError(f"{spec} has no split train: it has {', '.join(splits)}")
    train = splits.pop("train", None) or splits.popitem()[1]
    held = splits.get("validation")
    column = _column(spec, train, column)
    return _joined(spec, train, column), None if held is None else _joined(spec, held, column)


def settled(spec: str) -> str:
    """Return a spec that means the same from any working folder."""
    name, config, column = _parts(spec)
    if os.path.exists(path := os.path.expanduser(name)):
        name = os.path.abspath(path)
    return f"{PREFIX}{':'.join([name, config or '', column or '']).rstrip(':')}"


def _parts(spec: str) -> tuple[str, str | None, str | None]:
    name, *more = spec.removeprefix(PREFIX).split(":")
    if not name or len(more) > 2 or "\0" in spec:
        raise DataError(
            f"{spec[:200]!r}: expected hf:NAME, hf:NAME:config or hf:NAME:config:column"
        )
    config, column = [*(part or None for part in more), None, None][:2]
    return name, config, column


def _column(spec: str, split: Any, column: str | None) -> str:
    names = list(split.column_names)
    if column is not None:
        if column not in names:
            raise DataError(f"{spec} has no column {column!r}: {suggest(column, names)}")
        return column
    kinds = {name: getattr(split.features[name], "dtype", None) for name in names}
    texts = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        raise DataError(
            f"{spec} has {len(texts)} columns of text ({', '.join(texts or names)}): name one, as "
            f"in hf:NAME::{(texts or names or ['text'])[0]}"
        )
    return texts[0]


def _joined(spec: str, rows: Iterable[dict[str, Any]], column: str) -> str:
    texts, size = [], 0
    for row in rows.select_columns([column]):  # type: ignore[attr-defined]
        if (text := row[column]) is None or text == "":
            continue
        if not isinstance(text, str):
            raise DataError(f"{spec}: the column {column!r} holds {type(text).__name__}, not text")
        texts.append(text if text.endswith("\n") else text + "\n")
        size += len(text)
        if size > LARGEST_TEXT:
            raise DataError(
                f"{spec} is larger than {in_bytes(LARGEST_TEXT)}, the most that is read here"
            )
    return "".join(texts).replace("\r\n", "\n")

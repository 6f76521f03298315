"""A published figure: where it stands, how it is measured here, and what came of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from altprop import DataError
from altprop.files import write_whole
from altprop.lab.record import LARGEST, processor, versions
from altprop.reading import parse_json, read_bytes

Measure = Callable[[int], Mapping[str, float]]


@dataclass(frozen=True)
class Figure:
    """A figure of the literature and the experiment that measures it again.

    **Arguments:** `setting`, the experiment in a sentence; `source`, who published what stands in
    `published`, which has an entry for every line of the figure, None for a line of ours alone;
    `unit` of all of them; `measure`, from a seed to what it found for every line; `seeds`, how many
    by default, from 0 on; `differs`, why ours need not be theirs; `column`, what `published` is
    headed by, where the figures are not those of a publication.
    """

    title: str
    source: str
    setting: str
    unit: str
    published: Mapping[str, float | None]
    measure: Measure
    differs: str
    seeds: int = 3
    column: str = "published"


@dataclass
class Measured:
    """What was found of a figure: of every line one value per seed, and by what.

    `seconds`, of all seeds together.
    """

    values: dict[str, list[float]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    seconds: float = 0.0
    threads: int = 0
    processor: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Measured:
        """Read what `write` wrote, or nothing where there is none.

        **Raises:** `DataError` for a file that is no such record.
        """
        if not path.exists():
            return cls()
        try:
            found: dict[str, Any] = parse_json(read_bytes(path, LARGEST))
            return cls(**found)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}: no record of `altprop reproduce` ({error}): remove it, or name another "
                "folder with --out"
            ) from None

    def write(self, path: Path) -> None:
        """Write everything as JSON, whole or not at all."""
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")


def measured(figure: Figure, seeds: int, path: Path) -> Iterator[Measured]:
    """Measure the seeds that `path` does not have yet; yield after each what there is by then.

    The record is written after every seed, so that whoever is interrupted goes on there.

    **Raises:** `DataError` where the record is of other lines than the figure has.
    """
    found = Measured.read(path)
    if found.values and found.values.keys() != figure.published.keys():
        raise DataError(
            f"{path}: of another version of this figure: remove it, or name another folder with "
            "--out"
        )
    for seed in range(seeds):
        if seed in found.seeds:
            continue
        clock = time.perf_counter()
        new = figure.measure(seed)
        if new.keys() != figure.published.keys():
            lines = ", ".join(sorted(new.keys() ^ figure.published.keys()))
            raise ValueError(f"{figure.title}: measured and published lines differ: {lines}")
        for line in figure.published:
            found.values.setdefault(line, []).append(float(new[line]))
        found.seeds.append(seed)
        found.seconds += time.perf_counter() - clock
        found.threads = torch.get_num_threads()
        found.processor = processor()
        found.versions = versions()
        found.write(path)
        yield found


def known(value: float | None) -> float:
    """Return a figure of an audit, which must have one here."""
    if value is None:
        raise ValueError("the audit has no figure: the reference's gradient is too small")
    return value

"""What a sweep searches: the options of a run, and ranges or choices for some of them.

A value is held as the word that the command line would be given, so that any option can be
searched, parts of choices such as `stabiliser.target` too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any

from altprop import ConfigError
from altprop.lab.choices import at, defaults_of, no_option, shown, types_of
from altprop.lab.config import WRITES, read_mapping, values_of
from altprop.lab.edges import short
from altprop.lab.settings import TrainConfig
from altprop.lab.values import fit, plain
from altprop.lab.words import changed
from altprop.reading import place

_TYPES = types_of(TrainConfig)
# of which no value is a better one
_NOT = (*WRITES, "data", "validation", "pattern", "tokenizer", "quiet", "log", "seed")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both of them too; `log`, drawn by their logarithms; `whole`."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def word(self, value: float) -> str:
        """Return a number as a word, of few digits where that stays in the range."""
        if self.whole:
            return str(round(value))
        rounded = short(value, 1e-3 * (value if self.log else self.high - self.low))
        return repr(rounded if self.low <= rounded <= self.high else float(value))


@dataclass(frozen=True)
class Choices:
    """A few values, as words."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Spec:
    """What all trials share, by name, and what is searched, by dotted name."""

    base: Mapping[str, Any]
    searched: Mapping[str, Range | Choices]

    def config(self, words: Mapping[str, str], **more: Any) -> TrainConfig:
        """Return the run of a trial, in which the searched options have these words.

        **Raises:** `ConfigError` for words that do not fit, or not together.
        """
        values, said = dict(defaults_of(TrainConfig)) | dict(self.base), dict[str, Any]()
        for name in sorted(words, key=lambda name: name.count(".")):  # a choice before its parts
            top, *path = name.split(".")
            before = said.get(top, values.get(top))
            said[top] = changed(_TYPES[top], before, path, words[name], top)
        values |= {name: fit(_TYPES[name], value, name) for name, value in said.items()}
        return TrainConfig(**{**values, **more})

    def corners(self) -> Iterator[dict[str, str]]:
        """Yield the first words of all options, and then each other one of each beside these."""
        values = {name: _words(it) for name, it in self.searched.items()}
        first = {name: words[0] for name, words in values.items()}
        yield first
        for name, words in values.items():
            yield from ({**first, name: word} for word in words[1:])

    def as_plain(self) -> dict[str, Any]:
        """Return it as a file holds it."""
        held = {
            name: list(it.words)
            if isinstance(it, Choices)
            else {"low": it.low, "high": it.high, "log": it.log}
            for name, it in self.searched.items()
        }
        return {**plain(self.base), "sweep": held}


def read_spec(path: Path) -> Spec:
    """Read a sweep from its YAML file, and check every range and choice in it.

    **Raises:** `ConfigError` with all that is wrong with it; `OSError` for a file that cannot be
    read.
    """
    path = place(path)
    return at(str(path), lambda: _checked(read_mapping(path), path))


def _checked(data: dict[str, Any], path: Path) -> Spec:
    asked = data.pop("sweep", None)
    if not isinstance(asked, dict) or not asked:
        raise ConfigError(
            "there is no mapping 'sweep' of options to search, such as "
            "sweep: {lr: {low: 1e-4, high: 1e-2, log: true}, layers: [1, 2]}"
        )
    base = values_of(data, path, TrainConfig, unsaid=WRITES)
    problems, searched = [], dict[str, Range | Choices]()
    for name, held in asked.items():
        if not isinstance(name, str):
            problems.append(f"sweep: {shown(name)} is no option: write its name as text")
            continue
        try:
            searched[name] = at(f"sweep.{name}", partial(_one, name, held))
        except ConfigError as error:
            problems.append(str(error))
    spec = Spec(base, searched)
    for words in () if problems else spec.corners():
        try:
            spec.config(words)
        except ConfigError as error:
            if (said := f"sweep: {error}") not in problems:
                problems.append(said)
    if problems:
        raise ConfigError("; ".join(problems))
    return Spec(base, {name: _kind(spec, name) for name in searched})


def _one(name: str, held: Any) -> Range | Choices:
    top = name.partition(".")[0]
    if top not in _TYPES:
        raise no_option("", top, _TYPES)
    if top in _NOT:
        raise ConfigError("not an option to search: leave it out")
    if isinstance(held, list) and held:
        words = tuple(value if isinstance(value, str) else dumps(value) for value in held)
        if len(set(words)) < len(words):
            raise ConfigError(f"a choice stands twice in {shown(held)}")
        return Choices(words)
    if isinstance(held, dict) and {"low", "high"} <= held.keys() <= {"low", "high", "log"}:
        low, high = (fit(float, held[end], end) for end in ("low", "high"))
        log = fit(bool, held.get("log", False), "log")
        if not -math.inf < low < high < math.inf:
            raise ConfigError(
                f"low is {low:g} and high is {high:g}, expected finite numbers, low < high"
            )
        if log and low <= 0:
            raise ConfigError(f"low is {low:g}, expected a number > 0 where log is true")
        return Range(low, high, log)
    raise ConfigError(
        f"expected a list of choices, or a range such as {{low: 1e-4, high: 1e-2, log: true}}, got "
        f"{shown(held)}"
    )


def _words(searched: Range | Choices) -> tuple[str, ...]:
    if isinstance(searched, Choices):
        return searched.words
    return tuple(str(int(v)) if v == int(v) else repr(v) for v in (searched.low, searched.high))


def _kind(spec: Spec, name: str) -> Range | Choices:
    """Return a range of whole numbers as such: the option takes no fraction between its ends."""
    found = spec.searched[name]
    if isinstance(found, Choices) or not (found.low.is_integer() and found.high.is_integer()):
        return found
    try:
        spec.config({**next(spec.corners()), name: repr(found.low + 0.5)})
    except ConfigError:
        return Range(found.low, found.high, found.log, whole=True)
    return found
